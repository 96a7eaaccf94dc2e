"""Evaluation of a package: scores on questions with known answers, and benchmarks of speed and memory."""
