"""The families of models, a table each."""

from megallm.convert.families.gpt2 import GPT2
from megallm.convert.families.llama import LLAMA
from megallm.convert.family import Family

FAMILIES: tuple[Family, ...] = (LLAMA, GPT2)
"""Where several can hold a model of ours, the first one is taken."""
