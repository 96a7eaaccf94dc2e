"""LoRA adapters of peft: read, checked, and merged into a checkpoint's weights while the weights are read."""
