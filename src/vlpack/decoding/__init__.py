"""A package's decoder on plain onnxruntime: its graph, edited for many sequences, and the slots of its cache."""
