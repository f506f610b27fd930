"""How much memory a job needs at most, by what was measured."""

from megallm.data.prepare.pieces import PIECE_BYTES
from megallm.data.prepare.pool import PIECES_PER_WORKER
from megallm.data.tokenizer.base import Tokenizer
from megallm.data.tokenizer.fast import LARGEST_GROWTH, FastTokenizer

# Interpreter, libraries and a tokenizer.
PROCESS_BYTES = 200 * 2**20
# Bytes of memory for a byte of the longest text, measured (English, resident size above that of the process alone).
FACTORS = {"tokenizers": 140, "sentencepiece": 40}
FAST_FACTOR = 10
OTHER_FACTOR = 140
# Tokens as they wait to be written, 4 bytes each and a byte of text each at worst.
WAITING_FACTOR = 4


def memory_bound(tokenizer: Tokenizer, workers: int, longest_document: int) -> int:
    """Bytes of memory of all processes together, where every worker holds a document of the longest kind at once."""
    text = max(longest_document, PIECE_BYTES)
    if isinstance(tokenizer, FastTokenizer):
        each = PROCESS_BYTES + LARGEST_GROWTH + FAST_FACTOR * text
    else:
        each = PROCESS_BYTES + FACTORS.get(tokenizer.library.split(" ")[0], OTHER_FACTOR) * text
    if workers == 1:
        return each
    return PROCESS_BYTES + workers * (each + PIECES_PER_WORKER * WAITING_FACTOR * text)


def state_memory(tokenizer: Tokenizer, workers: int, max_document_bytes: int) -> str:
    """One sentence for the start of a job."""
    most, usual = (memory_bound(tokenizer, workers, size) / 1e9 for size in (max_document_bytes, PIECE_BYTES))
    return (
        f"{workers} worker{'s' if workers > 1 else ''}; memory at most about {usual:.1f} GB with documents up to 1 MiB "
        f"and {most:.1f} GB with the longest that are taken ({max_document_bytes:,} bytes)."
    )
