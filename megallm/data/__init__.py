"""Text, tokenizers, token files, samples and their feeding. Torch is imported by `feeding.loader` alone."""
