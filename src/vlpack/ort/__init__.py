"""Plain onnxruntime: sessions, edits of graphs in memory, and what the processor's 8-bit kernels do."""
