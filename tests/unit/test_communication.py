"""What groups promise without other processes: a group of one copies and waits for nobody, and sizes are checked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megallm.communication import Group, Transport, Work
from megallm.mesh import Mesh, MeshShape


@pytest.fixture
def alone() -> Group:
    return Group((3,), 3, Transport(None))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_group_of_one_is_its_own_sum(alone: Group, asynchronous: bool) -> None:
    tensor = torch.arange(4.0)
    alone.all_reduce(tensor, asynchronous=asynchronous).wait()
    alone.all_reduce(tensor, "max", asynchronous=asynchronous).wait()
    alone.broadcast(tensor, 0)
    alone.barrier()
    assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert (alone.rank, alone.size) == (0, 1)


@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter"])
def test_a_group_of_one_copies(alone: Group, name: str) -> None:
    source = torch.arange(6.0)
    target = torch.full((2, 3), torch.nan)
    getattr(alone, name)(target, source).wait()
    assert torch.equal(target, source.view(2, 3))
    # In place, as the optimizer's ranges are gathered.
    getattr(alone, name)(source, source).wait()
    assert source.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("large", "small"),
    [
        (torch.zeros(6), torch.zeros(5)),
        (torch.zeros(6), torch.zeros(6, dtype=torch.float64)),
        (torch.zeros(2, 3).t(), torch.zeros(6)),
        (torch.zeros(6), torch.zeros(12)[::2]),
    ],
    ids=["elements", "dtype", "strided", "strided input"],
)
def test_sizes_are_checked_even_alone(alone: Group, large: torch.Tensor, small: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        alone.all_gather(large, small)
    with pytest.raises(AssertionError):
        alone.reduce_scatter(small, large)


def test_sizes_count_the_members() -> None:
    pair = Group((0, 1), 0, SimpleNamespace(staged=False))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="a group of 2 needs 2 x 3 elements"):
        pair.all_gather(torch.zeros(5), torch.zeros(3))
    with pytest.raises(AssertionError, match="a group of 2 needs 2 x 4 elements"):
        pair.reduce_scatter(torch.zeros(4), torch.zeros(4))
    with pytest.raises(AssertionError, match="contiguous"):
        pair.all_reduce(torch.zeros(2, 3).t())


def test_a_work_waits_once() -> None:
    calls: list[str] = []
    work = Work(lambda: calls.append("waited"))
    assert calls == []
    work.wait()
    work.wait()
    assert calls == ["waited"]
    Work().wait()


def test_delayed_operations_are_late_and_in_order() -> None:
    delays = iter((0.05, 0.0))
    transport = Transport(None, lambda: next(delays))
    done: list[str] = []
    first = transport.start(lambda late: done.append("first"), asynchronous=True)
    assert done == []
    second = transport.start(lambda late: done.append("second"), asynchronous=True)
    second.wait()
    first.wait()
    # An operation that is not asynchronous comes after those under way, and is done when it returns.
    transport.start(lambda late: done.append("third"), asynchronous=False)
    assert done == ["first", "second", "third"]
    transport.close()


def test_a_failure_in_a_delayed_operation_reaches_who_waits() -> None:
    transport = Transport(None, lambda: 0.0)

    def fail(_: bool) -> None:
        raise RuntimeError("lost")

    work = transport.start(fail, asynchronous=True)
    with pytest.raises(RuntimeError, match="lost"):
        work.wait()
    transport.close()


def test_a_closed_mesh_is_of_no_use_any_more() -> None:
    mesh = Mesh(MeshShape(), 0, torch.device("cpu"))
    mesh.close()
    mesh.close()
    pair = Group((0, 1), 0, mesh.world._transport)
    with pytest.raises(AttributeError):
        pair.all_reduce(torch.zeros(2))
