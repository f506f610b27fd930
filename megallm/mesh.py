"""The mesh: which rank stands where, and the groups it belongs to.

Axes from fastest to slowest: tp (tensor), cp (context), dp (data), pp (pipeline), in Megatron's order. A mesh is built
once and passed down.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import product

import torch
import torch.distributed as dist

from megallm.communication import Channel, Group, Transport
from megallm.journal import Journal

AXES = ("tp", "cp", "dp", "pp")

# Reductions of gradients run over these; `world` carries the gradient norm and the loss; `tie` joins the first and
# last pipeline ranks.
_AXES_WITH_GROUPS = (("tp",), ("cp", "dp"), ("pp",), ("tp", "cp", "dp"), AXES)


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the axes. Pure arithmetic: works for any world size without processes."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of a global rank along every axis."""
        position = {}
        for axis in AXES:
            position[axis] = rank % getattr(self, axis)
            rank //= getattr(self, axis)
        return position

    def rank_at(self, coordinates: dict[str, int]) -> int:
        """Global rank at a position."""
        rank = 0
        for axis in reversed(AXES):
            rank = rank * getattr(self, axis) + coordinates[axis]
        return rank

    def partition(self, axes: tuple[str, ...]) -> list[tuple[int, ...]]:
        """All groups of ranks that differ only along `axes`; each group is in rank order."""
        fixed = [axis for axis in reversed(AXES) if axis not in axes]
        varied = [axis for axis in reversed(AXES) if axis in axes]
        groups = []
        for outer in product(*(range(getattr(self, axis)) for axis in fixed)):
            members = []
            for inner in product(*(range(getattr(self, axis)) for axis in varied)):
                position = dict(zip(fixed, outer, strict=True)) | dict(zip(varied, inner, strict=True))
                members.append(self.rank_at(position))
            groups.append(tuple(members))
        return groups


@dataclass(frozen=True)
class Hosts:
    """All processes, joined by a group of their own that never touches a GPU.

    Its messages cross none of the training's: a thread beside the training may use it. It stands in for a mesh where
    only `world` and `device` are needed.
    """

    world: Group
    device: torch.device

    @staticmethod
    def alone() -> Hosts:
        """This process by itself."""
        return Hosts(Group((0,), 0, Transport(None)), torch.device("cpu"))

    @staticmethod
    def joined(rank: int, world_size: int, device: torch.device) -> Hosts:
        """All processes that have joined the job, before there is a mesh: through torch's group of all."""
        transport = Transport(dist.group.WORLD if world_size > 1 else None, name="all processes")
        return Hosts(Group(tuple(range(world_size)), rank, transport), device)


