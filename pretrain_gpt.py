"""Pretrains a decoder-only transformer (GPT, Llama).

torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 8 --hidden-size 192 ...
python pretrain_gpt.py --help
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from megallm.config import Config, PlanConfig, difference_yaml, fail, parse_arguments, stop
from megallm.config.report import warn_once
from megallm.plan.validate import validate


def main(arguments: list[str] | None = None) -> None:
    """From the command line to the training loop."""
    program = "pretrain_gpt.py"
    config = parse_arguments(
        sys.argv[1:] if arguments is None else arguments,
        prog=program,
        description="Pretrains a decoder-only transformer in tensor, pipeline and data parallelism.",
    )
    if config.checkpoint.use_checkpoint_args:
        config = _with_saved_model(program, config)
    if config.checkpoint.load_hf:
        config = _with_hugging_face_model(program, config)
    is_first = os.environ.get("RANK", "0") == "0"
    if config.plan.print_config:
        sys.stdout.write(difference_yaml(replace(config, plan=PlanConfig())) if is_first else "")
        return
    world_size = config.plan.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    problems = validate(config, world_size)
    if problems:
        stop(program, [str(problem) for problem in problems])
    if config.plan.dry_run:
        from megallm.plan.dry_run import dry_run

        if is_first:
            print(dry_run(config, world_size))
            _print_load_preview(program, config, world_size)
        return
    # Imported late: a mistake on the command line is answered before torch is loaded.
    from megallm.generate.text import SampleWriter
    from megallm.train.loop import pretrain
    from megallm.train.saving import SaveError
    from megallm.train.stopping import ExitCode
    from megallm.train.tasks.gpt import GPTTask

    try:
        code = pretrain(config, GPTTask.from_config, SampleWriter())
    except SaveError as error:
        fail(program, error, ExitCode.NOT_SAVED)
    except ValueError as error:
        fail(program, error)
    except KeyboardInterrupt:
        if is_first:
            print(f"{program}: interrupted; --load continues from the last checkpoint", file=sys.stderr, flush=True)
        # Other ranks may be gone: leaving in an orderly way would wait for them.
        os._exit(ExitCode.INTERRUPTED)
    if code:
        sys.exit(code)


def _print_load_preview(program: str, config: Config, world_size: int) -> None:
    """What the run would take up, where it is on this machine; a plan without that needs no torch."""
    folders = config.checkpoint.load, config.checkpoint.pretrained_checkpoint
    if config.plan.json or not any(folder and os.path.isdir(folder) for folder in folders):
        return
    from megallm.train.load_preview import load_preview

    try:
        print("\n" + "\n".join(load_preview(config, world_size)))
    except ValueError as error:
        fail(program, error)


def _with_saved_model(program: str, config: Config) -> Config:
    from megallm.train.saved_arguments import with_saved_model

    try:
        config, notes = with_saved_model(config)
    except ValueError as error:
        fail(program, error)
    warn_once(program, notes)
    return config


def _with_hugging_face_model(program: str, config: Config) -> Config:
    from megallm.train.hugging_face import with_hugging_face_model

    try:
        return with_hugging_face_model(config)
    except ValueError as error:
        fail(program, error)


if __name__ == "__main__":
    main()
