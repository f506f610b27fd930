r"""Converts models between Hugging Face, Megatron-LM and megallm, in bounded memory and without a GPU.

    python tools/convert_checkpoint.py --from hf --to megallm --load LLAMA_FOLDER --save CHECKPOINTS --verify
    python tools/convert_checkpoint.py --from megallm --to hf --load CHECKPOINTS --save FOLDER --dtype bfloat16
    python tools/convert_checkpoint.py --from megallm --to megallm --load CHECKPOINTS --save OTHERS --weights-only
    python tools/convert_checkpoint.py --from megatron --to megallm --load MEGATRON --save CHECKPOINTS --verify
    python tools/convert_checkpoint.py --from hf --to megatron --load LLAMA_FOLDER --save MEGATRON \
        --target-tensor-parallel-size 2 --target-pipeline-parallel-size 4
    python tools/convert_checkpoint.py --from megallm --to hf --load CHECKPOINTS --compare FOLDER

The kind of model is read from config.json, or from the checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megallm.config import ParallelConfig, fail
from megallm.config.report import interrupted, while_somebody_reads
from megallm.data.command_line import ToolParser

PROGRAM = "convert_checkpoint.py"
FORMATS = ("hf", "megallm", "megatron")
DTYPES = ("float64", "float32", "bfloat16", "float16")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--from", dest="source", required=True, choices=FORMATS, help="format of what is read")
    parser.add_argument("--to", dest="target", required=True, choices=FORMATS, help="format of what is written")
    parser.add_argument("--load", required=True, help="folder of the model, or of checkpoints")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--save", help="folder to write")
    where.add_argument(
        "--compare",
        metavar="OTHER",
        help="write nothing; tell how the model here, in the format of --to, differs: exit code 1 if it does",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as they are")
    parser.add_argument(
        "--ckpt-step", type=int, metavar="N", help="iteration of the checkpoint that is read; default: the newest"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --save")
    parser.add_argument("--verify", action="store_true", help="read what was written and compare it with its source")
    parser.add_argument("--verify-text", metavar="FILE", help="text on which --verify compares logits and losses")
    parser.add_argument("--weights-only", action="store_true", help="megallm to megallm: leave the optimizer behind")
    parser.add_argument("--max-shard-size", type=float, metavar="GB", help="size of a file of weights (hf; default 5)")
    parser.add_argument(
        "--true-vocab-size", type=int, metavar="N", help="of a Megatron model, without its padding; default: as it says"
    )
    parser.add_argument(
        "--megatron-implementation",
        choices=("transformer_engine", "local"),
        help="whose names a Megatron model is written with (default transformer_engine)",
    )
    layout = parser.add_argument_group("layout", "for whose ranks the files are cut")
    layout.add_argument("--target-tensor-parallel-size", type=int, metavar="N", help="default 1")
    layout.add_argument("--target-pipeline-parallel-size", type=int, metavar="N", help="default 1")
    layout.add_argument("--target-num-virtual-stages-per-pipeline-rank", type=int, metavar="N", help="default 1")
    return parser.parse_args(arguments)


def check_flags(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a number that cannot be, and for flags that would have no effect on this conversion."""
    writes = None if arguments.compare else arguments.target
    cuts = writes in ("megatron", "megallm")
    formats = (arguments.source, arguments.target)
    belongs = {
        "max_shard_size": (writes == "hf", "for a folder of Hugging Face's that is written: --to hf"),
        "megatron_implementation": (writes == "megatron", "for a Megatron model that is written: --to megatron"),
        "true_vocab_size": ("megatron" in formats, "for a Megatron model that is read: --from megatron"),
        "weights_only": (writes == arguments.source == "megallm", "from megallm to megallm"),
        "ckpt_step": (arguments.source != "hf", "where a folder holds several checkpoints: not with --from hf"),
        "verify_text": (arguments.verify, "for --verify"),
        "target_tensor_parallel_size": (cuts, "for --to megatron and --to megallm"),
        "target_pipeline_parallel_size": (cuts, "for --to megatron and --to megallm"),
        "target_num_virtual_stages_per_pipeline_rank": (cuts, "for --to megatron and --to megallm"),
        "overwrite": (bool(writes), "for --save"),
        "verify": (bool(writes), "for --save"),
        "dtype": (bool(writes), "for --save"),
    }
    for name, (has_effect, place) in belongs.items():
        flag, value = f"--{name.replace('_', '-')}", getattr(arguments, name)
        if value is None or value is False:
            continue
        if not has_effect:
            raise ValueError(f"{flag} has a meaning only {place}; leave it out")
        if isinstance(value, int | float) and value <= 0 and name != "ckpt_step":
            usual = "a size in GB, such as 5" if name == "max_shard_size" else "at least 1"
            raise ValueError(f"{flag} {value:g} is not positive; give {usual}")
    if arguments.verify_text and not Path(arguments.verify_text).is_file():
        raise ValueError(f"--verify-text {arguments.verify_text} is not a file")


def main() -> None:
    try:
        with while_somebody_reads():
            code = run(parse(sys.argv[1:]))
    except ValueError as error:
        fail(PROGRAM, error)
    except KeyboardInterrupt:
        interrupted(PROGRAM, "nothing half written is left")
    sys.exit(code)


def run(arguments: argparse.Namespace) -> int:
    check_flags(arguments)
    # Memory is made anew for each tensor. In pages of 4 KiB, handing it out costs as much as reading a file into it;
    # with this torch asks for large ones.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Imported late, so that --help is quick.
    import torch

    from megallm.convert.command import Output, Place, check, convert, report_comparison

    source = Place(arguments.source, Path(arguments.load), arguments.ckpt_step, arguments.true_vocab_size)
    source.check_kind("--from")
    if arguments.compare:
        other = Place(arguments.target, Path(arguments.compare), None, arguments.true_vocab_size)
        other.check_kind("--to")
        return int(report_comparison(source, other, print))
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    parallel = ParallelConfig(
        tensor_model_parallel_size=arguments.target_tensor_parallel_size or 1,
        pipeline_model_parallel_size=arguments.target_pipeline_parallel_size or 1,
        num_virtual_stages_per_pipeline_rank=arguments.target_num_virtual_stages_per_pipeline_rank or 1,
    )
    output = Output(
        dtype,
        parallel,
        arguments.megatron_implementation or "transformer_engine",
        arguments.overwrite,
        int((arguments.max_shard_size or 5.0) * 1e9),
        arguments.weights_only,
    )
    target = convert(source, Place(arguments.target, Path(arguments.save)), output)
    print(f"wrote {target.path}")
    if arguments.verify:
        check(source, target, dtype, Path(arguments.verify_text) if arguments.verify_text else None, print)
    return 0


if __name__ == "__main__":
    main()
