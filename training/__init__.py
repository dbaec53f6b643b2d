"""The training engine behind all training scripts."""
