"""Continues a text with a trained model, in any layout.

    python tools/generate.py --load CHECKPOINTS --prompt "def main("
    torchrun --nproc-per-node 4 tools/generate.py --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 ...

The model's shape and its tokenizer are those that the checkpoint was saved with.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from megallm.config import fail

PROGRAM = "generate.py"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", required=True, help="folder of checkpoints, or of one checkpoint")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--num-tokens", type=int, default=64, help="longest continuation, in tokens (default 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token (default 1)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k most likely tokens (default all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the most likely tokens of this total")
    parser.add_argument("--seed", type=int, default=1234, help="of the sampling (default 1234)")
    parser.add_argument("--tokenizer-model", help="where the tokenizer is now, if it moved since the training")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="processes that share a layer")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="processes that share the layers")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse(sys.argv[1:])
    try:
        run(arguments)
    except ValueError as error:
        fail(PROGRAM, error)


def run(arguments: argparse.Namespace) -> None:
    # Imported late, so that --help is quick.
    from megallm.checkpoint.load import find_checkpoints
    from megallm.checkpoint.manifest import read_manifest
    from megallm.config import from_dict
    from megallm.generate.sampling import SamplingSettings, generate_tokens
    from megallm.train.datasets import build_tokenizer_of
    from megallm.train.engine import build_model
    from megallm.train.processes import joined_processes
    from megallm.train.resume import load_weights
    from megallm.train.tasks.gpt import GPTTask

    settings = SamplingSettings(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    if arguments.num_tokens < 1:
        raise ValueError(f"--num-tokens {arguments.num_tokens} leaves nothing to do; give at least 1")
    folder = next(iter(find_checkpoints(arguments.load)), None)
    if folder is None:
        raise ValueError(f"--load {arguments.load} holds no complete checkpoint: a folder iter_... with a manifest")
    config = from_dict(read_manifest(folder).state["config"])
    if config.data.tokenizer_type in (None, "NullTokenizer"):
        raise ValueError("the model was trained on numbers, without a tokenizer of text: there is no text to continue")
    config = replace(
        config,
        parallel=replace(
            config.parallel,
            tensor_model_parallel_size=arguments.tensor_model_parallel_size,
            pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
            num_virtual_stages_per_pipeline_rank=1,
            pipeline_schedule="auto",
            distributed_backend=None,
        ),
        training=replace(config.training, micro_batch_size=1, global_batch_size=None, device=arguments.device),
        data=replace(config.data, tokenizer_model=arguments.tokenizer_model or config.data.tokenizer_model),
    )
    with joined_processes(config) as (config, mesh):
        tokenizer = build_tokenizer_of(config)
        assert tokenizer is not None, "the configuration names a tokenizer of text"
        if tokenizer.vocab_size > (config.model.vocab_size or 0):
            raise ValueError(
                f"the tokenizer {config.data.tokenizer_model} has {tokenizer.vocab_size} tokens, the model knows "
                f"{config.model.vocab_size}: give the tokenizer that it was trained with as --tokenizer-model"
            )
        model = build_model(config, GPTTask.from_config(config), mesh)
        load_weights(model, folder)
        prompt = tokenizer.encode(arguments.prompt)
        tokens = generate_tokens(model, prompt, arguments.num_tokens, settings, tokenizer.eod_id)
        if mesh.rank == 0:
            print(arguments.prompt + tokenizer.decode(tokens))


if __name__ == "__main__":
    main()
