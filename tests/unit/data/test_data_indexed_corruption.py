"""More than two thousand broken datasets, each refused by a sentence that names file, field and byte."""

import struct
from dataclasses import dataclass

import pytest

from megallm.data.indexed import index
from megallm.data.indexed.format import DTYPES
from megallm.data.indexed.reader import IndexedDataset

LENGTHS = [4, 3, 0, 6, 2, 4, 1, 9, 5]
DOCUMENTS = [0, 1, 1, 4, 6, 6, 9]
OFFSETS = [2 * sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
BIN_SIZE = 2 * sum(LENGTHS)
LENGTHS_AT = 34
OFFSETS_AT = LENGTHS_AT + 4 * len(LENGTHS)
DOCUMENTS_AT = OFFSETS_AT + 8 * len(LENGTHS)
UINT16 = 8


@dataclass(frozen=True)
class Case:
    """Content of an index, size of the .bin beside it, ending of the file that is to be named, start of the reason."""

    index: bytes
    bin_size: int
    file: str
    reason: str


def index_bytes(code=UINT16, lengths=LENGTHS, offsets=OFFSETS, documents=DOCUMENTS, counts=None):
    sequences, entries = counts or (len(lengths), len(documents))
    return (
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, code, sequences, entries)
        + struct.pack(f"<{len(lengths)}i{len(offsets)}q{len(documents)}q", *lengths, *offsets, *documents)
    )


def flipped(content, byte, bit):
    changed = bytearray(content)
    changed[byte] ^= 1 << bit
    return bytes(changed)


def entry(content, at, form):
    return struct.unpack_from(form, content, at)[0]


def header_cases():
    whole = index_bytes()
    for size in range(len(whole)):
        yield Case(whole[:size], BIN_SIZE, ".idx", f"the size of the file is {size} bytes, but must be ")
    for more in range(1, 65):
        size = f"the size of the file is {len(whole) + more} bytes, but must be {len(whole)}"
        yield Case(whole + bytes(more), BIN_SIZE, ".idx", size)
    for position in range(34):
        for bit in range(8):
            content = flipped(whole, position, bit)
            if position < 9:
                yield Case(content, BIN_SIZE, ".idx", "the magic (byte 0) is ")
            elif position < 17:
                yield Case(
                    content, BIN_SIZE, ".idx", f"the version (byte 9) is {entry(content, 9, '<Q')}, but must be 1"
                )
            elif position > 17:
                yield Case(content, BIN_SIZE, ".idx", f"the size of the file is {len(whole)} bytes, but must be ")
    for code in range(256):
        if code in DTYPES and DTYPES[code].itemsize == 2:
            continue
        reason = f"the dtype code (byte 17) is {code}"
        if code in DTYPES and DTYPES[code].kind != "f":
            reason = f"the byte offset of sequence 1 (byte {OFFSETS_AT + 8}) is 8, but must be "
        yield Case(index_bytes(code), BIN_SIZE, ".idx", reason)
    yield Case(
        index_bytes(counts=(len(LENGTHS), 0)), BIN_SIZE, ".idx", "the length of the document array (byte 26) is 0"
    )
    # 12 bytes of each of 2 sequences are as long as 8 of each of 3 document entries: the size of the file still fits.
    for change in (-4, -3, -2, -1, 1, 2):
        counts = (len(LENGTHS) + 2 * change, len(DOCUMENTS) - 3 * change)
        yield Case(index_bytes(counts=counts), BIN_SIZE, ".idx", "the ")


