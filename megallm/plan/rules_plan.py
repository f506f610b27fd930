"""Rules about a plan that is asked for instead of a run."""

from __future__ import annotations

from collections.abc import Iterator

from megallm.config.tree import Config
from megallm.plan.problem import Problem, rule
from megallm.plan.vocabulary import USUAL_SIZES, size_of_tokenizer


@rule("plan.world_size", "plan.gpu_type")
def plan_flags_belong_to_a_dry_run(config: Config, world_size: int) -> Iterator[Problem]:
    """A run has the processes that the launcher started and the GPU that is there."""
    plan = config.plan
    given = {"--world-size": plan.world_size is not None, "--gpu-type": plan.gpu_type is not None, "--json": plan.json}
    flags = tuple(flag for flag, is_given in given.items() if is_given)
    if flags and not plan.dry_run:
        yield Problem(
            (*flags, "--dry-run"),
            "a plan is described, but a run is asked for",
            "",
            f"add --dry-run, or {', '.join(f'leave out {flag}' for flag in flags)}",
        )


@rule("model.vocab_size", "data.tokenizer_type")
def plan_knows_the_vocabulary(config: Config, world_size: int) -> Iterator[Problem]:
    """A dry run may be made where the files of the tokenizer are not, and does without its library."""
    kind = config.data.tokenizer_type
    # For the tokenizer without a vocabulary another rule speaks.
    if not config.plan.dry_run or config.model.vocab_size is not None or kind in (*USUAL_SIZES, "NullTokenizer"):
        return
    if size_of_tokenizer(config.data) is None:
        yield Problem(
            ("--vocab-size", "--dry-run"),
            f"no file that a dry run reads tells the size of the {kind}'s vocabulary",
            "",
            "add --vocab-size 32000, or as many as the tokenizer has",
        )
