"""Stacked micro-batches, with and without worker processes, and the mock data that they are often made of."""

import faulthandler
import os
import resource
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megallm.config.batch_sizes import BatchSizes
from megallm.data.feeding.loader import build_loader
from megallm.data.feeding.orders import DataShare, SingleOrder
from megallm.data.feeding.sampler import GlobalBatchSampler
from megallm.data.samples.mock import MockDataset, MockMaskedDataset

# The first tokens of the fixture below.
GOLDEN_TOKENS = [0, 43, 1, 1, 26, 0, 43, 1, 1, 26, 88, 9, 1, 1, 26, 0]


@pytest.fixture
def mock():
    return MockDataset(num_samples=50, sequence_length=16, vocab_size=100, seed=7)


def sampler_of(num_samples, consumed_samples, batch_sizes, share):
    if isinstance(batch_sizes, int):
        batch_sizes = BatchSizes.constant(batch_sizes)
    return GlobalBatchSampler(SingleOrder(num_samples, share), consumed_samples, batch_sizes, share)


@pytest.mark.usefixtures("leaves_no_children")
@pytest.mark.parametrize("num_workers", [0, 1, 2, 5])
def test_micro_batches(mock, num_workers):
    steps = list(build_loader(mock, sampler_of(50, 4, 12, DataShare(3, 1, 2)), num_workers))
    assert len(steps) == 3
    for step, micro_batches in enumerate(steps):
        assert [batch["sample_ids"].tolist() for batch in micro_batches] == [[3, 4, 5], [9, 10, 11]]
        for batch in micro_batches:
            assert batch["tokens"].shape == batch["labels"].shape == (3, 16)
            assert batch["tokens"].dtype == batch["sample_ids"].dtype == torch.int64
            assert batch["loss_mask"].dtype == torch.float32
            for row, place in enumerate(batch["sample_ids"].tolist()):
                expected = mock[4 + 12 * step + place]
                for name, array in expected.items():
                    assert np.array_equal(batch[name][row].numpy(), array)


def test_growing_batches_are_read_ahead_as_they_are_read_here(mock):
    sizes = BatchSizes(((0, 2), (3, 4), (10, 12)))
    here = list(build_loader(mock, sampler_of(50, 0, sizes, DataShare(1, 1, 2)), 0))
    ahead = list(build_loader(mock, sampler_of(50, 0, sizes, DataShare(1, 1, 2)), 3))
    assert [len(step) for step in here] == [len(step) for step in ahead] == [1, 1, 2, 2, 6, 6, 6]
    for ours, theirs in zip(here, ahead, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


class Numbers:
    """A sample is its own index; index `trouble` does what `happens`."""

    def __init__(self, trouble=None, happens=None):
        self.trouble, self.happens = trouble, happens

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        return {"tokens": np.array([index])}

    def get_batch(self, indices):
        if self.trouble in indices:
            self.happens()
        return {"tokens": np.asarray(indices)[:, None].copy()}


def raises(error):
    def happens():
        raise error

    return happens


def bus_error():
    faulthandler.disable()  # pytest's, which would print where it happened
    os.kill(os.getpid(), signal.SIGBUS)


def numbers(dataset, num_workers, consumed_samples=0):
    share = DataShare(2)
    return build_loader(dataset, sampler_of(len(dataset), consumed_samples, 8, share), num_workers)


def children():
    """Process ids of the children of this process, ended ones that nobody has waited for among them."""
    return {int(word) for path in Path("/proc/self/task").glob("*/children") for word in path.read_text().split()}


@pytest.fixture
def leaves_no_children():
    """No child outlives the test; those of other tests in this process may be there before."""
    before = children()
    yield
    assert children() <= before


@pytest.mark.usefixtures("leaves_no_children")
def test_more_workers_than_may_be_started_are_refused_at_once(mock, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: None)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match=r"--num-workers 9999999: .* allows 4,096 in all; give at most 2016$"):
        next(iter(build_loader(mock, sampler_of(50, 0, 12, DataShare(1, 1, 2)), 9999999)))


