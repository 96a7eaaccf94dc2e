"""Whether a package is the model that it was made from, stage by stage against live transformers."""
