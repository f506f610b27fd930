"""Checkpoints of Hugging Face and of Megatron-LM, to ours and back."""
