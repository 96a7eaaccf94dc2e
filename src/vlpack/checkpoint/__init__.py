"""Reads Hugging Face checkpoints, their settings and tensors, from a folder or a Hub id. No input is trusted."""
