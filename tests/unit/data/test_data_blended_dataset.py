"""Splits, sizes and blends: golden vectors, Megatron's arithmetic, and what users get wrong."""

import numpy as np
import pytest
from small_data import write_dataset

from megallm.config.data_sources import DataSources, parse_data_path, parse_split
from megallm.data.indexed.reader import IndexedDataset
from megallm.data.samples.blended import BlendedDataset, BuildOptions, build_run_data, samples_of_each, split_range
from megallm.data.samples.gpt import GPTDataset, GPTDatasetSettings


class Numbers:
    """A dataset of `size` samples that say where they come from."""

    def __init__(self, name, size):
        self._name, self._size = name, size

    def __len__(self):
        return self._size

    def __getitem__(self, index):
        return {"tokens": np.array([self._name, index])}

    def get_batch(self, indices):
        return {"tokens": np.array([[self._name, index] for index in indices])}


@pytest.fixture
def three(tmp_path):
    """Three datasets of 60, 30 and 90 documents of 5 tokens, which are the number of the dataset."""
    prefixes = []
    for name, size in enumerate([60, 30, 90]):
        prefixes.append(str(tmp_path / f"part{name}"))
        write_dataset(prefixes[-1], [[name] * 5] * size)
    return prefixes


def make(data_path, num_samples, split="1", **options):
    sources = DataSources(data_path=tuple(data_path), split=split)
    built = build_run_data(GPTDatasetSettings(sequence_length=4, **options), sources, num_samples)
    return built.train, built.valid.get(""), built.test


def test_golden_blends():
    blend = BlendedDataset([Numbers(0, 5), Numbers(1, 9)], [3, 7], 10)
    assert blend.dataset_index.tolist() == [1, 0, 1, 1, 0, 1, 1, 0, 1, 1]
    blend = BlendedDataset([Numbers(name, 6) for name in range(3)], [0.5, 0.3, 0.2], 12)
    assert blend.dataset_index.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1]
    blend = BlendedDataset([Numbers(0, 3), Numbers(1, 5), Numbers(2, 2)], None, None)
    assert blend.dataset_index.tolist() == [1, 0, 2, 1, 0, 1, 2, 1, 0, 1]


def test_items_are_the_datasets_samples():
    blend = BlendedDataset([Numbers(0, 5), Numbers(1, 9)], [3, 7], 10)
    seen = [tuple(blend[index]["tokens"].tolist()) for index in range(len(blend))]
    assert seen == [(1, 0), (0, 0), (1, 1), (1, 2), (0, 1), (1, 3), (1, 4), (0, 2), (1, 5), (1, 6)]
    assert [int(blend[index]["dataset_id"]) for index in range(10)] == [name for name, _ in seen]
    batch = blend.get_batch([7, 0, 1])
    assert batch["tokens"].tolist() == [[0, 2], [1, 0], [0, 0]]
    assert batch["dataset_id"].tolist() == [0, 1, 0]
    with pytest.raises(IndexError):
        blend[10]


def test_a_dataset_that_is_too_small():
    with pytest.raises(ValueError, match="Dataset 1 of the blend has 6 samples, but the blend draws 7"):
        BlendedDataset([Numbers(0, 5), Numbers(1, 6)], [3, 7], 10)


@pytest.mark.parametrize(
    ("data_path", "expected"),
    [
        (["a"], (["a"], None)),
        (["a", "b", "c"], (["a", "b", "c"], None)),
        (["a", "b"], (["a", "b"], None)),
        (["0.3", "a"], (["a"], [0.3])),
        (["3", "a", " 7", "b "], (["a", "b"], [3.0, 7.0])),
        (["./3"], (["./3"], None)),
    ],
)
def test_data_path(data_path, expected):
    assert parse_data_path(data_path) == expected


