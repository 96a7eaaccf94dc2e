"""A package in memory that answers: the stock onnxruntime-genai, conversations, vectors and scores."""
