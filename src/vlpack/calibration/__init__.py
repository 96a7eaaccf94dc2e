"""Fits 4-bit weights to what the decoder multiplies them by: texts that it writes itself, or the user's.

An 8-bit package of the same checkpoint stands beside the one that is built, writes the texts, and is run on them.
"""
