"""The families of models, a table each."""

from megallm.convert.families.gpt2 import GPT2
from megallm.convert.families.gpt_neox import GPT_NEOX
from megallm.convert.families.llama import GEMMA, LLAMA, MISTRAL, QWEN2, QWEN3
from megallm.convert.family import Family

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GPT2, GPT_NEOX)
"""Where several can hold a model of ours, the first one is taken."""
