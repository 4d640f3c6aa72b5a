"""Datasets, the training loop and its checkpoints."""
