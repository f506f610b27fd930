"""A dataset with known indices, some texts, and the tools as modules: what the tests of the data share."""

import importlib.util
from pathlib import Path

from megallm.data.indexed.format import token_dtype
from megallm.data.indexed.reader import IndexedDataset
from megallm.data.indexed.writer import IndexedDatasetWriter

TOOLS = Path(__file__).parents[3] / "tools"
GOLDEN_DOCUMENTS = [[5, 6, 7, 0], [1, 2, 0], [9, 9, 9, 9, 9, 0], [3, 0], [4, 4, 4, 0]]
TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n" * 3,
    "def f(x):\n    return x + 1\n",
    "naïve café, 你好, 世界 🦊 \t tabs\r\nand ends",
    "pack my box with five dozen liquor jugs " * 4,
]


def write_dataset(prefix, documents, vocab_size=100):
    """An indexed dataset of one sequence a document."""
    with IndexedDatasetWriter(prefix, token_dtype(vocab_size)) as writer:
        for document in documents:
            writer.add_document(document)
    return IndexedDataset(prefix)


def load_tool(name):
    """A file of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
