"""Random numbers that do not depend on the layout.

Every number is a function of (seed, step, name, row, column): the counter-based generator Philox 4x32-10 (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a counter made of the global position of an element
into four 32-bit words. A rank makes the numbers of the slice it owns and no others, in any order, and gets the
integers that any other layout would get there.

Counter words: column // 4, row (64 bits), step. Key: 64 bits derived from the seed and the name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def stream_key(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Key of the stream `name` under `seed`: int64 [2], each holding 32 bits.

    It is a tensor so that compiled code and captured graphs see no constant that changes between runs.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    words = [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")]
    return torch.tensor(words, dtype=torch.int64, device=device)


def philox(
    key: torch.Tensor, counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> list[torch.Tensor]:
    """Philox 4x32-10. All arguments and results are int64 tensors that hold unsigned 32-bit words.

    The product of two words may pass 2^63 and wrap; the masks take the same 64 bits apart either way.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key[0], key[1]
    for _ in range(10):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def random_words(
    key: torch.Tensor, step: torch.Tensor | int, rows: torch.Tensor, start: int, num_columns: int
) -> torch.Tensor:
    """Words for the elements (row, start .. start + num_columns) of a global matrix.

    `rows` is int64 of any shape, the global row numbers; `step` an integer or a 0-dim int64 tensor. Returns int64
    [*rows.shape, num_columns], each element uniform in 0 .. 2^32 - 1.
    """
    first_block = start // 4
    num_blocks = (start + num_columns + 3) // 4 - first_block
    blocks = torch.arange(first_block, first_block + num_blocks, device=rows.device)
    row = rows.unsqueeze(-1)
    shape = (*rows.shape, num_blocks)
    counter = (
        blocks.expand(shape),
        (row & _MASK).expand(shape),
        ((row >> 32) & _MASK).expand(shape),
        torch.as_tensor(step, device=rows.device).expand(shape),
    )
    words = torch.stack(philox(key, counter), dim=-1)
    # [*rows, blocks, 4] -> [*rows, 4 blocks], then the part asked for
    words = words.reshape(*rows.shape, num_blocks * 4)
    return words[..., start - 4 * first_block : start - 4 * first_block + num_columns]


def normal_box(
    seed: int, name: str, global_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """The box [offset, offset + shape) of a standard normal tensor of `global_shape`: float32.

    The tensor is read as a matrix whose rows are all dims but the last. Box-Muller on pairs of words, in float64 and
    rounded to float32 once: every layout then gets the same bits.
    """
    return _fill_box(_normal_rows, stream_key(seed, name), global_shape, offset, shape)


def uniform_box(
    seed: int, name: str, global_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]
) -> torch.Tensor:
    """The box [offset, offset + shape) of a tensor of `global_shape` that is uniform from -1 to 1: float32."""
    return _fill_box(_uniform_rows, stream_key(seed, name), global_shape, offset, shape)


def rows_of_box(global_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers of the rows of the box [offset, offset + shape): int64 [rows].

    A tensor of `global_shape` is read as a matrix whose rows are all dims but the last.
    """
    rows = torch.zeros((), dtype=torch.int64)
    for size, begin, length in zip(global_shape[:-1], offset[:-1], shape[:-1], strict=True):
        rows = rows.unsqueeze(-1) * size + torch.arange(begin, begin + length)
    return rows.reshape(-1)


def _fill_box(
    rows_of: Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor],
    key: torch.Tensor,
    global_shape: tuple[int, ...],
    offset: tuple[int, ...],
    shape: tuple[int, ...],
) -> torch.Tensor:
    """The box [offset, offset + shape) of a tensor of `global_shape`: float32.

    `rows_of` makes its numbers, from (key, numbers of the rows, first column, number of columns).
    """
    result = torch.empty(shape, dtype=torch.float32)
    if 0 in shape:
        return result
    rows, matrix = rows_of_box(global_shape, offset, shape), result.view(-1, shape[-1])
    # A million elements at a time bounds the memory of the int64 intermediates.
    rows_at_once = max(1, (1 << 20) // shape[-1])
    for begin in range(0, len(rows), rows_at_once):
        part = rows[begin : begin + rows_at_once]
        matrix[begin : begin + rows_at_once] = rows_of(key, part, offset[-1], shape[-1])
    return result


def _uniform_rows(key: torch.Tensor, rows: torch.Tensor, start: int, num_columns: int) -> torch.Tensor:
    """The middles of 2^32 equal parts of [-1, 1], rounded to float32 once."""
    words = random_words(key, 0, rows, start, num_columns).double()
    return ((words + 0.5) / 2.0**31 - 1.0).float()


def _normal_rows(key: torch.Tensor, rows: torch.Tensor, start: int, num_columns: int) -> torch.Tensor:
    """Columns 2k and 2k+1 share the pair of words at 2k, 2k+1: cosine for the even one, sine for the odd."""
    first = start - start % 2
    last = start + num_columns + (start + num_columns) % 2
    words = random_words(key, 0, rows, first, last - first).double()
    # [rows, columns] -> [rows, columns / 2, 2]
    pairs = words.reshape(len(rows), -1, 2)
    # Words are moved to (0, 1): the logarithm of zero never occurs.
    radius = torch.sqrt(-2.0 * torch.log((pairs[..., 0] + 0.5) / 2.0**32))
    angle = (2.0 * math.pi / 2.0**32) * pairs[..., 1]
    normal = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return normal.reshape(len(rows), -1)[:, start - first : start - first + num_columns].float()


def keep_mask(
    key: torch.Tensor, step: torch.Tensor, rows: torch.Tensor, start: int, num_columns: int, drop: float
) -> torch.Tensor:
    """True where dropout keeps an element: bool [*rows.shape, num_columns], each kept with probability 1 - drop."""
    threshold = int(drop * 2.0**32)
    return random_words(key, step, rows, start, num_columns) >= threshold
