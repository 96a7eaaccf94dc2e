"""What lies beside the graphs: runtime and processor configs, tokenizer, model card, manifest, and the folder itself."""