class Mesh:
    """This process's place in the mesh and its groups.

    Attributes: `shape`, `rank`, `coordinates`, `device`, `journal` (of all its messages), `world` (all processes),
        `tp`, `dp` (data and context axes together: the ranks that hold the same parameters), `pp`, `tp_dp`, and `tie`
        (the pipeline's first and last rank, or this rank alone in between).
    """

    def __init__(
        self,
        shape: MeshShape,
        rank: int,
        device: torch.device,
        timeout: timedelta = timedelta(minutes=10),
        delay: Callable[[], float] | None = None,
    ) -> None:
        self.shape = shape
        self.rank = rank
        self.device = device
        self.coordinates = shape.coordinates(rank)
        self._timeout = timeout
        self._delay = delay
        self.journal = Journal()
        self._transports: list[Transport] = []
        self._by_partition: dict[tuple[tuple[int, ...], ...], Group] = {}
        self._by_axes = {axes: self._build(shape.partition(axes), "+".join(axes)) for axes in _AXES_WITH_GROUPS}
        self.world = self._by_axes[AXES]
        self.tp = self._by_axes[("tp",)]
        self.dp = self._by_axes[("cp", "dp")]
        self.pp = self._by_axes[("pp",)]
        self.tp_dp = self._by_axes[("tp", "cp", "dp")]
        ends = [tuple(dict.fromkeys((ranks[0], ranks[-1]))) for ranks in shape.partition(("pp",))]
        self.tie = self._build(ends, "tie")

    def group_over(self, axes: tuple[str, ...]) -> Group:
        """The group along data and context axes, and along tensor too if `axes` names it."""
        return self.tp_dp if "tp" in axes else self.dp

    def connect_pipeline(self) -> dict[tuple[int, int], Channel]:
        """Channels of this rank to and from its pipeline neighbours, wrap-around included, keyed by global (source,
        destination).

        NCCL gets one communicator for each direction between two ranks, since messages on one communicator wait for
        each other. On gloo a tag makes a channel of its own.
        """
        ranks = self.pp.ranks
        edges = [(ranks[i], ranks[(i + 1) % len(ranks)]) for i in range(len(ranks))] if len(ranks) > 1 else []
        edges = list(dict.fromkeys(edges + [(b, a) for a, b in edges]))
        mine = [edge for edge in edges if self.rank in edge]
        if self._backend() == "nccl":
            transports = self._edge_communicators()
            return {edge: Channel(*edge, tag=0, transport=transports[edge]) for edge in mine}
        return {edge: Channel(*edge, tag=1, transport=self._transport(dist.group.WORLD, "pipeline")) for edge in mine}

    def new_hosts(self, patience: timedelta | None = None) -> Hosts:
        """A group of all processes beside those of the mesh. Called by all ranks, in the same order.

        With `patience` its messages may take that long, longer than the mesh's, and are not in its journal.
        """
        process_group = None
        if self.shape.world_size > 1:
            process_group = dist.new_group(backend="gloo", timeout=patience or self._timeout)
        ranks = tuple(range(self.shape.world_size))
        journal = self.journal if patience is None else None
        transport = Transport(process_group, name=_label("hosts", ranks), journal=journal)
        self._transports.append(transport)
        return Hosts(Group(ranks, self.rank, transport), torch.device("cpu"))

    def close(self) -> None:
        """Lets go of the process groups, so that they end with the default group. To be called when nothing is under
        way.
        """
        for transport in self._transports:
            transport.close()
        self._transports.clear()

    def _backend(self) -> str:
        return dist.get_backend() if dist.is_initialized() else "gloo"

    def _transport(self, process_group: dist.ProcessGroup | None, name: str) -> Transport:
        transport = Transport(process_group, self._delay, name, self.journal)
        self._transports.append(transport)
        return transport

    def _build(self, partition: list[tuple[int, ...]], name: str) -> Group:
        """Creates one group per member of a partition of (some of) the ranks and returns this rank's, or a group of
        one.
        """
        key = tuple(partition)
        if key in self._by_partition:
            return self._by_partition[key]
        mine = next((ranks for ranks in partition if self.rank in ranks), (self.rank,))
        process_group = None
        if max(len(ranks) for ranks in partition) > 1:
            process_group = self._create(partition)
        group = Group(mine, self.rank, self._transport(process_group if len(mine) > 1 else None, _label(name, mine)))
        self._by_partition[key] = group
        return group

    def _create(self, partition: list[tuple[int, ...]]) -> dist.ProcessGroup | None:
        if max(len(ranks) for ranks in partition) == self.shape.world_size:
            return dist.group.WORLD
        if self._backend() == "nccl":
            # One call splits the world for every member of the partition: the number of calls does not grow with the
            # world.
            return dist.split_group(
                split_ranks=[list(ranks) for ranks in partition if len(ranks) > 1], timeout=self._timeout
            )
        mine = None
        for ranks in partition:
            # On gloo every rank takes part in the creation of every group, in one global order.
            created = dist.new_group(list(ranks), timeout=self._timeout) if len(ranks) > 1 else None
            if self.rank in ranks:
                mine = created
        return mine

    def _edge_communicators(self) -> dict[tuple[int, int], Transport]:
        """One NCCL communicator per directed pipeline edge, created in rounds of edges that share no rank."""
        transports = {}
        size = self.shape.pp
        steps = [(i, (i + 1) % size) for i in range(size)] if size > 2 else [(0, 1)] if size == 2 else []
        rounds = [steps[0:-1:2], steps[1:-1:2], steps[-1:]] if size > 2 else [steps]
        for edges in [pairs for pairs in rounds if pairs]:
            for direction in (1, -1):
                split = [
                    (line[edge[::direction][0]], line[edge[::direction][1]])
                    for line in self.shape.partition(("pp",))
                    for edge in edges
                ]
                process_group = dist.split_group(split_ranks=[sorted(pair) for pair in split], timeout=self._timeout)
                for pair in split:
                    if self.rank in pair:
                        transports[pair] = self._transport(process_group, "pipeline")
        return transports


def _label(name: str, ranks: tuple[int, ...]) -> str:
    """A group's name with its ranks, for people."""
    shown = " ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]} {ranks[1]} ... {ranks[-1]}"
    return f"{name} (ranks {shown})"


def start_processes(backend: str, device: torch.device, timeout: timedelta) -> tuple[int, int]:
    """Joins the job that torchrun started, or starts a job of one process. Returns (rank, world size).

    Raises ValueError if only some of torchrun's variables are set, or if the processes cannot find each other.
    """
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    if "WORLD_SIZE" in missing and "RANK" in missing:
        return 0, 1
    if missing:
        raise ValueError(
            f"the environment sets some of {', '.join(wanted)} but not {', '.join(missing)}: "
            "start with torchrun, which sets all of them"
        )
    bound = device if backend == "nccl" else None
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=bound)
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        sentence = str(error).strip().splitlines()[0]
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"MASTER_PORT {os.environ['MASTER_PORT']} is used by another program on this machine: give another "
                "with torchrun --master-port, or on a single machine use torchrun --standalone, which takes a free one"
            ) from error
        raise ValueError(
            f"the processes of the job do not find each other at MASTER_ADDR:MASTER_PORT {address}: {sentence}. Check "
            "that the first machine is up, that its name and port can be reached from here, and that as many processes "
            "were started as --nnodes and --nproc-per-node say"
        ) from error
    except RuntimeError as error:
        # gloo does not say where it has the name of the network from. Where no variable gave one, its words must do.
        name = os.environ.get("GLOO_SOCKET_IFNAME")
        if name and "Unable to find address for" in str(error):
            raise ValueError(
                f"GLOO_SOCKET_IFNAME={name} names no network of this machine, or one without an address: `ip address` "
                "lists them; unset it to have gloo choose"
            ) from error
        raise
    return dist.get_rank(), dist.get_world_size()
