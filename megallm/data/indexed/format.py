"""The form of Megatron's `.bin`/`.idx` token files: what stands where, and in which types.

`<prefix>.bin` holds the token arrays back to back, without header or padding. `<prefix>.idx` is little-endian:

    9 bytes   magic "MMIDIDX\\0\\0"
    u64       version, 1
    u8        code of the token dtype
    u64       S, the number of sequences
    u64       D, the length of the document array: documents + 1
    int32[S]  tokens of each sequence
    int64[S]  byte offset of each sequence in the .bin file
    int64[D]  0, then the running count of sequences after each document; the last entry is S
"""

import os
import struct
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
# Vocabularies of this size and more are stored as int32; the limit lies below 2^16 because Megatron's does.
UINT16_VOCABULARY_LIMIT = 65500
# Entries looked at together while an index is checked: bounds the memory of the check, whatever the size of the index.
CHECK_CHUNK = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which Megatron stores tokens of a vocabulary: uint16 below 65,500 entries, int32 from there on."""
    return DTYPES[8] if vocab_size < UINT16_VOCABULARY_LIMIT else DTYPES[4]


def file_paths(path_prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The paths of the `.bin` and of the `.idx` file of a dataset."""
    prefix = os.fspath(path_prefix)
    return Path(prefix + ".bin"), Path(prefix + ".idx")


def dtype_code(dtype: np.dtype) -> int:
    """The number that stands for a dtype in an index; only for dtypes that tokens are stored in."""
    codes = [code for code, known in DTYPES.items() if known == dtype and known.kind != "f"]
    assert codes, f"{dtype} is not a dtype that tokens are stored in"
    return codes[0]
