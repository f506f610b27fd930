"""What `--dry-run` prints. Needs no torch."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

from megallm.config import resolve
from megallm.config.tree import Config
from megallm.plan.alternatives import changes_that_fit, next_best
from megallm.plan.gpus import DEFAULT_GPU, GPUS
from megallm.plan.plan import make_plan
from megallm.plan.report import plan_text
from megallm.plan.stages import Layout
from megallm.plan.vocabulary import USUAL_SIZES, size_of_tokenizer

_NEXT_BEST = 3


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """A plan makes hundreds of thousands of events and no cycles: to look for them was a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def dry_run(config: Config, world_size: int) -> str:
    """The plan of a valid configuration for `world_size` processes, as text or as JSON."""
    notes = []
    if config.model.vocab_size is None:
        kind = str(config.data.tokenizer_type)
        size = size_of_tokenizer(config.data)
        if size is None:
            size = USUAL_SIZES[kind]
            notes.append(f"the usual vocabulary of the {kind} is assumed: {size:,}; --vocab-size says another")
        config = replace(config, model=replace(config.model, vocab_size=size))
    if find_spec("megallm._C") is None:
        notes.append(
            "native operators are assumed, which are not built here; --ops reference plans for plain torch in their "
            "place"
        )
    gpu = GPUS[config.plan.gpu_type or DEFAULT_GPU]
    layout = Layout(resolve(config, world_size), world_size)
    plan = make_plan(layout, gpu)
    others = next_best(plan, _NEXT_BEST)
    changes = [] if plan.fits else changes_that_fit(plan)
    if config.plan.json:
        told = plan.to_dict() | {
            "next_best": [other.to_dict() for other in others],
            "changes_that_fit": [{"flags": change.flags} | change.plan.to_dict() for change in changes],
            "notes": notes,
        }
        return json.dumps(told, indent=2)
    return plan_text(plan, others, changes, notes)
