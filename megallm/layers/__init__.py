"""Layers that know how their matrices are cut over tensor parallel ranks."""
