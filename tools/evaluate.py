"""Tells how well a trained model predicts a text: loss and perplexity per token, word and byte, in any layout.

    python tools/evaluate.py --load CHECKPOINTS --data-path data/held_out_text_document
    python tools/evaluate.py --load CHECKPOINTS --text held_out.txt
    torchrun --nproc-per-node 4 tools/evaluate.py --tensor-model-parallel-size 2 ...

Tokens are cut into windows of the sequence length that the model was trained with, each predicted from its own
beginning on. Figures per word and byte may be compared between models with different tokenizers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megallm.config import fail
from megallm.config.report import interrupted, why_unreadable
from megallm.data.command_line import ToolParser

if TYPE_CHECKING:
    import numpy as np

    from megallm.data.tokenizer.base import Tokenizer

PROGRAM = "evaluate.py"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--load", required=True, help="folder of checkpoints, or of one checkpoint")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-path", metavar="PREFIX", help="dataset of .bin and .idx, made with the same tokenizer")
    source.add_argument("--text", metavar="FILE", help="text, taken as one document")
    parser.add_argument("--max-documents", type=int, help="look at the first ones only")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="windows at once (default 1)")
    parser.add_argument("--tokenizer-model", help="where the tokenizer is now, if it moved since the training")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="processes that share a layer")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="processes that share the layers")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        run(options)
    except ValueError as error:
        fail(PROGRAM, error)
    except KeyboardInterrupt:
        interrupted(PROGRAM)


def run(arguments: argparse.Namespace) -> None:
    # Imported late, so that --help is quick.
    from megallm.agreement import on_every_rank
    from megallm.train.perplexity import score
    from megallm.train.trained import Placement, trained_model

    placement = Placement(
        arguments.tensor_model_parallel_size,
        arguments.pipeline_model_parallel_size,
        arguments.micro_batch_size,
        arguments.device,
    )
    with trained_model(arguments.load, placement, arguments.tokenizer_model) as (model, tokenizer):
        figures = score(model, tokenizer, on_every_rank(model.mesh, lambda: documents(arguments, tokenizer))).to_dict()
        if model.mesh.rank == 0:
            print(json.dumps(figures) if arguments.json else table(figures), flush=True)


def documents(arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The tokens of each document. Raises ValueError where the data cannot be read or was made by another tokenizer."""
    import numpy as np

    from megallm.data.indexed.reader import IndexedDataset
    from megallm.data.tokenizer.record import check_records

    if arguments.text:
        try:
            text = Path(arguments.text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text {arguments.text} cannot be read: {why_unreadable(error)}") from None
        return [np.array(tokenizer.encode(text), dtype=np.int64)]
    check_records([arguments.data_path], tokenizer)
    dataset = IndexedDataset(arguments.data_path)
    chosen = range(min(dataset.num_documents, arguments.max_documents or dataset.num_documents))
    return [dataset.tokens(*dataset.document_range(number)) for number in chosen]


def table(figures: dict[str, float]) -> str:
    """The figures for people."""
    lines = [f"{'':8}{'count':>14}{'loss':>12}{'perplexity':>14}"]
    for unit in ("token", "word", "byte"):
        lines.append(
            f"{unit + 's':8}{figures[unit + 's']:14,.0f}{figures[f'loss_per_{unit}']:12.4f}"
            f"{figures[f'perplexity_per_{unit}']:14.6g}"
        )
    return "\n".join([*lines, f"bits per byte: {figures['bits_per_byte']:.4f}"])


if __name__ == "__main__":
    main()
