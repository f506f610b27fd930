"""Indexed files, sample orders, blending, samplers and tokenizers. Torch is imported by `loader` alone."""
