"""Reads Hugging Face checkpoints: folders and Hub ids, settings and tensors. Nothing in them is trusted."""
