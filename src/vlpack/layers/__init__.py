"""Layers that several architectures share: `onnxscript.nn` modules that write ONNX nodes."""
