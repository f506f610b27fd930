"""Pretrains an encoder (BERT): masked words to find again, and whether two texts are in their order.

torchrun --nproc-per-node 8 pretrain_bert.py --num-layers 12 --hidden-size 768 ...
python pretrain_bert.py --help
"""

from __future__ import annotations

from megallm.config import Config
from megallm.train import program


def train(config: Config) -> int:
    """Trains as `config` says."""
    # Imported late: a mistake on the command line is answered before torch is loaded.
    from megallm.train.loop import pretrain
    from megallm.train.tasks.bert import BERTTask

    return pretrain(config, BERTTask.from_config)


PROGRAM = program.Program(
    name="pretrain_bert.py",
    description="Pretrains an encoder (BERT) in tensor, pipeline and data parallelism.",
    architecture="bert",
    train=train,
)


def main(arguments: list[str] | None = None) -> None:
    """From the command line to the training loop."""
    program.main(PROGRAM, arguments)


if __name__ == "__main__":
    main()
