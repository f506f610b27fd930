"""Which layers a pipeline stage holds. Needs no torch."""

from __future__ import annotations

from megallm.config.tree import ModelConfig
from megallm.plan.flops import flops_per_token, head_flops_per_token


def split_layers(num_layers: int, num_stages: int, embedding_cost: float = 0.0, head_cost: float = 0.0) -> list[range]:
    """The layers of each stage, in order: contiguous ranges that together hold every layer once.

    The largest cost of a stage is as small as it can be, where a layer costs 1, the first stage `embedding_cost` more
    and the last one `head_cost` more. Of several such splits the most even one is taken, and of those the one whose
    earlier stages hold more. Every stage holds at least one layer where there are as many layers as stages; otherwise
    some ranges are empty. Raises ValueError for sizes below 1 and negative costs.

    Layers are dealt out one by one to the stage that is then the cheapest. That is exact: if dealing a layer raised
    the largest cost to c, then one more layer takes every stage to c or above; so a split with all stages below c has
    in no stage more layers than were dealt before, and holds fewer in all.
    """
    if num_layers < 1 or num_stages < 1:
        raise ValueError(f"{num_layers} layers cannot be split over {num_stages} stages; both must be at least 1.")
    if embedding_cost < 0 or head_cost < 0:
        raise ValueError(f"Costs must not be negative: embedding {embedding_cost}, head {head_cost}.")
    extra = [0.0] * num_stages
    extra[0] += embedding_cost
    extra[-1] += head_cost

    counts = [1 if num_layers >= num_stages else 0] * num_stages
    for _ in range(num_layers - sum(counts)):
        cheapest = min(range(num_stages), key=lambda stage: (counts[stage] + extra[stage], stage))
        counts[cheapest] += 1

    ranges, first = [], 0
    for count in counts:
        ranges.append(range(first, first + count))
        first += count
    return ranges


def head_cost_in_layers(model: ModelConfig, sequence_length: int) -> float:
    """Time of the output layer in units of one transformer layer, by FLOPs with causal attention counted half."""
    head = head_flops_per_token(model)
    return head * model.num_layers / (flops_per_token(model, sequence_length).half - head)
