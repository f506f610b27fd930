"""Which layers a pipeline stage holds. Needs no torch."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from megallm.config.stage_layout import parse_stage_layout
from megallm.config.tree import Config, ModelConfig, ParallelConfig
from megallm.plan.flops import flops_per_token, head_flops_per_token


def stage_layers(config: Config) -> list[range]:
    """The layers of every stage, in order; stage s is on pipeline rank s mod pipeline size.

    As --pipeline-model-parallel-layout says, or else by cost: the output layer costs as much as several layers where
    the vocabulary is large, so that the last stage gets fewer. Where the embedding or the output layer is to be
    accounted for, it costs one layer, as in Megatron, and the other nothing. Ranks whose number of layers is given
    spread them evenly over their stages; the rest is then split evenly too.

    Raises ValueError where `validate` reports a problem of the layout.
    """
    model, parallel = config.model, config.parallel
    if parallel.pipeline_model_parallel_layout is not None:
        return _ranges(parse_stage_layout(parallel.pipeline_model_parallel_layout))
    num_stages = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
    embedding, loss = parallel.account_for_embedding_in_pipeline_split, parallel.account_for_loss_in_pipeline_split
    if embedding or loss:
        return split_layers(model.num_layers, num_stages, float(embedding), float(loss))
    given = given_counts(parallel)
    if given:
        return split_layers(model.num_layers, num_stages, given=given)
    head_cost = head_cost_in_layers(model, config.data.seq_length)
    return split_layers(model.num_layers, num_stages, embedding_cost=0.0, head_cost=head_cost)


def given_counts(parallel: ParallelConfig) -> dict[int, int]:
    """Numbers of layers by stage where --decoder-first- and --decoder-last-pipeline-num-layers give them."""
    size, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    of_rank = {0: parallel.decoder_first_pipeline_num_layers, size - 1: parallel.decoder_last_pipeline_num_layers}
    counts: dict[int, int] = {}
    for rank, num_layers in of_rank.items():
        if num_layers is not None:
            for chunk, layers in enumerate(split_layers(num_layers, virtual)):
                counts[chunk * size + rank] = len(layers)
    return counts


def split_layers(
    num_layers: int,
    num_stages: int,
    embedding_cost: float = 0.0,
    head_cost: float = 0.0,
    given: Mapping[int, int] | None = None,
) -> list[range]:
    """The layers of each stage, in order: contiguous ranges that together hold every layer once.

    The largest cost of a stage is as small as it can be, where a layer costs 1, the first stage `embedding_cost` more
    and the last one `head_cost` more. Of several such splits the most even one is taken, and of those the one whose
    earlier stages hold more. Every stage holds at least one layer where there are as many layers as stages; otherwise
    some ranges are empty. Stages that are `given` a number of layers hold that many, and the others share the rest.
    Raises ValueError for sizes below 1, negative costs, and given numbers that do not fit.

    Layers are dealt out one by one to the stage that is then the cheapest. That is exact: if dealing a layer raised
    the largest cost to c, then one more layer takes every stage to c or above; so a split with all stages below c has
    in no stage more layers than were dealt before, and holds fewer in all.
    """
    if num_layers < 1 or num_stages < 1:
        raise ValueError(f"{num_layers} layers cannot be split over {num_stages} stages; both must be at least 1.")
    if embedding_cost < 0 or head_cost < 0:
        raise ValueError(f"Costs must not be negative: embedding {embedding_cost}, head {head_cost}.")
    given = given or {}
    extra = [0.0] * num_stages
    extra[0] += embedding_cost
    extra[-1] += head_cost

    counts = [given.get(stage, 1 if num_layers >= num_stages else 0) for stage in range(num_stages)]
    free = [stage for stage in range(num_stages) if stage not in given]
    left = num_layers - sum(counts)
    if left < 0 or (left > 0 and not free):
        raise ValueError(f"{num_layers} layers do not fit {num_stages} stages of which {len(given)} hold {given}.")
    costs = [(counts[stage] + extra[stage], stage) for stage in free]
    heapq.heapify(costs)
    for _ in range(left):
        cheapest = costs[0][1]
        counts[cheapest] += 1
        heapq.heapreplace(costs, (counts[cheapest] + extra[cheapest], cheapest))
    return _ranges(counts)


def head_cost_in_layers(model: ModelConfig, sequence_length: int) -> float:
    """Time of the output layer in units of one transformer layer, by FLOPs with causal attention counted half."""
    head = head_flops_per_token(model, sequence_length)
    return head * model.num_layers / (flops_per_token(model, sequence_length).half - head)


def _ranges(counts: list[int]) -> list[range]:
    ranges, first = [], 0
    for count in counts:
        ranges.append(range(first, first + count))
        first += count
    return ranges