def test_workers_keep_the_order_however_unevenly_they_read():
    def wait():
        time.sleep(0.05)

    found = [
        number
        for step in islice(numbers(Numbers(4, wait), 3), 40)
        for batch in step
        for number in batch["tokens"].flatten().tolist()
    ]
    assert found == list(range(320))


@pytest.mark.parametrize(
    ("happens", "error", "sentence"),
    [
        (raises(ValueError("text.bin is too short")), ValueError, "^text.bin is too short$"),
        (raises(OSError("no such disk")), ValueError, "^no such disk$"),
        (raises(KeyError("x")), RuntimeError, "failed with KeyError: 'x'"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), ValueError, "killed .signal 9.*give fewer --num-workers"),
        (bus_error, ValueError, "signal 7: a data file has become shorter"),
        (lambda: os._exit(3), ValueError, "left with exit code 3"),
    ],
)
@pytest.mark.usefixtures("leaves_no_children")
def test_what_happens_to_a_worker_is_told_when_its_batch_is_due(happens, error, sentence):
    loader = numbers(Numbers(40, happens), 2)
    for step in range(5):
        assert next(loader)[0]["tokens"][0].item() == 8 * step
    with pytest.raises(error, match=sentence):
        next(loader)


def test_arrays_of_another_form_are_no_silent_garbage():
    class Growing(Numbers):
        def get_batch(self, indices):
            return {"tokens": np.zeros((len(indices), 1 + (indices[0] > 20)))}

    with pytest.raises(RuntimeError, match=r"tokens is float64 \(2, 2\), and was float64 \(2, 1\) before"):
        list(islice(numbers(Growing(), 2), 10))


def test_tensors_are_kept_by_nobody_else(mock):
    """What a worker reads later must not appear in a batch that was given out before."""
    for num_workers in (0, 2):
        loader = numbers(Numbers(), num_workers)
        first = next(loader)
        for _ in range(5):
            next(loader)
        assert [batch["tokens"].flatten().tolist() for batch in first] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        loader.close()


@pytest.mark.usefixtures("leaves_no_children")
def test_closing_ends_the_workers_and_gives_back_their_pipes():
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        loader = numbers(Numbers(), 4)
        next(loader)
        loader.close()
        loader.close()
    loader = numbers(Numbers(), 4)
    next(loader)
    del loader
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("leaves_no_children")
def test_workers_of_a_process_that_holds_many_files_open():
    """A blend may: the workers' pipes then have descriptors above 1,023."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1300:
        pytest.skip("this machine lets no process open so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1300), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        loader = numbers(Numbers(), 2)
        found = [batch["tokens"].flatten().tolist() for step in islice(loader, 6) for batch in step]
        loader.close()
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == [[first, first + 1] for first in range(0, 48, 2)]


PARENT = """
import os, sys, time
sys.path[:0] = [{root!r}, {folder!r}]
from test_data_loader import Numbers, numbers
loaders = [numbers(Numbers(), 2), numbers(Numbers(), 2)]
for loader in loaders:
    next(loader)
