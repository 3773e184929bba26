"""Datasets and packed batches."""
