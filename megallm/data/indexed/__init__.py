"""The .bin/.idx token files of Megatron: read, written, checked, merged."""
