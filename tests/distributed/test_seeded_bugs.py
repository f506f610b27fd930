"""The parity comparison is worth something only if it fails when the engine is wrong: each of these bugs must make it
fail, and in the way that this bug would.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from megallm.schedule import LoweredSchedule, ScheduleError, build_schedule, lower, verify
from tests.distributed import seeded_bugs as bugs
from tests.distributed.parity import GPT, Case, Outcome
from tests.distributed.parity_cases import (
    CLIPPED,
    DROPOUT,
    GPIPE,
    NO_SEQUENCE_PARALLEL,
    ODD_VOCABULARY,
    OVERLAPPED,
    QK_NORM,
    SHARDED,
    THREE_GROUPS,
    TWO_PER_MICRO_BATCH,
)
from tests.distributed.pool import WorkerPool
from tests.distributed.symptoms import Symptoms, diagnose, objection

NUM_STEPS = 3
MODEL = GPT | {"model.num_layers": 2}
ONE_PARAMETER_PER_BUCKET = {"parallel.ddp_bucket_size": 1}


def case(name: str, features: dict[str, Any] | None = None, layout: dict[str, Any] | None = None, **named: Any) -> Case:
    """A small GPT with tied weights, over two micro-batches or more."""
    return Case(
        name, MODEL | (features or {}), layout=TWO_PER_MICRO_BATCH | (layout or {}), num_steps=NUM_STEPS, **named
    )


SINGLE = case("single")
SINGLE_RECOMPUTED = case("single recomputed", DROPOUT, {"training.recompute_granularity": "full"})
TENSOR = case("tensor", CLIPPED, tp=2)
TENSOR_PLAIN = case("tensor plain", CLIPPED, NO_SEQUENCE_PARALLEL, tp=2)
TENSOR_DROPOUT = case("tensor dropout", DROPOUT, tp=2)
TENSOR_PLAIN_DROPOUT = case("tensor plain dropout", DROPOUT, NO_SEQUENCE_PARALLEL, tp=2)
TENSOR_GROUPS = case("tensor groups", THREE_GROUPS, NO_SEQUENCE_PARALLEL, tp=2)
TENSOR_HEAD_NORMS = case("tensor head norms", QK_NORM, tp=2)
TENSOR_PLAIN_HEAD_NORMS = case("tensor plain head norms", QK_NORM, layout=NO_SEQUENCE_PARALLEL, tp=2)
TENSOR_BERT = case("tensor bert", CLIPPED, tp=2, kind="bert")
TENSOR_VOCABULARY = case("tensor vocabulary", ODD_VOCABULARY, tp=2)
PIPELINE = case("pipeline", CLIPPED, pp=2)
PIPELINE_GPIPE = case("pipeline gpipe", layout=GPIPE, pp=2)
PIPELINE_DELAYED = case("pipeline delayed", pp=2, delayed=True)
DATA = case("data", layout=ONE_PARAMETER_PER_BUCKET, dp=2)
DATA_DROPOUT = case("data dropout", DROPOUT, dp=2)
DATA_RAGGED = case("data ragged", dp=2, mask="ragged")
DATA_SHARDED = case("data sharded", layout=SHARDED, dp=2)
DATA_OVERLAPPED = case("data overlapped", layout=OVERLAPPED, dp=2)
TENSOR_DATA = case("tensor data", tp=2, dp=2)
PIPELINE_DATA = case("pipeline data", layout=SHARDED, pp=2, dp=2)

# Patterns of tensor names. A key bias has a true gradient of zero whatever the others are: bugs do not show in it.
EVERY = r"(?!.*key\.bias).*"
REPLICATED = r".*norm\..*|.*attention\.output\.bias|.*down\.bias|embedding\.position\.weight"
CUT = rf"(?!.*key\.bias|{REPLICATED}).*"
WORD = r"embedding\.word\.weight"
LAST_LAYER = r"decoder\.layers\.1\."

SOME_STEP = -1


@dataclass(frozen=True)
class Seeded:
    """A bug, the case that catches it, and the symptoms by which.

    Attributes:
        gradients: pattern of the names of exactly those tensors whose first gradient is wrong; None where only some are
            known to be, since timing decides.
        first_loss: the first step with a wrong loss, SOME_STEP where timing decides, None where all are right.
        grad_norm: whether the norm of the first step is wrong.
        initial_weights: pattern of the names of exactly those tensors that start with wrong values.
        blind: a case that cannot see the bug: without what is special in `case`, it passes.
        harmless: a change under which the sound engine passes, made in the run with the bug too.
    """

    bug: bugs.Bug
    case: Case
    gradients: str | None = ""
    first_loss: int | None = 1
    grad_norm: bool = True
    initial_weights: str = ""
    blind: Case | None = None
    harmless: bugs.Bug | None = None


SEEDED = [
    # what parameters say of themselves
    Seeded(bugs.norm_gradient_not_summed_over_tensor_ranks, TENSOR, r".*norm\..*", blind=TENSOR_PLAIN),
    Seeded(
        bugs.norm_of_heads_summed_as_other_norms,
        TENSOR_PLAIN_HEAD_NORMS,
        # A shift of all keys shifts all scores of a query alike.
        r".*query_norm\..*|.*key_norm\.weight",
        blind=TENSOR_HEAD_NORMS,
    ),
    Seeded(
        bugs.row_parallel_bias_gradient_not_summed_over_tensor_ranks,
        TENSOR,
        r".*attention\.output\.bias|.*down\.bias",
        blind=TENSOR_PLAIN,
    ),
    Seeded(
        bugs.position_gradient_not_summed_over_tensor_ranks, TENSOR, r"embedding\.position\.weight", blind=TENSOR_PLAIN
    ),
    Seeded(bugs.norms_decay, SINGLE, grad_norm=False),
    Seeded(
        bugs.same_initial_values_on_every_tensor_rank,
        TENSOR,
        EVERY,
        first_loss=0,
        initial_weights=r".*(query|key|value|attention\.output|up|down|word)\.weight",
        blind=PIPELINE,
    ),
    # norm and clipping
    Seeded(bugs.tied_weight_counted_twice_in_the_norm, PIPELINE, blind=TENSOR),
    Seeded(bugs.replicated_parameter_counted_on_every_tensor_rank_in_the_norm, TENSOR_PLAIN, blind=TENSOR),
    Seeded(bugs.padded_vocabulary_enters_the_norm, TENSOR_VOCABULARY, first_loss=None),
    Seeded(bugs.clip_coefficient_from_the_local_norm, TENSOR, grad_norm=False, blind=SINGLE),
    # scale of the loss
    Seeded(bugs.mean_of_the_means_of_ranks, DATA_RAGGED, EVERY, first_loss=0, blind=DATA),
    Seeded(bugs.mean_of_the_means_of_micro_batches, DATA_RAGGED, EVERY, first_loss=0, blind=DATA),
    Seeded(bugs.gradient_divided_by_the_number_of_micro_batches_once_more, SINGLE, EVERY),
    Seeded(bugs.counts_summed_over_the_world, TENSOR, EVERY, first_loss=0, blind=DATA),
    # dropout and positions
    Seeded(bugs.equal_masks_on_data_ranks, DATA_DROPOUT, EVERY, first_loss=0, blind=DATA),
    Seeded(bugs.equal_masks_on_sequence_parts, TENSOR_DROPOUT, EVERY, first_loss=0, blind=TENSOR_PLAIN_DROPOUT),
    Seeded(bugs.equal_masks_on_the_heads_of_tensor_ranks, TENSOR_DROPOUT, EVERY, first_loss=0, blind=DATA_DROPOUT),
    Seeded(bugs.hidden_dropout_depends_on_the_tensor_rank, TENSOR_PLAIN_DROPOUT, EVERY, first_loss=0),
    Seeded(
        bugs.recompute_takes_another_dropout_step,
        SINGLE_RECOMPUTED,
        r"(?!.*key\.bias|decoder\.final_norm).*",
        blind=DATA_DROPOUT,
    ),
    Seeded(bugs.positions_start_at_zero_on_every_sequence_part, TENSOR, EVERY, first_loss=0, blind=TENSOR_PLAIN),
    # tensor parallel layers
    Seeded(bugs.cross_entropy_without_the_largest_over_ranks, TENSOR, EVERY, first_loss=0, blind=DATA),
    Seeded(bugs.cross_entropy_without_the_sum_over_ranks, TENSOR, EVERY, first_loss=0, blind=DATA),
    Seeded(bugs.padded_vocabulary_gets_probability, TENSOR_VOCABULARY, EVERY, first_loss=0),
    Seeded(bugs.whole_layer_counted_on_every_tensor_rank, TENSOR_BERT, r"pooler\..*|next_sentence\..*"),
    Seeded(
        bugs.column_parallel_input_gradient_not_summed,
        TENSOR_PLAIN,
        rf"(?!.*key\.bias|decoder\.final_norm|{LAST_LAYER}mlp\.).*",
        blind=DATA,
    ),
    Seeded(
        bugs.gathered_keys_and_values_not_summed_in_backward,
        TENSOR_GROUPS,
        rf"(?!.*key\.bias|decoder\.final_norm|{LAST_LAYER}(mlp|attention\.(output|query))).*",
        blind=TENSOR,
    ),
    Seeded(bugs.every_rank_takes_the_groups_of_the_first, TENSOR_GROUPS, EVERY, first_loss=0),
    # reduction of gradients
    Seeded(bugs.bucket_not_reduced, DATA, re.escape(bugs.SKIPPED_BUCKET)),
    Seeded(bugs.bucket_reduced_before_its_last_micro_batch, DATA_OVERLAPPED, EVERY, blind=DATA),
    Seeded(
        bugs.gradients_used_before_they_are_reduced,
        DATA_OVERLAPPED,
        EVERY,
        harmless=bugs.reductions_run_when_waited_for,
    ),
    Seeded(
        bugs.buffer_cleared_while_it_is_reduced, DATA_OVERLAPPED, EVERY, harmless=bugs.reductions_run_when_waited_for
    ),
    Seeded(bugs.gradients_of_the_last_step_left_in_the_buffer, SINGLE, first_loss=2, grad_norm=False),
    Seeded(bugs.tie_not_reduced, PIPELINE, WORD, blind=DATA),
    Seeded(bugs.tie_reduced_after_the_reduce_scatter, PIPELINE_DATA, WORD, blind=PIPELINE),
    Seeded(bugs.replicated_weights_reduced_over_data_ranks_only, TENSOR_DATA, REPLICATED, blind=DATA),
    Seeded(bugs.cut_weights_reduced_over_tensor_ranks_too, TENSOR, CUT, blind=DATA),
    # the distributed optimizer
    Seeded(bugs.optimizer_owns_the_next_range, DATA_SHARDED, EVERY, grad_norm=False, blind=DATA),
    Seeded(bugs.updated_ranges_not_gathered, DATA_SHARDED, grad_norm=False, blind=DATA),
    Seeded(
        bugs.forward_does_not_wait_for_the_gather,
        DATA_OVERLAPPED,
        grad_norm=False,
        harmless=bugs.gathers_run_when_waited_for,
    ),
    # the pipeline
    Seeded(
        bugs.stage_takes_the_activations_of_another_micro_batch,
        PIPELINE,
        # The gradient of the last bias sums over tokens and does not see which of them a label belongs to.
        r"(?!.*key\.bias|decoder\.final_norm\.bias).*",
        first_loss=0,
    ),
    Seeded(
        bugs.activations_overwritten_before_their_backward,
        PIPELINE_GPIPE,
        # On the second stage only the first norm looks at its input again; the gradient that it passes on is wrong.
        r"(?!.*key\.bias)decoder\.layers\.0\..*|embedding\..*|decoder\.layers\.1\.attention_norm\.weight",
    ),
    Seeded(bugs.last_micro_batch_has_no_backward, SINGLE, EVERY),
    Seeded(bugs.message_used_before_it_arrives, PIPELINE_DELAYED, None, first_loss=SOME_STEP),
    Seeded(bugs.message_overwritten_while_it_is_sent, PIPELINE_DELAYED, None, first_loss=SOME_STEP),
]


class Runs:
    """Outcomes of sound runs, each made once: a case's own and that of one process on the same batches."""

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        self._outcomes: dict[str, list[Outcome]] = {}

    def sound(self, chosen: Case, changes: tuple[bugs.Bug, ...] = ()) -> list[Outcome]:
        key = " ".join([chosen.name, *(change.__name__ for change in changes)])
        if key not in self._outcomes:
            self._outcomes[key] = self.changed(chosen, changes)
        return self._outcomes[key]

    def reference(self, chosen: Case) -> list[Outcome]:
        reference = chosen.reference()
        name = repr((sorted(reference.settings().items()), reference.mask, reference.kind))
        return self.sound(replace(reference, name=name, num_steps=chosen.num_steps))

    def changed(self, chosen: Case, changes: tuple[bugs.Bug, ...]) -> list[Outcome]:
        return self.pool.run(chosen.world_size, bugs.run_changed, chosen, changes)


