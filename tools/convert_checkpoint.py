"""Converts models between Hugging Face folders and megallm checkpoints, in bounded memory and without a GPU.

    python tools/convert_checkpoint.py --from hf --to megallm --load LLAMA_FOLDER --save CHECKPOINTS
    python tools/convert_checkpoint.py --from megallm --to hf --load CHECKPOINTS --save FOLDER --dtype bfloat16

The kind of model is read from config.json, or from the checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megallm.config import fail

PROGRAM = "convert_checkpoint.py"
FORMATS = ("hf", "megallm")
DTYPES = ("float64", "float32", "bfloat16", "float16")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--from", dest="source", required=True, choices=FORMATS, help="format of what is read")
    parser.add_argument("--to", dest="target", required=True, choices=FORMATS, help="format of what is written")
    parser.add_argument("--load", required=True, help="folder of the model, or of checkpoints")
    parser.add_argument("--save", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights; default: as they are")
    parser.add_argument("--ckpt-step", type=int, help="iteration of the checkpoint that is read; default: the newest")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --save")
    parser.add_argument(
        "--max-shard-size", type=float, default=5.0, metavar="GB", help="size of a file of weights (hf; default 5)"
    )
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse(sys.argv[1:])
    try:
        run(arguments)
    except ValueError as error:
        fail(PROGRAM, error)


def run(arguments: argparse.Namespace) -> None:
    # Imported late, so that --help is quick.
    import torch

    from megallm.convert.huggingface import open_folder, write_folder
    from megallm.convert.native import find_native, open_native, write_native
    from megallm.convert.output import log_line

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if arguments.source == "hf":
        opened = open_folder(Path(arguments.load))
    else:
        opened = open_native(find_native(arguments.load, arguments.ckpt_step))
    save = Path(arguments.save)
    with opened as weights:
        if arguments.target == "hf":
            write_folder(
                save,
                weights,
                dtype,
                overwrite=arguments.overwrite,
                max_shard_bytes=int(arguments.max_shard_size * 1e9),
                log=log_line,
            )
        else:
            save = write_native(save, weights, dtype, overwrite=arguments.overwrite, log=log_line)
    print(f"wrote {save}")


if __name__ == "__main__":
    main()
