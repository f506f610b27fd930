"""Documents of every kind of file: read whole, gone on with from any place, cut into parts; and their texts."""

import gzip
import json
import lzma
import random
import sys
import tempfile
import tracemalloc
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.data.text import compression, json_values, lines, shards
from megallm.data.text.documents import read_documents, texts_of
from megallm.data.text.raw import BadDocument, Position, RawDocument
from megallm.data.text.shards import cut

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
RECORDS = [{"text": f"Document {number}\nsays „{'é好🦊' * number}“.", "n": number} for number in range(7)]
TEXTS = [record["text"] for record in RECORDS]
BOM = b"\xef\xbb\xbf"


def lines_of(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


FORMS = {
    "lines.jsonl": lines_of(RECORDS),
    "ended_by_crlf.jsonl": lines_of(RECORDS).replace(b"\n", b"\r\n"),
    "without_last_end.jsonl": lines_of(RECORDS)[:-1],
    "after_a_mark.jsonl": BOM + lines_of(RECORDS),
    "escaped.jsonl": b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS),
    "lines.json": b"\n \n".replace(b"\n \n", b"") + lines_of(RECORDS),
    "array.json": json.dumps(RECORDS).encode(),
    "pretty_array.json": BOM + json.dumps(RECORDS, indent=2, ensure_ascii=False).encode() + b"\n",
    "pretty_objects.json": b"\n".join(json.dumps(record, indent=2).encode() for record in RECORDS),
    "array_of_quotes.json": b'[{"text": "\\"[{\\\\"} , {"text" : "}\\\\\\\\\\""},\n{"text": ","}]',
}


def contents(path, **arguments):
    return [text for document in read_documents([path], **arguments) for [text] in texts_of(document, ["text"])]


def write_parquet(path, records, **arguments):
    parquet.write_table(pyarrow.Table.from_pylist(records), path, **arguments)


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_in_every_packing(tmp_path, name, ending):
    path = tmp_path / (name + ending)
    path.write_bytes(PACK[ending](FORMS[name]))
    expected = ['"[{\\', '}\\\\"', ","] if name == "array_of_quotes.json" else TEXTS
    assert contents(path) == expected


@pytest.mark.parametrize("ending", PACK)
def test_a_text_file_is_one_document(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACK[ending](BOM + "näive\r\n\n{".encode()))
    [document] = read_documents([path])
    assert texts_of(document, ["x", "y"]) == [["näive\r\n\n{"]] * 2
    assert (document.place, document.next) == (str(path), Position(1, 0, 0))


@pytest.mark.parametrize("rows_per_group", [1, 2, 100])
def test_rows_of_parquet(tmp_path, rows_per_group):
    path = tmp_path / "a.parquet"
    records = [{**record, "more": [record["text"], "x"]} for record in RECORDS]
    write_parquet(path, records, row_group_size=rows_per_group)
    documents = list(read_documents([path], keys=["more", "text"]))
    assert [texts_of(document, ["text", "more"]) for document in documents] == [[[t], [t, "x"]] for t in TEXTS]
    assert documents[2].place == f"{path}, row 3"
    # Without keys every column that holds text.
    assert contents(path) == TEXTS
    with pytest.raises(BadDocument, match=r"no key 'n'; its keys are 'text', 'more'"):
        texts_of(next(read_documents([path])), ["n"])


