"""LoRA adapters of peft: read, checked and merged into a checkpoint's weights as these are read."""