@pytest.fixture(scope="module")
def runs(pool: WorkerPool) -> Runs:
    return Runs(pool)


@pytest.mark.slow
@pytest.mark.parametrize("seeded", SEEDED, ids=lambda seeded: seeded.bug.__name__)
def test_bug_is_caught(runs: Runs, seeded: Seeded) -> None:
    harmless = () if seeded.harmless is None else (seeded.harmless,)
    reference = runs.reference(seeded.case)
    complaint = objection(reference, runs.sound(seeded.case, harmless))
    assert not complaint, f"without the bug: {complaint}"

    outcomes = runs.changed(seeded.case, (*harmless, seeded.bug))
    assert objection(reference, outcomes), "the comparison did not notice the bug"
    _check_symptoms(seeded, diagnose(reference, outcomes), {box[0] for box in reference[0].gradients})


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeded", [seeded for seeded in SEEDED if seeded.blind is not None], ids=lambda seeded: seeded.bug.__name__
)
def test_bug_needs_what_is_special_in_its_case(runs: Runs, seeded: Seeded) -> None:
    assert seeded.blind is not None
    complaint = objection(runs.reference(seeded.blind), runs.changed(seeded.blind, (seeded.bug,)))
    assert not complaint, f"{seeded.blind.name} sees the bug as well: {complaint}"


def _check_symptoms(seeded: Seeded, found: Symptoms, names: set[str]) -> None:
    def matching(pattern: str) -> set[str]:
        return {name for name in names if re.fullmatch(pattern, name)}

    assert found.initial_weights == matching(seeded.initial_weights)
    if seeded.gradients is None:
        assert found.gradients
    else:
        assert found.gradients == matching(seeded.gradients)
    assert found.grad_norm == seeded.grad_norm
    if seeded.first_loss == SOME_STEP:
        assert found.first_loss is not None
    else:
        assert found.first_loss == seeded.first_loss


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [("1f1b", bugs.with_forwards_swapped, "order"), ("gpipe", bugs.with_one_slot, "slot")],
)
def test_verifier_refuses_the_changed_schedule(
    name: str, change: Callable[[LoweredSchedule], LoweredSchedule], fault: str
) -> None:
    lowered = lower(build_schedule(name, 2, 1, 4))
    verify(lowered)
    with pytest.raises(ScheduleError, match=fault):
        verify(change(lowered))
