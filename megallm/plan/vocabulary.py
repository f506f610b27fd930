"""Sizes of vocabularies that a plan takes for granted where no file tells them."""

from __future__ import annotations

USUAL_SIZES = {
    "GPT2BPETokenizer": 50257,
    "Llama2Tokenizer": 32000,
    "BertWordPieceLowerCase": 30522,
    "BertWordPieceCase": 28996,
}
"""Of the tokenizers that nearly always come with the same files."""
