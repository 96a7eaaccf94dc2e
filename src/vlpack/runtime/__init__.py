"""Runs packages: answers and conversations with the stock onnxruntime-genai, embeddings and scores with onnxruntime."""
