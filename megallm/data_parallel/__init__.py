"""Gradients and optimizer state over the data parallel ranks."""
