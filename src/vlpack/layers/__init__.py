"""What several architectures share, as `onnxscript.nn` modules that write ONNX nodes."""
