"""What the training programs share: from the command line to the loop, with an answer to every mistake on the way.

Imports torch only once there is something to train: a mistake on the command line is answered before that.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from megallm.config import Config, PlanConfig, difference_yaml, fail, parse_arguments, stop
from megallm.config.environment import launcher_problem
from megallm.config.report import interrupted, warn_once, while_somebody_reads
from megallm.plan.validate import validate
from megallm.train.before_steps import sigterm_is_told


@dataclass(frozen=True)
class Program:
    """A training program.

    Attributes:
        name: of its file.
        description: one sentence for --help.
        architecture: of the models that it trains.
        train: trains as a configuration says, and returns the exit code; imports torch.
    """

    name: str
    description: str
    architecture: str
    train: Callable[[Config], int]


def main(program: Program, arguments: list[str] | None = None) -> None:
    """From the command line, by default that of the process, to the training loop."""
    try:
        _run(program, sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        interrupted(program.name, "--load continues from the last checkpoint")


def _run(program: Program, arguments: list[str]) -> None:
    problem = launcher_problem(os.environ)
    if problem:
        fail(program.name, ValueError(problem))
    with while_somebody_reads():
        config = parse_arguments(
            arguments,
            prog=program.name,
            description=program.description,
            architecture=program.architecture,
        )
    if config.plan.print_config or config.plan.dry_run:
        if os.environ.get("RANK", "0") == "0":
            with while_somebody_reads():
                _tell(program, config)
        return
    if not config.checkpoint.gives_model:
        _check(program, config)
    # Else the processes read the model's folder, and check the rest, once they have joined: one tells the others.
    with sigterm_is_told(program.name):
        _train(program, config)


def _tell(program: Program, config: Config) -> None:
    """What --print-config or --dry-run asks for."""
    if config.checkpoint.gives_model:
        config = _with_model_of_files(program.name, config)
    if config.plan.print_config:
        sys.stdout.write(difference_yaml(replace(config, plan=PlanConfig())))
        return
    world_size = _check(program, config)
    from megallm.plan.dry_run import dry_run, without_garbage_collection

    with without_garbage_collection():
        print(dry_run(config, world_size))
        _print_load_preview(program.name, config, world_size)
        # Python would look for cycles when the plan is told and again where the process ends, a fifth of the time of a
        # large one, but not in what is frozen.
        gc.freeze()


def _check(program: Program, config: Config) -> int:
    """The number of processes, for which the configuration must be right."""
    # A size below 1 is among the problems that are found, for any size.
    world_size = max(1, config.plan.world_size or int(os.environ.get("WORLD_SIZE", "1")))
    problems = validate(config, world_size)
    if problems:
        stop(program.name, [str(problem) for problem in problems])
    return world_size


def _train(program: Program, config: Config) -> None:
    try:
        # The operators are loaded here, as MEGALLM_OPS says.
        from megallm.train.saving import SaveError
        from megallm.train.stopping import ExitCode
    except ValueError as error:
        fail(program.name, error)
    try:
        with while_somebody_reads():
            code = program.train(config)
    except SaveError as error:
        fail(program.name, error, ExitCode.NOT_SAVED)
    except ValueError as error:
        fail(program.name, error)
    if code:
        sys.exit(code)


def _print_load_preview(name: str, config: Config, world_size: int) -> None:
    """What the run would take up, where it is on this machine; a plan without that needs no torch."""
    settings = config.checkpoint
    folders = list(filter(None, (settings.load, settings.pretrained_checkpoint, settings.load_hf)))
    if config.plan.json or not folders:
        return
    if not any(map(os.path.isdir, folders)):
        needed = settings.finetune or settings.exit_on_missing_checkpoint or len(folders) > 1 or not settings.load
        are, then = "is" if len(folders) == 1 else "are", "is refused" if needed else "starts afresh"
        print(f"\nLoading: {' and '.join(folders)} {are} not on this machine; a run that finds nothing there {then}")
        return
    from megallm.train.load_preview import load_preview

    try:
        print("\n" + "\n".join(load_preview(config, world_size)))
    except ValueError as error:
        fail(name, error)


def _with_model_of_files(name: str, config: Config) -> Config:
    from megallm.train.saved_arguments import with_model_of_files

    try:
        config, notes = with_model_of_files(config)
    except ValueError as error:
        fail(name, error)
    warn_once(name, notes)
    return config
