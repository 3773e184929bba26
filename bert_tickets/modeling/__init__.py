"""BERT: checkpoints, parameters, and the forward pass on packed batches."""
