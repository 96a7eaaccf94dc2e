"""Quantization: the methods, one per file, and the policy that gives each weight its storage; independent of ONNX."""
