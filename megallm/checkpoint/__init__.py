"""Sharded checkpoints that load under any layout."""
