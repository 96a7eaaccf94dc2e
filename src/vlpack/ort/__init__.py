"""Helpers for plain onnxruntime: sessions, edits of graphs in memory, and a check of the processor's 8-bit products."""
