"""Shows what is in a checkpoint, verifies every byte of it, and compares it with another."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megallm.data.command_line import ToolParser, natural, progress_of

if TYPE_CHECKING:
    from argparse import Namespace

    from megallm.checkpoint.reading import OpenCheckpoint
    from megallm.config import Config

DESCRIPTION = """\
Shows what is in a checkpoint: where its run stood, with which settings, and its tensors as a tree with their types and
shapes. Whatever is read is compared with its checksums; --verify reads everything.

The folder is one of checkpoints, of which the newest is taken, or one checkpoint's own.
Exit code: 0; 1 where --diff finds a difference; 2 where a checkpoint is damaged or cannot be read."""
EPILOG = """\
examples:
  python tools/inspect_checkpoint.py checkpoints
  python tools/inspect_checkpoint.py checkpoints --verify --norms
  python tools/inspect_checkpoint.py checkpoints/iter_0000500 --diff checkpoints/iter_0001000
  python tools/inspect_checkpoint.py checkpoints --config > run.yaml"""


def build_parser() -> ToolParser:
    parser = ToolParser(DESCRIPTION, EPILOG)
    parser.add_argument("folder", help="folder of checkpoints, or of one checkpoint")
    parser.add_argument("--ckpt-step", type=natural, metavar="N", help="iteration of the checkpoint (the newest)")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare it with its checksum")
    parser.add_argument("--norms", action="store_true", help="read the tensors, for their norms and ranges")
    parser.add_argument("--kind", action="append", metavar="KIND", help="only tensors of this kind, such as weights")
    parser.add_argument("--config", action="store_true", help="print the configuration alone, as --config reads it")
    parser.add_argument("--diff", metavar="OTHER", help="tell what is different in another checkpoint")
    parser.add_argument("--json", action="store_true", help="print one object, as JSON")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    options = parser.parse_args(argv)
    differs = False

    def work() -> None:
        nonlocal differs
        differs = run(options)

    parser.run(work)
    if differs:
        raise SystemExit(1)


def run(options: Namespace) -> bool:
    """Does what is asked; returns whether a difference was found."""
    # Imported late, so that --help is quick.
    from megallm.checkpoint.load import newest_checkpoint
    from megallm.checkpoint.reading import open_checkpoint

    folder = newest_checkpoint(options.folder, options.ckpt_step)
    with open_checkpoint(folder) as checkpoint:
        if options.config:
            from megallm.config import to_yaml

            print(to_yaml(configuration(checkpoint)), end="")
            return False
        if options.diff is not None:
            with open_checkpoint(newest_checkpoint(options.diff)) as other:
                found = compare(checkpoint, other)
            print(json.dumps(found, indent=2)) if options.json else print_changes(found)
            return any(found[part] for part in ("state", "tensors"))
        result = inspect(checkpoint, options)
        print(json.dumps(result, indent=2)) if options.json else print_result(result)
        return False


def inspect(checkpoint: OpenCheckpoint, options: Namespace) -> dict[str, Any]:
    """Everything that is asked about a checkpoint."""
    from megallm.checkpoint.inspection import split_name, values_of
    from megallm.checkpoint.load import check_files, verify
    from megallm.config import Config, difference

    manifest, folder = checkpoint.manifest, checkpoint.folder
    check_files(folder, manifest.files)
    kinds = list(dict.fromkeys(split_name(name)[0] for name in manifest.tensors))
    unknown = [kind for kind in options.kind or [] if kind not in kinds]
    if unknown:
        raise ValueError(f"--kind {unknown[0]}: {folder} holds {', '.join(kinds)}")
    shown = {name: row for name, row in manifest.tensors.items() if split_name(name)[0] in (options.kind or kinds)}
    total = sum(file.num_bytes for file in manifest.files)
    result: dict[str, Any] = {
        "folder": str(folder),
        "iteration": manifest.iteration,
        "token": manifest.token,
        "bytes": total,
        "files": {file.name: file.num_bytes for file in manifest.files},
        "state": manifest.state,
        "settings": {name: value for name, _, value in difference(Config(), configuration(checkpoint))},
        "verified": options.verify,
    }
    if options.verify:
        with progress_of(total) as progress:
            for _, count in verify(folder):
                progress(count)
    result["tensors"] = {
        name: {"dtype": row.dtype, "shape": list(row.shape), "boxes": len(row.boxes)} for name, row in shown.items()
    }
    if options.norms:
        with progress_of(sum(box.num_bytes for row in shown.values() for box in row.boxes)) as progress:
            for name in shown:
                result["tensors"][name] |= asdict(values_of(checkpoint, name, progress))
    return result


def configuration(checkpoint: OpenCheckpoint) -> Config:
    """The settings of the run that saved it. Raises ValueError where this version cannot read them."""
    from megallm.config import from_dict

    try:
        return from_dict(checkpoint.manifest.state["config"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"the configuration in {checkpoint.folder} cannot be read: {error}") from None


def compare(first: OpenCheckpoint, second: OpenCheckpoint) -> dict[str, Any]:
    """What is different in two checkpoints: states and tensors."""
    from megallm.checkpoint.inspection import changes_of_state, changes_of_tensors

    states = [
        {"iteration": checkpoint.manifest.iteration, **checkpoint.manifest.state} for checkpoint in (first, second)
    ]
    with progress_of(
        sum(box.num_bytes for row in first.manifest.tensors.values() for box in row.boxes) * 2
    ) as progress:
        tensors = changes_of_tensors(first, second, progress)
    return {
        "folders": [str(first.folder), str(second.folder)],
        "num_tensors": len(dict.fromkeys([*first.manifest.tensors, *second.manifest.tensors])),
        "state": [{"name": name, "first": old, "second": new} for name, old, new in changes_of_state(*states)],
        "tensors": {name: asdict(change) for name, change in tensors.items()},
    }


def print_result(result: dict[str, Any]) -> None:
    state = result["state"]
    print(
        f"{result['folder']}: iteration {result['iteration']}, {len(result['files'])} files, {result['bytes']:,} bytes"
    )
    print(f"  {'every byte is' if result['verified'] else 'manifest, headers and sizes are'} as written")
    print("\nstate")
    for name, value in state.items():
        if name != "config":
            print(f"  {json.dumps(name)[1:-1]}: {json.dumps(value)}")
    print("\nsettings that are not the default (all: --config)")
    for name, value in result["settings"].items():
        print(f"  {name}: {json.dumps(value)}")
    print_tensors(result["tensors"])


def print_tensors(tensors: dict[str, Any]) -> None:
    from megallm.checkpoint.inspection import split_name, tree_lines

    for kind in dict.fromkeys(split_name(name)[0] for name in tensors):
        rows = {split_name(name)[1]: row for name, row in tensors.items() if split_name(name)[0] == kind}
        print(f"\n{kind}: {len(rows)} tensors, {sum(math.prod(row['shape']) for row in rows.values()):,} elements")
        for depth, shown, name in tree_lines(list(rows)):
            line = f"{'  ' * (depth + 1)}{shown}"
            if name is not None:
                row = rows[name]
                line = f"{line:<44} {row['dtype']:<5} {row['shape']!s:<16}"
                if "norm" in row:
                    line += f" norm {row['norm']:.6g}, {row['lowest']:.4g} to {row['highest']:.4g}"
                    line += f", {row['non_finite']} NOT FINITE" if row["non_finite"] else ""
            print(line.rstrip())


def print_changes(found: dict[str, Any]) -> None:
    from megallm.checkpoint.inspection import elements_differ

    first, second = found["folders"]
    print(f"{first} -> {second}")
    for row in found["state"]:
        print(f"  {json.dumps(row['name'])[1:-1]}: {json.dumps(row['first'])} -> {json.dumps(row['second'])}")
    same = found["num_tensors"] - len(found["tensors"])
    print(f"  {same} of {found['num_tensors']} tensors are the same, bit for bit")
    for name, change in found["tensors"].items():
        line = f"  {name}: {change['what']}"
        if change["num_elements"]:
            line += f": {elements_differ(change['num_elements'])}, at most by {change['largest']:.6g}"
            line += f", at {list(change['element'])}, norm {change['norm']:.6g}"
        print(line)


if __name__ == "__main__":
    main()
