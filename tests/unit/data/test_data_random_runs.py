"""Whole runs' data over random documents, splits, blends, epochs and padding: equal to a slow reference throughout."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from slow_gpt import blended_samples, item, samples, split_bounds
from small_data import write_dataset

from megallm.config.data_sources import DataSources
from megallm.data.samples.blended import BuildOptions, build_run_data
from megallm.data.samples.gpt import GPTDatasetSettings

EOD = 9
PAD = 7
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@st.composite
def runs(draw):
    """Datasets, their weights or None, a split, sizes, options."""
    document = st.lists(st.integers(0, 8), min_size=0, max_size=9).map(lambda tokens: [*tokens, EOD])
    corpora = draw(st.lists(st.lists(document, min_size=3, max_size=12), min_size=1, max_size=4))
    weights = draw(
        st.none() | st.lists(st.integers(1, 50).map(lambda n: n / 10), min_size=len(corpora), max_size=len(corpora))
    )
    return {
        "corpora": corpora,
        "weights": weights,
        "split": draw(st.sampled_from(["1", "80,20", "969, 30, 1", "50:30:20", "0.5,0.25,0.25", "2/1"])),
        "length": draw(st.integers(1, 9)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "sizes": tuple(draw(st.integers(1, 70)) for _ in range(3)),
        "keep_partial": draw(st.booleans()),
        "options": {
            name: draw(st.booleans()) for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
        },
    }


def expected(run, bounds, size, keep_partial):
    """(dataset, text) of every sample of a split; None where a part is too small for one."""
    arguments = bounds, run["length"], size, run["seed"], keep_partial, PAD
    if len(run["corpora"]) == 1 and run["weights"] is None:
        return [(0, text) for text in samples(run["corpora"][0], *arguments)]
    return blended_samples(run["corpora"], run["weights"], *arguments)


def is_large_enough(run, bounds, keep_partial):
    """Whether each dataset's part of a split has a sample of one epoch."""
    for corpus in run["corpora"]:
        first, last = round(bounds[0] * len(corpus)), round(bounds[1] * len(corpus))
        if sum(map(len, corpus[first:last])) < (2 if keep_partial else run["length"] + 1):
            return False
    return True


def check(run, dataset, wanted):
    """Every sample, in batches of three: the tokens, the masks, who may look at whom."""
    assert len(dataset) == len(wanted)
    for first in range(0, len(wanted), 3):
        numbers = np.arange(first, min(first + 3, len(wanted)))
        batch = dataset.get_batch(numbers)
        for row, number in enumerate(numbers.tolist()):
            name, text = wanted[number]
            fields = item(text, PAD, EOD, **run["options"])
            may_look = fields.pop("may_look")
            assert {field: batch[field][row].tolist() for field in fields} == fields
            assert int(batch["dataset_id"][row] if "dataset_id" in batch else 0) == name
            if "document_ids" in batch:
                documents = batch["document_ids"][row]
                assert np.tril(documents[:, None] == documents[None, :]).tolist() == may_look
            else:
                assert not run["options"]["reset_attention_mask"]


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=SLOW)
@given(runs())
def test_every_sample_of_every_split(tmp_path_factory, run):
    bounds = split_bounds(run["split"])
    partial = [False, run["keep_partial"], False]
    assume(all(pair is None or is_large_enough(run, pair, keep) for pair, keep in zip(bounds, partial, strict=True)))
    folder = tmp_path_factory.mktemp("run")
    words = []
    for number, corpus in enumerate(run["corpora"]):
        write_dataset(folder / f"part{number}", corpus)
        words += [] if run["weights"] is None else [str(run["weights"][number])]
        words.append(str(folder / f"part{number}"))
    sizes = tuple(size if pair else 0 for size, pair in zip(run["sizes"], bounds, strict=True))
    built = build_run_data(
        GPTDatasetSettings(run["length"], run["seed"], vocab_size=10, eod_id=EOD, pad_id=PAD, **run["options"]),
        DataSources(data_path=tuple(words), split=run["split"]),
        sizes,
        BuildOptions(drop_last_partial_validation_sequence=not run["keep_partial"], mmap=run["seed"] % 2 == 0),
    )
    found = built.train, built.valid.get(""), built.test
    for dataset, pair, size, keep in zip(found, bounds, sizes, partial, strict=True):
        assert (dataset is None) == (pair is None)
        if dataset is not None:
            check(run, dataset, expected(run, pair, size, keep))


def test_the_reference_gives_the_golden_samples(golden):
    """The slow reference is itself held to Megatron's own vectors."""
    documents = [golden[number].tolist() for number in range(len(golden))]
    texts = samples(documents, (0.0, 1.0), 4, 4, 1234)
    assert texts[0] == [1, 2, 0, 9, 9]
    assert [len(samples(documents, (0.0, 1.0), 4, size, 1234)) for size in (4, 9, 10)] == [4, 9, 14]
    assert split_bounds("969, 30, 1")[1] == (0.969, 0.999)
