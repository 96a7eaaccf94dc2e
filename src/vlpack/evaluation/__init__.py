"""Measures a package: questions with known answers, and speed and memory."""
