from __future__ import annotations

import socket
from datetime import timedelta
from itertools import combinations
from math import prod

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.device import select_backend, select_device
from megallm.mesh import AXES, Mesh, MeshShape, start_processes

SMALL = st.builds(MeshShape, *[st.integers(1, 4)] * 4)
LARGE = MeshShape(tp=8, cp=2, dp=64, pp=8)
SUBSETS = [axes for length in range(1, 5) for axes in combinations(AXES, length)]


@given(SMALL)
def test_coordinates_and_ranks_are_inverse(shape: MeshShape) -> None:
    positions = [shape.coordinates(rank) for rank in range(shape.world_size)]
    assert [shape.rank_at(position) for position in positions] == list(range(shape.world_size))
    assert len({tuple(position.values()) for position in positions}) == shape.world_size
    for position in positions:
        assert all(0 <= position[axis] < getattr(shape, axis) for axis in AXES)


@given(SMALL, st.sampled_from(SUBSETS))
@settings(deadline=None)
def test_a_partition_holds_each_rank_once(shape: MeshShape, axes: tuple[str, ...]) -> None:
    groups = shape.partition(axes)
    assert sorted(rank for group in groups for rank in group) == list(range(shape.world_size))
    for group in groups:
        assert len(group) == prod(getattr(shape, axis) for axis in axes)
        assert list(group) == sorted(group)
        for axis in set(AXES) - set(axes):
            assert len({shape.coordinates(rank)[axis] for rank in group}) == 1, "a group may vary along its axes only"


@given(SMALL, st.permutations(AXES))
def test_the_order_in_which_axes_are_named_does_not_matter(shape: MeshShape, axes: list[str]) -> None:
    named = tuple(axes[:2])
    assert shape.partition(named) == shape.partition(named[::-1])


def test_tensor_ranks_are_neighbours_and_pipeline_ranks_far_apart() -> None:
    """Megatron's order, by the example of eight processes."""
    shape = MeshShape(tp=2, dp=2, pp=2)
    assert shape.partition(("tp",)) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert shape.partition(("cp", "dp")) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert shape.partition(("pp",)) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert shape.partition(("tp", "cp", "dp")) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert shape.partition(AXES) == [tuple(range(8))]
    assert shape.coordinates(6) == {"tp": 0, "cp": 0, "dp": 1, "pp": 1}


def test_context_ranks_stand_between_tensor_and_data_ranks() -> None:
    shape = MeshShape(tp=2, cp=2, dp=2)
    assert shape.partition(("cp",)) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert shape.partition(("dp",)) == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_eight_thousand_ranks() -> None:
    assert LARGE.world_size == 8192
    assert all(LARGE.rank_at(LARGE.coordinates(rank)) == rank for rank in range(0, 8192, 61))
    for axes in (("tp",), ("cp", "dp"), ("pp",), ("tp", "cp", "dp"), AXES):
        groups = LARGE.partition(axes)
        size = prod(getattr(LARGE, axis) for axis in axes)
        assert len(groups) == 8192 // size
        assert sorted(rank for group in groups for rank in group) == list(range(8192))
    assert LARGE.partition(("tp",))[1] == tuple(range(8, 16))
    assert LARGE.partition(("pp",))[0] == tuple(range(0, 8192, 1024))


def test_a_process_alone_has_groups_that_talk_to_nobody() -> None:
    mesh = Mesh(MeshShape(), 0, torch.device("cpu"))
    for group in (mesh.world, mesh.tp, mesh.dp, mesh.pp, mesh.tp_dp, mesh.tie):
        assert (group.ranks, group.rank, group.size) == ((0,), 0, 1)
        tensor, output = torch.arange(4.0), torch.zeros(4)
        group.all_reduce(tensor)
        group.all_gather(output, tensor)
        assert output.tolist() == [0.0, 1.0, 2.0, 3.0]
        group.reduce_scatter(output, tensor + 1.0)
        assert output.tolist() == [1.0, 2.0, 3.0, 4.0]
        group.barrier()
    assert mesh.connect_pipeline() == {}
    assert mesh.group_over(("tp",)) is mesh.tp_dp
    assert mesh.group_over(()) is mesh.dp
    mesh.close()


def _set(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch)
    assert start_processes("gloo", select_device("cpu"), timedelta(seconds=5)) == (0, 1)


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, RANK="1", WORLD_SIZE="2")
    with pytest.raises(ValueError, match="but not MASTER_ADDR, MASTER_PORT"):
        start_processes("gloo", select_device("cpu"), timedelta(seconds=5))


def test_a_network_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    _set(monkeypatch, RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=port, GLOO_SOCKET_IFNAME="none7")
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME=none7 names no network of this machine"):
        start_processes("gloo", select_device("cpu"), timedelta(seconds=5))


def test_a_network_that_nobody_named_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)

    def fail(*arguments: object, **settings: object) -> None:
        raise RuntimeError("Unable to find address for: host")

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(RuntimeError, match=r"^Unable to find address for: host$"):
        start_processes("gloo", select_device("cpu"), timedelta(seconds=5))


@pytest.mark.parametrize("rank", [1000])
def test_few_groups_are_made_on_nccl_whatever_the_world(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    shape = MeshShape(tp=8, dp=64, pp=16)
    assert shape.world_size == 8192
    calls: list[list[tuple[int, ...]]] = []

    def split_group(split_ranks: list[list[int]], **_: object) -> object:
        calls.append([tuple(ranks) for ranks in split_ranks])
        return object()

    def new_group(*_: object, **__: object) -> object:
        calls.append([tuple(range(shape.world_size))])
        return object()

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda group=None: "nccl")
    monkeypatch.setattr(dist, "split_group", split_group)
    monkeypatch.setattr(dist, "new_group", new_group)
    mesh = Mesh(shape, rank, torch.device("cpu"))
    channels = mesh.connect_pipeline()
    # One for signals and limits, one for saving in the background.
    mesh.new_hosts()
    mesh.new_hosts()
    assert len(calls) <= 16
    # No rank is in two groups of one call, so that each rank takes part in one creation a call.
    for groups in calls:
        members = [member for group in groups for member in group]
        assert len(members) == len(set(members))
    position = shape.coordinates(rank)["pp"]
    ring = shape.partition(("pp",))[rank % 512]
    neighbours = {ring[position - 1], ring[(position + 1) % 16]}
    assert set(channels) == {(rank, other) for other in neighbours} | {(other, rank) for other in neighbours}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"--device cuda was asked for, but this torch sees no GPU\. Use --device cpu"):
        select_device("cuda")
    with pytest.raises(ValueError, match="--distributed-backend nccl needs one GPU for each of the 2 processes"):
        select_backend(torch.device("cpu"), 2, "nccl")