children = open(f"/proc/self/task/{{os.getpid()}}/children").read()
print(children, flush=True)
{end}
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["time.sleep(100)", "raise KeyboardInterrupt", "pass", "os._exit(1)"])
def test_workers_end_with_their_parent(end):
    """However it ends: killed, by an error, or without closing anything."""
    here = Path(__file__).resolve()
    script = PARENT.format(root=str(here.parents[3]), folder=str(here.parent), end=end)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        children = [int(word) for word in parent.stdout.readline().split()]
        assert len(children) == 4
        if "sleep" in end:
            parent.kill()
        parent.wait(20)
    give_up = time.monotonic() + 15
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < give_up, "a worker outlives its parent"
        time.sleep(0.05)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_generator_is_left_alone(mock, num_workers):
    before = torch.get_rng_state()
    list(build_loader(mock, sampler_of(50, 0, 10, DataShare(10)), num_workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_mock_samples_depend_on_seed_and_index_alone(mock):
    batch = mock.get_batch(np.array([9, 0]))
    assert all(np.array_equal(array, np.stack([mock[9][name], mock[0][name]])) for name, array in batch.items())
    again = MockDataset(50, 16, 100, 7)
    again[3]
    assert np.array_equal(again[9]["tokens"], mock[9]["tokens"])
    assert not np.array_equal(mock[9]["tokens"], mock[8]["tokens"])
    assert not np.array_equal(mock[9]["tokens"], MockDataset(50, 16, 100, 8)[9]["tokens"])
    # Written down: a change of the stream would change every run on mock data.
    assert mock[0]["tokens"].tolist() == GOLDEN_TOKENS
    assert np.array_equal(mock[9]["tokens"][1:], mock[9]["labels"][:-1])


@pytest.mark.parametrize("vocab_size", [1, 2, 1000, 128_256])
def test_mock_tokens_are_in_the_vocabulary(vocab_size):
    tokens = np.concatenate([MockDataset(20, 64, vocab_size, 1)[index]["tokens"] for index in range(20)])
    assert tokens.min() >= 0
    assert tokens.max() < vocab_size


def test_mock_data_can_be_learnt():
    """A sample holds its pattern again and again: most tokens repeat at some distance of at most 32."""
    dataset = MockDataset(40, 256, 50_000, 3)
    for index in range(40):
        tokens = dataset[index]["tokens"]
        assert max(np.mean(tokens[:-shift] == tokens[shift:]) for shift in range(1, 33)) > 0.75


def test_mock_mistakes(mock):
    with pytest.raises(ValueError, match="vocabulary size of mock data is 0, but must be 1 at least"):
        MockDataset(10, 16, 0, 1)
    with pytest.raises(IndexError):
        mock[50]


def test_masked_mock_samples_are_what_a_bert_reads():
    dataset = MockMaskedDataset(40, 24, 60, 7, 0.25)
    batch = dataset.get_batch(range(40))
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "tokens": ("int64", (40, 24)),
        "position_ids": ("int64", (40, 24)),
        "types": ("int64", (40, 24)),
        "labels": ("int64", (40, 24)),
        "is_random": ("int64", (40,)),
        "padding_mask": ("int64", (40, 24)),
        "loss_mask": ("float32", (40, 24)),
    }
    is_masked = batch["loss_mask"] == 1
    assert is_masked.mean() == pytest.approx(0.25, abs=0.05)
    assert (batch["labels"] >= 0).tolist() == is_masked.tolist() == (batch["tokens"] == 59).tolist()
    assert batch["labels"].max() < 59
    assert not is_masked[:, 0].any() and not (is_masked & (batch["padding_mask"] == 0)).any()
    assert set(batch["padding_mask"].sum(axis=1).tolist()) == {21, 24}
    assert 10 <= batch["is_random"].sum() <= 30
    # Halves that belong together go on with one pattern: most of their tokens are the same ones.
    shared = [
        len(set(text[:12].tolist()) & set(text[12:].tolist()))
        for text in np.where(is_masked, batch["labels"], batch["tokens"])
    ]
    is_random = batch["is_random"] == 1
    assert np.mean(np.array(shared)[~is_random]) > np.mean(np.array(shared)[is_random]) + 2
    again = MockMaskedDataset(40, 24, 60, 7, 0.25)
    assert all(np.array_equal(dataset[9][name], array) for name, array in again[9].items())
    assert not np.array_equal(dataset[9]["tokens"], MockMaskedDataset(40, 24, 60, 8, 0.25)[9]["tokens"])
    with pytest.raises(IndexError, match="has samples 0 to 39, not 40"):
        dataset[40]
    with pytest.raises(ValueError, match="vocabulary size of masked mock data is 1"):
        MockMaskedDataset(40, 24, 1, 7, 0.25)