def test_mistakes_in_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [*RECORDS, {"text": None, "n": 1}])
    with pytest.raises(ValueError, match=r"no column 'words'; its columns are 'text', 'n'"):
        list(read_documents([path], keys=["words"]))
    with pytest.raises(ValueError, match=r"the column 'n' holds int64, not texts"):
        list(read_documents([path], keys=["n"]))
    with pytest.raises(BadDocument, match=r"a.parquet, row 8: under 'text' stands a JSON null") as caught:
        contents(path)
    assert caught.value.kind == "not_text"
    with pytest.raises(ValueError, match="has 8 rows, yet reading should go on at row 9"):
        list(read_documents([path], Position(0, 9, 9)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"a.parquet cannot be read beyond row 0"):
        list(read_documents([path]))


def test_a_parquet_text_that_is_no_utf8_is_one_bad_row(tmp_path):
    path = tmp_path / "a.parquet"
    texts = pyarrow.array([b"good", b"ba\xffd", b"fine"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), path)
    first, bad, last = read_documents([path])
    assert (texts_of(first, ["text"]), texts_of(last, ["text"])) == ([["good"]], [["fine"]])
    with pytest.raises(BadDocument, match=r"row 2: byte 3 of a text \(0xff\) is no UTF-8"):
        texts_of(bad, ["text"])


def bad_kinds(path, **arguments):
    kinds = []
    for document in read_documents([path], **arguments):
        try:
            texts_of(document, ["text"])
            kinds.append("")
        except BadDocument as error:
            named = str(error).startswith(document.place + ": ")
            kinds.append(error.kind if named else str(error))
    return kinds


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", "blank", "the line is blank"),
        (b" \t\r", "blank", "the line is blank"),
        (b'{"text": "a"', "no_json", "no JSON: .* at character 13"),
        (b'{"text": "a', "no_json", "no JSON: Unterminated string starting at character 10 of"),
        (b'{"text": "a"} x', "no_json", "no JSON: Extra data at character 15"),
        (b"[" * 200_000, "no_json", "nested too deep"),
        (b'{"n": ' + b"1" * 5000 + b"}", "no_json", "no JSON that can be read: Exceeds the limit"),
        (b'["a"]', "no_object", "a JSON list stands where an object must"),
        (b'{"title": "a"}', "missing_key", r"no key 'text'; its keys are 'title' \(--json-keys chooses\)"),
        (b'{"text": "a", "text": "a"}', "repeated_key", "'text' stands there more than once"),
        (b'{"text": NaN}', "not_text", r"a JSON number that is none \(nan\)"),
        (b'{"text": -Infinity}', "not_text", r"a JSON number that is none \(-inf\)"),
        (b'{"text": true}', "not_text", "a JSON truth value"),
        (b'{"text": {"a": 1}}', "not_text", "a JSON object"),
        (b'{"text": ["a", 1]}', "not_text", "in the list under 'text' stands a JSON number"),
        (b'{"text": "a\\uD800"}', "not_text", r"half a character, \\ud800"),
        (b'{"text": "\\ud83e\\udd8a \\udc01"}', "not_text", r"half a character, \\udc01"),
        (b'{"text": "a\xe9"}', "no_utf8", r"byte 12 \(0xe9\) is no UTF-8"),
        (b'{"text": "' + b"a" * 300_000 + b'"}', "too_large", r"the document has 300,012 bytes, the limit is 250,000"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_where(tmp_path, content, kind, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + content + b'\n{"text": "fine"}\n')
    assert bad_kinds(path, max_document_bytes=250_000) == ["", kind, ""]
    bad = list(read_documents([path], max_document_bytes=250_000))[1]
    assert bad.is_blank == (kind == "blank")
    with pytest.raises(BadDocument, match=rf"^{path}, line 2: .*{message}.*\.$"):
        texts_of(bad, ["text"])


@pytest.mark.parametrize(
    "content",
    [
        b'{"n": NaN, "text": "a"}',
        b'{"n": 1, "n": 2, "text": "a", "more": {"text": 1, "text": 2}}',
        b'{"text": "a", "n": "\\ud800"}',
        b'{"text": ["a"]}',
    ],
)
def test_what_stands_under_other_keys_does_not_matter(content):
    assert texts_of(RawDocument("a", 1, content, 0, 0, 0, 0), ["text"]) == [["a"]]


def test_a_pair_of_escapes_is_a_whole_character():
    assert texts_of(RawDocument("a", 1, b'{"text": "\\ud83e\\udd8a"}', 0, 0, 0, 0), ["text"]) == [["🦊"]]


@pytest.mark.parametrize(
    ("content", "kinds"),
    [
        (b"[]", []),
        (b" [ ] ", []),
        (b'[{"text": "a"}, ]', [""]),
        (b'[{"text": "a"},, {"text": "b"}]', ["", "no_json", ""]),
        (b'[{"text": "a"} {"text": "b"}]', ["no_json"]),
        (b'[1, "a", null, {"text": "b"}]', ["no_object"] * 3 + [""]),
        (b'[{"text": "a"}', ["", "no_json"]),
        (b'[{"text": "a"}, {"tex', ["", "no_json", "no_json"]),
        (b'[{"text": "a"}] []', ["", "no_json"]),
        (b'{\n"text": "a"}\n}\n{"text": "b"} x\n{\n"text": "c"}', ["", "no_json", "", "no_json", ""]),
        (b'{"text": "a\n{"text": "b"}\n', ["no_json", ""]),
        (b"", []),
        (b"\n", ["blank"]),
        (b"x", ["no_json"]),
    ],
)
def test_broken_json_files(tmp_path, content, kinds):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert bad_kinds(path) == kinds
    check_every_place([path])


def test_long_documents_of_every_form_are_counted_out(tmp_path):
    long = [{"text": "a"}, {"text": "b" * 5000}, {"text": "c"}]
    for name, content in {
        "a.jsonl": lines_of(long),
        "b.json": json.dumps(long).encode(),
        "c.json": b"\n".join(json.dumps(record, indent=1).encode() for record in long),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert bad_kinds(tmp_path / name, max_document_bytes=100) == ["", "too_large", ""]
    write_parquet(tmp_path / "d.parquet", long)
    assert bad_kinds(tmp_path / "d.parquet", max_document_bytes=100) == ["", "too_large", ""]
    (tmp_path / "e.txt").write_bytes(b"x" * 101)
    assert bad_kinds(tmp_path / "e.txt", max_document_bytes=100) == ["too_large"]
    (tmp_path / "f.txt").write_bytes(b"\n ")
    assert bad_kinds(tmp_path / "f.txt") == ["empty"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz"])
def test_a_huge_document_is_never_held(tmp_path, name):
    """64 MB in one document with a limit of 1 MB need 8 MB."""
    path = tmp_path / name
    opening = b'[{"text": "' if name == "a.json" else b'{"text": "'
    with gzip.open(path, "wb", 1) if name.endswith("gz") else open(path, "wb") as file:
        file.write(opening)
        for _ in range(64):
            file.write(b"x" * 10**6)
        file.write(b'"}]' if name == "a.json" else b'"}\n')
    tracemalloc.start()
    kinds = bad_kinds(path, max_document_bytes=10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kinds == ["too_large"]
    assert peak < 8 * 10**6


def check_every_place(paths, **arguments):
    """Reading on from the `next` of each document gives the rest, and reading up to there what came before."""
    whole = list(read_documents(paths, **arguments))
    plain = [document._replace(problem=None) for document in whole]
    for count, document in enumerate(whole, start=1):
        after = list(read_documents(paths, document.next, **arguments))
        before = list(read_documents(paths, end=document.next, **arguments))
        assert [each._replace(problem=None) for each in before + after] == plain
        assert len(before) == count
    return whole


@pytest.mark.parametrize("ending", PACK)
def test_reading_goes_on_from_every_place(tmp_path, ending):
    paths = []
    for name, content in {**FORMS, "text.txt": b"whole", "empty.txt": b"", "empty.jsonl": b""}.items():
        paths.append(tmp_path / (name + ending))
        paths[-1].write_bytes(PACK[ending](content))
    paths.insert(4, tmp_path / "rows.parquet")
    write_parquet(paths[4], RECORDS, row_group_size=3)
    assert len(check_every_place(paths)) == 10 * len(TEXTS) + 3 + 2


def test_a_file_that_became_shorter_is_noticed(tmp_path):
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(b'{"text": "a"}\n'))
        with pytest.raises(ValueError, match="has 14 bytes, yet reading should go on at byte 20"):
            list(read_documents([tmp_path / name], Position(0, 20, 1)))


def test_the_standard_input_is_lines(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(FORMS["after_a_mark.jsonl"] + b"x\n")
    with open(path) as file:
        monkeypatch.setattr(sys, "stdin", file)
        documents = list(read_documents([Path("-")]))
    assert [texts_of(document, ["text"])[0][0] for document in documents[:-1]] == TEXTS
    assert documents[-1].place == "standard input, line 8"
    with open(path) as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert list(read_documents([Path("-")], documents[2].next)) == documents[3:]


LINE = st.one_of(
    st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")),
    st.integers(0, 9).map(lambda number: b'{"text": "%d"}' % number),
    st.integers(0, 60).map(lambda number: b"x" * number),
)
FILE = st.tuples(
    st.sampled_from(["plain.jsonl", "packed.jsonl.gz", "array.json", "text.txt"]),
    st.lists(LINE, max_size=8),
    st.sampled_from([b"", b"\n"]),
    st.sampled_from([b"", BOM]),
)


def write_files(folder, files):
    paths = []
    for number, (name, parts, ending, mark) in enumerate(files):
        path = Path(folder, f"{number}{name}")
        content = mark + b"\n".join(parts) + (ending if parts else b"")
        if name == "array.json":
            content = json.dumps([line.decode("latin-1") for line in parts], indent=1).encode()
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        paths.append(path)
    return paths


@contextmanager
def blocks_of(size):
    """Files are read in blocks of so many bytes: the seams fall everywhere."""
    with ExitStack() as stack:
        for module in (compression, json_values, lines):
            stack.enter_context(mock.patch.object(module, "READ_BLOCK", size))
        stack.enter_context(mock.patch.object(shards, "BLOCK", size))
        yield


BLOCK = st.sampled_from([1, 2, 3, 5, 8, 13, 2**20])


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(FILE, min_size=1, max_size=3), st.sampled_from([7, 1000]), BLOCK)
def test_any_files_are_gone_on_with_from_any_place(files, limit, block):
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(folder, files)
        with blocks_of(block):
            documents = check_every_place(paths, max_document_bytes=limit)
        whole = read_documents(paths, max_document_bytes=limit)
        assert [each._replace(problem=None) for each in documents] == [each._replace(problem=None) for each in whole]


@settings(max_examples=200, deadline=None)
@given(st.lists(FILE, min_size=1, max_size=4), st.integers(1, 9), BLOCK)
def test_all_parts_are_all_documents_once_and_in_order(files, count, block):
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(folder, files)
        with blocks_of(block):
            parts = [list(read_documents(paths, *cut(paths, number, count))) for number in range(count)]
        assert [(each.content, each.start) for part in parts for each in part] == [
            (each.content, each.start) for each in read_documents(paths)
        ]


JSON = st.recursive(
    st.none() | st.booleans() | st.text('a"\\[]{},: \n', max_size=6) | st.integers(0, 9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('k"\\}', max_size=2), inner, max_size=2),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(st.dictionaries(st.text('k"\\]', max_size=3), JSON, min_size=1, max_size=3), max_size=4), BLOCK)
def test_json_of_any_shape_is_parted_as_a_parser_does(records, block):
    with tempfile.TemporaryDirectory() as folder, blocks_of(block):
        for name, content in {
            "a.json": json.dumps(records),
            "b.json": json.dumps(records, indent=1),
            "c.json": "\n".join(json.dumps(record, indent=1) for record in records),
            "d.json": "\n".join(json.dumps(record) for record in records),
        }.items():
            path = Path(folder, name)
            path.write_text(content)
            assert [json.loads(document.content) for document in read_documents([path])] == records


def test_lines_are_cut_alike_whatever_the_blocks(tmp_path):
    """A long line, over many blocks, between short ones."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"ab\n" + b"c" * 50 + b"\nd\n\n" + b"e" * 21)
    for block in (1, 2, 7, 1000):
        with blocks_of(block):
            documents = list(read_documents([path], max_document_bytes=40))
        assert [(each.line, each.content, each.start) for each in documents] == [
            (1, b"ab", 0),
            (2, b"", 3),
            (3, b"d", 54),
            (4, b"", 56),
            (5, b"e" * 21, 57),
        ]
        assert "has 50 bytes, the limit is 40" in str(documents[1].problem)


def test_parts_are_about_equal_and_whole_files_lie_where_they_start(tmp_path):
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_bytes(b'{"text": "a"}\n' * 1000)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    parts = [list(read_documents([plain, packed], *cut([plain, packed], number, 4))) for number in range(4)]
    assert max(len(part) for part in parts[:3]) - min(len(part) for part in parts[:3]) <= 1
    assert len(parts[3]) == 2000 - sum(len(part) for part in parts[:3]) >= 1000
    # Nobody has counted the lines before a cut: the place is the byte.
    assert parts[1][0].place == f"{plain}, line at byte {parts[1][0].start}"
    assert parts[3][-1].place == f"{packed}, line 1000"


def test_a_line_that_starts_at_the_boundary_is_in_the_later_part(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"123456789\n" * 10)
    assert cut([path], 0, 2) == (Position(0, 0, 0), Position(0, 50, -1))
    assert cut([path], 1, 2) == (Position(0, 50, -1), None)
    assert cut([path], 1, 3) == (Position(0, 40, -1), Position(0, 70, -1))


def test_mistakes_with_parts(tmp_path):
    with pytest.raises(ValueError, match="no part 3 of 3; the parts are 0 to 2"):
        cut([tmp_path / "a.jsonl"], 3, 3)
    with pytest.raises(ValueError, match="standard input cannot be cut"):
        cut([Path("-")], 0, 2)
    with pytest.raises(ValueError, match=r"a.jsonl cannot be read: No such file"):
        cut([tmp_path / "a.jsonl"], 0, 2)


def spoil(whole, generator):
    """A copy with a bit turned, an end cut off, or some bytes replaced by others."""
    content = bytearray(whole)
    place = generator.randrange(len(content))
    match generator.randrange(3):
        case 0:
            content[place] ^= 1 << generator.randrange(8)
        case 1:
            del content[place:]
        case _:
            content[place : place + generator.randrange(20)] = generator.randbytes(generator.randrange(20))
    return bytes(content)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"])
def test_spoilt_files_end_in_a_sentence_or_are_read_as_they_were(tmp_path, name):
    """Parquet has no checksum by default: what it gives then may differ, its errors may not."""
    path = tmp_path / name
    records = [{"text": f"document {number}"} for number in range(300)]
    if name == "a.parquet":
        write_parquet(path, records, row_group_size=50)
        whole = path.read_bytes()
    elif name.endswith(".zst"):
        whole = zstandard.ZstdCompressor(write_checksum=True).compress(lines_of(records))
    else:
        whole = PACK[path.suffix](lines_of(records))
    generator = random.Random(17)
    refused = 0
    for _ in range(200):
        path.write_bytes(spoil(whole, generator))
        try:
            documents = list(read_documents([path]))
        except ValueError as error:
            refused += 1
            assert type(error) is ValueError and name in str(error) and str(error).endswith(".")  # noqa: PT017
            continue
        if name != "a.parquet":
            assert b"".join(document.content + b"\n" for document in documents) == lines_of(records)
    assert refused > 100
