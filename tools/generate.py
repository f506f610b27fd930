"""Continues a text with a trained model, in any layout.

    python tools/generate.py --load CHECKPOINTS --prompt "def main("
    torchrun --nproc-per-node 4 tools/generate.py --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 ...

The model's shape and its tokenizer are those that the checkpoint was saved with. Text number n of several is sampled
with seed + n, as if it were alone.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from megallm.config import fail
from megallm.config.report import interrupted
from megallm.data.command_line import ToolParser

PROGRAM = "generate.py"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--load", required=True, help="folder of checkpoints, or of one checkpoint")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue")
    source.add_argument("--prompts", metavar="FILE", help="texts to continue, one a line; - reads standard input")
    parser.add_argument("--num-tokens", type=int, default=64, help="longest continuation, in tokens (default 64)")
    parser.add_argument("--batch-size", type=int, default=8, help="texts that are written at a time (default 8)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k most likely tokens (default 0: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="choose among the likeliest tokens whose probabilities sum to this (default 1: all)",
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: what was there becomes less likely (default 1)"
    )
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end the continuation")
    parser.add_argument("--seed", type=int, default=1234, help="of the sampling of the first text (default 1234)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the text")
    parser.add_argument("--tokenizer-model", help="where the tokenizer is now, if it moved since the training")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="processes that share a layer")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="processes that share the layers")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
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
    from megallm.generate.choice import SamplingSettings
    from megallm.generate.text import continue_texts, read_prompts
    from megallm.train.trained import Placement, trained_model

    settings = SamplingSettings(
        arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed, arguments.repetition_penalty
    )
    if arguments.num_tokens < 1:
        raise ValueError(f"--num-tokens {arguments.num_tokens} leaves nothing to do; give at least 1")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size} leaves nothing to write at a time; give at least 1")
    placement = Placement(
        arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size, device=arguments.device
    )
    with trained_model(arguments.load, placement, arguments.tokenizer_model) as (model, tokenizer):
        prompts = read_prompts(model.mesh, arguments.prompts) if arguments.prompts else [arguments.prompt]
        for first in range(0, len(prompts), arguments.batch_size):
            batch = prompts[first : first + arguments.batch_size]
            own = [replace(settings, seed=settings.seed + first + number) for number in range(len(batch))]
            texts = continue_texts(model, tokenizer, batch, arguments.num_tokens, own, arguments.stop)
            for prompt, continuation in zip(batch, texts, strict=True):
                if model.mesh.rank == 0:
                    text = json.dumps({"prompt": prompt, "continuation": continuation})
                    print(text if arguments.json else prompt + continuation, flush=True)


if __name__ == "__main__":
    main()
