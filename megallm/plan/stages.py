"""The stages of a pipeline, and what one process keeps of a micro-batch in each. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megallm.config.tree import Config
from megallm.plan.activations import Sizes, keeps_input, layer, recomputed_runs, saved_by_stage
from megallm.plan.parameters import HeldParameters, held_by_stage
from megallm.plan.split import stage_layers


@dataclass(frozen=True)
class Stage:
    """One stage: its number, its pipeline rank, its layers, and what one process holds of its parameters."""

    number: int
    rank: int
    layers: range
    is_first: bool
    is_last: bool
    parameters: HeldParameters


@dataclass(frozen=True)
class Layout:
    """A resolved configuration on a number of processes, with its stages."""

    config: Config
    world_size: int
    on_gpu: bool = True

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes(self.config, self.on_gpu)

    @property
    def tensor(self) -> int:
        return self.config.parallel.tensor_model_parallel_size

    @property
    def pipeline(self) -> int:
        return self.config.parallel.pipeline_model_parallel_size

    @property
    def virtual(self) -> int:
        return self.config.parallel.num_virtual_stages_per_pipeline_rank

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def num_micro_batches(self) -> int:
        """Of the largest batch, on each data parallel rank."""
        training = self.config.training
        assert training.global_batch_size, "the configuration is resolved"
        return training.global_batch_size // (training.micro_batch_size * self.data)

    @cached_property
    def stages(self) -> list[Stage]:
        ranges = stage_layers(self.config)
        last = len(ranges) - 1
        kinds = [(len(layers), number == 0, number == last) for number, layers in enumerate(ranges)]
        held = {kind: held_by_stage(self.config, kind[0], is_first=kind[1], is_last=kind[2]) for kind in set(kinds)}
        return [
            Stage(number, number % self.pipeline, ranges[number], kind[1], kind[2], held[kind])
            for number, kind in enumerate(kinds)
        ]

    def on_rank(self, rank: int) -> list[Stage]:
        """The stages of a pipeline rank."""
        return self.stages[rank :: self.pipeline]

    @cached_property
    def _saved(self) -> dict[tuple[int, bool, bool], int]:
        kinds = {(len(stage.layers), stage.is_first, stage.is_last) for stage in self.stages}
        return {kind: saved_by_stage(self.sizes, kind[0], is_first=kind[1], is_last=kind[2]) for kind in kinds}

    def kept(self, stage: Stage) -> int:
        """Bytes that a micro-batch keeps in a stage, without the logits, and without an input that a buffer holds."""
        saved = self._saved[len(stage.layers), stage.is_first, stage.is_last]
        is_buffer = not stage.is_first and (stage.layers or stage.is_last)
        in_buffer = self.sizes.hidden if is_buffer and keeps_input(self.sizes, len(stage.layers)) else 0
        return saved - in_buffer - self.kept_logits(stage)

    def kept_logits(self, stage: Stage) -> int:
        """Bytes that a micro-batch keeps of the logits, which their gradient is written over."""
        return self.sizes.kept_logits if stage.is_last else 0

    @cached_property
    def layer_bytes(self) -> int:
        """What a layer keeps that is not recomputed as a whole."""
        return sum(layer(self.sizes).values())

    def recomputed_bytes(self, stage: Stage) -> int:
        """What a backward pass makes again at once: the longest run of layers, but for its input."""
        runs, _ = recomputed_runs(self.sizes, len(stage.layers))
        return max(runs, default=0) * self.layer_bytes - (self.sizes.hidden if runs else 0)

    def recomputed_layers(self, stage: Stage) -> int:
        """Layers whose forward pass runs twice."""
        return sum(recomputed_runs(self.sizes, len(stage.layers))[0])