def entry_cases():
    whole = index_bytes()
    for number in range(len(LENGTHS)):
        at = LENGTHS_AT + 4 * number
        for bit in range(32):
            content = flipped(whole, at + bit // 8, bit % 8)
            value = entry(content, at, "<i")
            if value < 0:
                reason, file = f"the length of sequence {number} (byte {at}) is {value}, but must be 0", ".idx"
            elif number + 1 < len(LENGTHS):
                next_at = OFFSETS_AT + 8 * (number + 1)
                reason, file = f"the byte offset of sequence {number + 1} (byte {next_at}) is ", ".idx"
            else:
                reason, file = f"the size of the file is {BIN_SIZE} bytes, but must be ", ".bin"
            yield Case(content, BIN_SIZE, file, reason)
    for number, offset in enumerate(OFFSETS):
        at = OFFSETS_AT + 8 * number
        for bit in range(64):
            content = flipped(whole, at + bit // 8, bit % 8)
            reason = (
                f"the byte offset of sequence {number} (byte {at}) is {entry(content, at, '<q')}, but must be {offset}"
            )
            yield Case(content, BIN_SIZE, ".idx", reason)
    for number in range(len(DOCUMENTS)):
        at = DOCUMENTS_AT + 8 * number
        for bit in range(64):
            content = flipped(whole, at + bit // 8, bit % 8)
            values = struct.unpack_from(f"<{len(DOCUMENTS)}q", content, DOCUMENTS_AT)
            if values[0] == 0 and values[-1] == len(LENGTHS) and list(values) == sorted(values):
                continue  # such documents are as good as the others
            yield Case(content, BIN_SIZE, ".idx", document_reason(values))


def document_reason(values):
    if values[0] != 0:
        return f"entry 0 of the document array (byte {DOCUMENTS_AT}) is {values[0]}, but must be 0"
    for number in range(1, len(values)):
        value, before = values[number], values[number - 1]
        if value < before:
            at = DOCUMENTS_AT + 8 * number
            return f"entry {number} of the document array (byte {at}) is {value}, but must be {before}"
    at = DOCUMENTS_AT + 8 * (len(values) - 1)
    return f"the last entry of the document array (byte {at}) is {values[-1]}, but must be {len(LENGTHS)}"


def swap_cases():
    for first in range(len(LENGTHS)):
        for second in range(first):
            for name in ("lengths", "offsets"):
                values = list({"lengths": LENGTHS, "offsets": OFFSETS}[name])
                if values[first] == values[second]:
                    continue
                values[first], values[second] = values[second], values[first]
                yield Case(index_bytes(**{name: values}), BIN_SIZE, ".idx", "the byte offset of sequence ")
    for first in range(len(DOCUMENTS)):
        for second in range(first):
            values = list(DOCUMENTS)
            values[first], values[second] = values[second], values[first]
            if values != DOCUMENTS:
                yield Case(index_bytes(documents=values), BIN_SIZE, ".idx", document_reason(values))


def bin_cases():
    for size in range(BIN_SIZE + 65):
        if size != BIN_SIZE:
            yield Case(index_bytes(), size, ".bin", f"the size of the file is {size} bytes, but must be {BIN_SIZE}")


CASES = sorted({*header_cases(), *entry_cases(), *swap_cases(), *bin_cases()}, key=repr)


def test_the_cases_are_many_and_differ_in_content():
    assert len({(case.index, case.bin_size) for case in CASES}) == len(CASES) >= 2000


def test_the_dataset_they_are_made_from_is_sound(tmp_path):
    (tmp_path / "x.idx").write_bytes(index_bytes())
    (tmp_path / "x.bin").write_bytes(bytes(BIN_SIZE))
    assert IndexedDataset(tmp_path / "x").document_indices.tolist() == DOCUMENTS


@pytest.mark.slow
@pytest.mark.parametrize(("mmap", "chunk"), [(True, 3), (False, 1 << 20)])
def test_every_case_is_refused_by_name(tmp_path, monkeypatch, mmap, chunk):
    """Whether the index is checked in one piece, or in chunks of which faults lie on the borders."""
    monkeypatch.setattr(index, "CHECK_CHUNK", chunk)
    prefix = tmp_path / "x"
    wrong = []
    for case in CASES:
        (tmp_path / "x.idx").write_bytes(case.index)
        (tmp_path / "x.bin").write_bytes(bytes(case.bin_size))
        try:
            IndexedDataset(prefix, mmap=mmap)
            wrong.append((case, "accepted"))
        except ValueError as error:
            if not str(error).startswith(f"{prefix}{case.file}: {case.reason}"):
                wrong.append((case, str(error)))
    assert not wrong, f"{len(wrong)} of {len(CASES)}, the first: {wrong[0]}"
