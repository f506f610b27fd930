"""Lists of data: Megatron's four ways to give them, and what users get wrong."""

import json

import pytest

from megallm.config.data_sources import DataSources, read_sources

WHOLE = (0.0, 1.0)


def lists(sources: DataSources) -> list[object]:
    """Prefixes and weights of each split."""
    return [source and (source.prefixes, source.weights) for source in read_sources(sources)]


def test_one_list_for_all_splits():
    found = read_sources(DataSources(data_path=("3", "a", "7", "b"), split="90,10"))
    assert [source and source.bounds for source in found] == [(0.0, 0.9), (0.9, 1.0), None]
    assert [source and str(source) for source in found] == ["3.0 a 7.0 b", "3.0 a 7.0 b", None]


def test_a_list_in_a_file(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("0.3 a\n0.7\tb\n\n")
    assert lists(DataSources(data_args_path=str(file), split="1")) == [(["a", "b"], [0.3, 0.7]), None, None]


def test_lists_of_each_split():
    sources = DataSources(train_data_path=("1", "a", "2", "b"), valid_data_path=("5", "c"), test_data_path=("d", "e"))
    # A single dataset's weight means nothing here, and it is no blend.
    assert lists(sources) == [(["a", "b"], [1.0, 2.0]), (["c"], None), (["d", "e"], None)]
    assert [source.bounds for source in read_sources(sources) if source] == [WHOLE] * 3
    assert [source.flag for source in read_sources(sources) if source] == [
        "--train-data-path",
        "--valid-data-path",
        "--test-data-path",
    ]


def test_lists_of_each_split_in_a_file(tmp_path):
    file = tmp_path / "lists.json"
    file.write_text(json.dumps({"train": [1, "a", 2.5, "b"], "valid": "c d", "test": None}))
    assert lists(DataSources(per_split_data_args_path=str(file))) == [
        (["a", "b"], [1.0, 2.5]),
        (["c", "d"], None),
        None,
    ]
    file.write_text('{"train": ["a"]}')
    assert lists(DataSources(per_split_data_args_path=str(file))) == [(["a"], None), None, None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "lists.json is no JSON: "),
        ("[]", 'lists.json must hold one object with "train", "valid" and "test" alone'),
        ('{"train": ["a"], "validation": ["b"]}', 'one object with "train", "valid" and "test" alone'),
        ('{"train": {"a": 1}}', "'train' in .*lists.json must be a list"),
        ('{"train": [true, "a"]}', "'train' in .*lists.json must be a list"),
        ('{"train": ["a"], "valid": ["1", "a", "b", "c"]}', "lists.json, 'valid': Weights and prefixes do not alter"),
        ('{"train": ["a"], "valid": ["0", "a", "1", "c"]}', "lists.json, 'valid': The weight 0 is not a positive"),
        (b"\xff", "lists.json is no text in UTF-8"),
        (None, "lists.json cannot be read: No such file"),
    ],
)
def test_a_file_of_lists_that_is_wrong(tmp_path, content, message):
    file = tmp_path / "lists.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^--per-split-data-args-path.*{message}"):
        read_sources(DataSources(per_split_data_args_path=str(file)))


def test_a_list_in_a_file_that_is_wrong(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text(" \n")
    with pytest.raises(ValueError, match="--data-args-path: The prefix of one dataset at least is needed"):
        read_sources(DataSources(data_args_path=str(file)))
    with pytest.raises(ValueError, match=r"--data-args-path: /nowhere/list\.txt cannot be read"):
        read_sources(DataSources(data_args_path="/nowhere/list.txt"))


def test_one_way_is_used():
    with pytest.raises(ValueError, match="The data is named nowhere; one of --data-path"):
        read_sources(DataSources())
    with pytest.raises(ValueError, match="is named by --data-path and by --valid-data-path; one of"):
        read_sources(DataSources(data_path=("a",), valid_data_path=("b",)))