def test_data_path_mistakes():
    with pytest.raises(ValueError, match="'b' stands in the place of a weight"):
        parse_data_path(["3", "a", "b", "c"])
    with pytest.raises(ValueError, match="one dataset at least"):
        parse_data_path([])
    with pytest.raises(
        ValueError, match=r"In this list of 3 words the weights \(3, 7\) do not alternate with prefixes: .* as ./2024"
    ):
        parse_data_path(["3", "a", "7"])
    with pytest.raises(ValueError, match="The weight 0 is not a positive number"):
        parse_data_path(["3", "a", "0", "b"])


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("949,50,1", [(0.0, 0.949), (0.949, 0.999), (0.999, 1.0)]),
        ("969, 30, 1", [(0.0, 0.969), (0.969, 0.999), (0.999, 1.0)]),
        ("100,0,0", [(0.0, 1.0), None, None]),
        ("1", [(0.0, 1.0), None, None]),
        ("[0, .5, .5]", [None, (0.0, 0.5), (0.5, 1.0)]),
    ],
)
def test_split(split, expected):
    for found, wanted in zip(parse_split(split), expected, strict=True):
        assert found == (None if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize("split", ["", "a,b", "-1,2", "1,2,3,4", "0,0,0", "1.2.3"])
def test_split_mistakes(split):
    with pytest.raises(ValueError, match="--split"):
        parse_split(split)


def test_ranges_round_to_even():
    """Python's round: 2.5 becomes 2, 3.5 becomes 4."""
    assert split_range((0.25, 0.35), 10) == (2, 4)
    # 0.1 + 0.2 in doubles is a little more than 0.3: not 4 of 15, as of a half that is rounded to even.
    assert split_range(parse_split("1,2,7")[2], 15) == (5, 15)


def test_sizes_of_a_blend():
    weights = np.array([0.1, 0.9])
    assert samples_of_each(weights, 101) == [11, 91]
    # ceil(11 x 1.005) and ceil(91 x 1.005)
    assert samples_of_each(weights, 101, 0.005) == [12, 92]


def test_a_single_prefix_is_no_blend(three):
    train, valid, test = make(three[:1], (7, 3, 0), split="80,20,0")
    assert isinstance(train, GPTDataset)
    assert isinstance(valid, GPTDataset)
    assert test is None
    assert set(train.document_index) == set(range(48))
    assert set(valid.document_index) <= set(range(48, 60))


def test_a_weighted_blend(three):
    train, valid, test = make(["0.3", three[0], "0.7", three[2]], (101, None, None))
    assert isinstance(train, BlendedDataset)
    assert (valid, test) == (None, None)
    assert len(train) == 31 + 71
    first = [int(train[index]["tokens"][0]) for index in range(len(train))]
    assert first.count(0) == pytest.approx(31, abs=1)
    assert first.count(2) == pytest.approx(71, abs=1)
    assert len(make(["1", three[0]], (10, None, None))[0]) == 10


def test_parts_of_a_blend_are_built_with_a_surplus(three):
    """74 samples are one epoch; with the surplus 75 are built, which takes two, in another order."""
    blend = make(["1", three[0]], (74, None, None), seed=3)[0]
    chosen = GPTDatasetSettings(sequence_length=4, seed=3)
    with_surplus, without = (GPTDataset(IndexedDataset(three[0]), 0, 60, size, chosen) for size in (75, 74))
    assert len(with_surplus) > len(without) == 74
    assert np.array_equal(blend.datasets[0].shuffle_index, with_surplus.shuffle_index)


def test_a_blend_without_weights(three):
    """Every dataset once, 60 x 5 tokens give 74 samples of 4; or as many as asked for, in the same proportion."""
    everything = make(three, (None, None, None))[0]
    assert len(everything) == 74 + 37 + 112
    assert np.bincount(everything.dataset_index).tolist() == [74, 37, 112]
    assert len(make(three, (50, None, None))[0]) == 50
    assert len(make(three, (5000, None, None))[0]) == 74 + 37 + 112


def test_a_surplus_for_shares_that_are_rounded_up(tmp_path):
    """A hundred datasets get a whole sample each, where a tenth is asked for: the blend grows, and so do its parts."""
    words = ["20", write_dataset(tmp_path / "large", [[1] * 5] * 40).path_prefix]
    for number in range(100):
        words += ["0.1", write_dataset(tmp_path / f"small{number}", [[2] * 5] * 40).path_prefix]

    def blend(**options):
        sources = DataSources(data_path=tuple(words), split="1")
        return build_run_data(GPTDatasetSettings(4), sources, (50, 0, 0), BuildOptions(**options)).train

    with pytest.raises(ValueError, match=r"Dataset 0 .* has 49 samples, but .* draws 89, .*-surplus 3\.05 builds"):
        blend()
    assert np.bincount(blend(surplus=3.05).dataset_index).tolist()[:2] == [89, 1]


def test_mistakes(three, tmp_path):
    with pytest.raises(ValueError, match=r"no.idx does not exist: .* in that folder lie .*part0"):
        make([str(tmp_path / "no")], (1, None, None))
    with pytest.raises(
        ValueError, match="3 validation samples are asked for, but --split '1' gives validation no share"
    ):
        make(three, (1, 3, None))
    with pytest.raises(ValueError, match=r"The validation data .* cannot be built: .*part1 gives it none"):
        make(["1", three[0], "1", three[1]], (1, 1, None), split="99,1,0")
    with pytest.raises(ValueError, match="--data-path: The weight 0 is not a positive number"):
        make(["1", three[0], "0", three[1]], (1, None, None))
    with pytest.raises(ValueError, match="a weighted blend needs a number of samples"):
        make(["1", three[0], "2", three[1]], (None, None, None))


def make_own(three, num_samples, **options):
    sources = DataSources(train_data_path=(three[0],), valid_data_path=("1", three[1], "3", three[2]))
    return build_run_data(GPTDatasetSettings(4, vocab_size=10), sources, num_samples, BuildOptions(**options))


def test_data_of_each_splits_own(three):
    built = make_own(three, (20, 8, 0))
    assert set(built.train.document_index) == set(range(60))
    assert [int(built.valid[""][index]["tokens"][0]) for index in range(4)] == [2, 1, 2, 2]
    assert built.test is None


@pytest.mark.parametrize("size", [8, None])
def test_several_validation_sets(three, size):
    """Each is built by itself, whole where no size is given; the weights mean nothing."""
    valid = make_own(three, (20, size, 0), multiple_validation_sets=True).valid
    assert list(valid) == ["part1", "part2"]
    assert [type(dataset) for dataset in valid.values()] == [GPTDataset, GPTDataset]
    assert [len(dataset) for dataset in valid.values()] == [37, 112]
    assert [int(dataset[0]["tokens"][0]) for dataset in valid.values()] == [1, 2]


def test_validation_sets_of_one_name_go_by_their_path(three, tmp_path):
    (tmp_path / "other").mkdir()
    again = str(tmp_path / "other" / "part1")
    write_dataset(again, [[3] * 5] * 5)
    sources = DataSources(train_data_path=(three[0],), valid_data_path=(three[1], again))
    options = BuildOptions(multiple_validation_sets=True)
    assert list(build_run_data(GPTDatasetSettings(4), sources, (1, 1, 0), options).valid) == [three[1], again]
    twice = DataSources(train_data_path=(three[0],), valid_data_path=(three[1], three[1]))
    with pytest.raises(ValueError, match=r"--valid-data-path\) names a dataset twice"):
        build_run_data(GPTDatasetSettings(4), twice, (1, 1, 0), options)


def test_a_last_partial_sample_is_filled_up(three):
    """90 documents of 5 tokens are 449 predictions: 112 samples of 4, and one of 1 that is kept on demand."""
    dropped = make_own(three, (20, None, 0), multiple_validation_sets=True).valid["part2"]
    kept = make_own(
        three, (20, None, 0), multiple_validation_sets=True, drop_last_partial_validation_sequence=False
    ).valid["part2"]
    assert (len(dropped), len(kept)) == (112, 113)
    masks = sorted(sum(kept[index]["loss_mask"].tolist()) for index in range(113))
    assert masks == [1.0] + [4.0] * 112
    last = int(np.argmax(kept.shuffle_index))
    assert kept[last]["tokens"].tolist() == [2, 2, 0, 0]
    assert kept[last]["labels"].tolist() == [2, 0, 0, 0]
    assert kept[last]["loss_mask"].tolist() == [1, 0, 0, 0]


def test_a_small_share_of_test_data_is_told(three):
    sources = DataSources(data_path=(three[0],))
    built = build_run_data(GPTDatasetSettings(4), sources, (1, 1, 1))
    assert built.test is None
    assert "part0 gives it none of its 60 sequences" in built.without_test
    write_dataset(three[1], [[]])
    own = DataSources(train_data_path=(three[0],), test_data_path=(three[1],))
    with pytest.raises(ValueError, match=r"The test data \(--test-data-path\) cannot be built: .*part1 gives it none"):
        build_run_data(GPTDatasetSettings(4), own, (1, 0, 1))


@pytest.mark.parametrize("mmap", [True, False])
def test_parts_are_built_by_several_threads(three, mmap):
    one, four = (
        build_run_data(
            GPTDatasetSettings(4),
            DataSources(data_path=("1", three[0], "2", three[1], "3", three[2]), split="1"),
            (60, 0, 0),
            BuildOptions(mmap=mmap, num_threads=threads),
        ).train
        for threads in (1, 4)
    )
    both = one.get_batch(range(60)), four.get_batch(range(60))
    assert all(np.array_equal(both[0][name], both[1][name]) for name in both[0])
