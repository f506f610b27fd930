"""Draws losses, learning rate and gradient norm from files that --metrics-jsonl wrote, one line per file.

python tools/plot_metrics.py --output loss.png run1.jsonl run2.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megallm.data.command_line import ToolParser

PROGRAM = "plot_metrics.py"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="metrics as JSON lines")
    parser.add_argument("--labels", nargs="+", help="name of each file in the legend (default: the file's name)")
    parser.add_argument("--output", required=True, help="picture to write: .png, .svg or .pdf")
    return parser.parse_args(arguments)


def read(file: str) -> list[dict[str, Any]]:
    """The file's records. Raises ValueError where it cannot be read, or naming the line that is no JSON object."""
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"{file} cannot be read: {reason}; give a file that --metrics-jsonl wrote") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or "iteration" not in record:
            raise ValueError(f"{file}, line {number} is not a record of a step: it has no iteration")
        records.append(record)
    if not records:
        raise ValueError(f"{file} holds no record")
    return records


def draw(files: list[str], labels: list[str], output: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    rate_axis = bottom.twinx()
    for file, label in zip(files, labels, strict=True):
        records = read(file)
        steps = [record for record in records if "lm_loss" in record]
        checks = [record for record in records if "valid_lm_loss" in record]
        x = [record["iteration"] for record in steps]
        (line,) = top.plot(x, [record["lm_loss"] for record in steps], linewidth=1.2, label=f"{label}: training")
        top.plot(
            [record["iteration"] for record in checks],
            [record["valid_lm_loss"] for record in checks],
            marker="o",
            linestyle="none",
            color=line.get_color(),
            markeredgecolor="black",
            label=f"{label}: validation",
        )
        bottom.plot(x, [record["grad_norm"] for record in steps], linewidth=1.0, color=line.get_color())
        rate_axis.plot(
            x, [record["learning_rate"] for record in steps], linewidth=1.0, linestyle=":", color=line.get_color()
        )
    top.set_ylabel("cross-entropy (nats per token)")
    top.grid(alpha=0.3)
    top.legend()
    bottom.set_ylabel("gradient norm")
    rate_axis.set_ylabel("learning rate (dotted)")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    figure.savefig(output, dpi=130)


def main() -> int:
    arguments = parse(sys.argv[1:])
    labels = arguments.labels or [Path(file).stem for file in arguments.files]
    try:
        if len(labels) != len(arguments.files):
            raise ValueError(f"--labels names {len(labels)} of {len(arguments.files)} files; give one for each")
        draw(arguments.files, labels, arguments.output)
    except ImportError:
        print(f"{PROGRAM}: drawing needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
