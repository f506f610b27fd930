"""What a model reads: samples cut from token files in exactly the order of Megatron, and blends of them."""
