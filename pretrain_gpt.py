"""Pretrains a decoder-only transformer (GPT, Llama).

torchrun --nproc-per-node 8 pretrain_gpt.py --num-layers 8 --hidden-size 192 ...
python pretrain_gpt.py --help
"""

from __future__ import annotations

from megallm.config import Config
from megallm.train import program


def train(config: Config) -> int:
    """Trains as `config` says, and lets the model write texts where that is asked for."""
    # Imported late: a mistake on the command line is answered before torch is loaded.
    from megallm.generate.text import SampleWriter
    from megallm.train.loop import pretrain
    from megallm.train.tasks.gpt import GPTTask

    return pretrain(config, GPTTask.from_config, SampleWriter())


PROGRAM = program.Program(
    name="pretrain_gpt.py",
    description="Pretrains a decoder-only transformer in tensor, pipeline and data parallelism.",
    architecture="gpt",
    train=train,
)


def main(arguments: list[str] | None = None) -> None:
    """From the command line to the training loop."""
    program.main(PROGRAM, arguments)


if __name__ == "__main__":
    main()
