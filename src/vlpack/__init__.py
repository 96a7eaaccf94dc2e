"""Qwen vision-language checkpoints to complete packages for the stock ONNX Runtime GenAI."""

__version__ = "0.1.0"
