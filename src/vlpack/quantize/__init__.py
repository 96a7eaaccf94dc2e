"""Quantization, independent of ONNX: the methods, one per file, and the policy that chooses each weight's storage."""
