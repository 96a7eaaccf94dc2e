"""What lies beside the graphs: configs of runtime and processor, model card, manifest, and the folder itself."""
