"""BERT: checkpoints in, the packed forward pass."""
