"""Transformers, written once: what they are made of is given to them, and how it is laid out is the layers' affair."""
