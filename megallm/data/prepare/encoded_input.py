"""The input encoded: in this process, or in several."""

from collections.abc import Iterator
from typing import Any

from megallm.data.prepare.encoding import Encoded, Encoder, EncodeSettings
from megallm.data.prepare.pieces import Input, Piece, light_pieces, whole_pieces
from megallm.data.prepare.pool import Pool
from megallm.data.text.raw import Position


class EncodedInput:
    """Pieces of the input and what became of them, from this process or from several.

    Used as a context manager: leaving it ends the processes. Memory of each process: the tokenizer, a piece of 1 MiB of
    text (or one document, where that is longer) in the forms of its work; and here three pieces' tokens for each.
    """

    def __init__(self, encoder: Encoder, settings: EncodeSettings, source: Input, workers: int) -> None:
        self._encoder, self._source = encoder, source
        self._pool = Pool(settings, source, workers) if workers > 1 else None

    def __enter__(self) -> "EncodedInput":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            self._pool.__exit__(*error)

    def wait_until_ready(self) -> None:
        """Return when every process has its tokenizer."""
        if self._pool is not None:
            self._pool.wait_until_ready()

    def read(self, start: Position) -> Iterator[tuple[Piece, Encoded]]:
        """Everything from `start` on, in order."""
        if self._pool is not None:
            yield from self._pool.encode_all(light_pieces(self._source, start))
            return
        for piece in whole_pieces(self._source, start):
            assert piece.documents is not None, "pieces that are read here hold their documents"
            yield piece, self._encoder.encode(piece.documents)
