"""Megatron-LM's checkpoints: its `torch` format read and written, its `torch_dist` format read."""
