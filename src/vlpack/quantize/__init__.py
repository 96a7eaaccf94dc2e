"""Quantization methods, one per file: float arrays in, integer arrays and scales out, nothing of ONNX."""
