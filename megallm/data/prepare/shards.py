"""Shares of the input for several machines, and their outputs as one."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megallm.data.indexed.format import file_paths
from megallm.data.indexed.merge import merge_datasets
from megallm.data.indexed.transfer import Piece
from megallm.data.prepare.work_folder import work_folder_path
from megallm.data.tokenizer.record import read_record


class Shard(NamedTuple):
    """One of `total` shares of the input, `number` from 0 on."""

    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    @property
    def suffix(self) -> str:
        """What follows the output prefix in the names of this shard's files."""
        return f"_shard_{self.number}_of_{self.total}"


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """The shard that `i/n` names, or with `auto` the one that the launcher gave this process.

    `auto` looks for RANK and WORLD_SIZE, as torchrun sets them, then for a Slurm array, then for tasks of srun.

    Raises:
        ValueError: the text is neither, there is no such shard, or no launcher says which.
    """
    if text == "auto":
        return _shard_of_launcher(environment)
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise ValueError(f"--shard {text} is neither i/n, such as 0/8 for the first of eight, nor auto.")
    return _checked(Shard(int(found[1]), int(found[2])), f"--shard {text}")


def _shard_of_launcher(environment: Mapping[str, str]) -> Shard:
    def number(name: str, default: str | None = None) -> int:
        value = environment.get(name, default)
        if value is None or not re.fullmatch(r"\d+", value):
            raise ValueError(f"--shard auto: the environment variable {name} is {value!r}, not a number.")
        return int(value)

    if "WORLD_SIZE" in environment:
        return _checked(Shard(number("RANK"), number("WORLD_SIZE")), "--shard auto, from RANK and WORLD_SIZE")
    if "SLURM_ARRAY_TASK_COUNT" in environment:
        distance = number("SLURM_ARRAY_TASK_ID") - number("SLURM_ARRAY_TASK_MIN", "0")
        step = max(1, number("SLURM_ARRAY_TASK_STEP", "1"))
        if distance % step:
            raise ValueError("--shard auto: the tasks of the Slurm array are not evenly numbered; give --shard i/n.")
        return _checked(Shard(distance // step, number("SLURM_ARRAY_TASK_COUNT")), "--shard auto, from the Slurm array")
    if "SLURM_NTASKS" in environment:
        return _checked(Shard(number("SLURM_PROCID"), number("SLURM_NTASKS")), "--shard auto, from Slurm's tasks")
    raise ValueError(
        "--shard auto: neither torchrun (RANK, WORLD_SIZE) nor Slurm (SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT) "
        "says which shard this is; give --shard i/n."
    )


def _checked(shard: Shard, source: str) -> Shard:
    if not shard.number < shard.total:
        raise ValueError(f"{source}: there is no shard {shard}; shards of {shard.total} are numbered from 0.")
    return shard


def dataset_prefix(prefix: str, key: str, sentences: bool) -> str:
    """Megatron's name for the dataset of one key, without .bin or .idx."""
    return f"{prefix}_{key}_{'sentence' if sentences else 'document'}"


def merge_shards(
    output_prefix: str,
    keys: Sequence[str],
    sentences: bool,
    count: int,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda size: None,
) -> list[Piece]:
    """Write the datasets that one job without shards would have written; the shards' stay.

    Gives the documents of each key's dataset.

    Raises:
        ValueError: a shard is missing, not finished or of another job, the output is there already, all shards are
            empty, or as `merge_datasets`.
    """
    merges: list[tuple[list[str], str]] = []
    for key in keys:
        parts = [dataset_prefix(output_prefix + Shard(number, count).suffix, key, sentences) for number in range(count)]
        _check_finished(output_prefix, parts)
        _check_one_job(parts)
        if sum(file_paths(part)[0].stat().st_size for part in parts) == 0:
            raise ValueError(f"All {count} shards together have no token under the key {key!r}.")
        merges.append((parts, dataset_prefix(output_prefix, key, sentences)))
    for path in (path for _, output in merges for path in file_paths(output)):
        if Path(path).exists() and not overwrite:
            raise ValueError(f"{path} is there already: replace it with --overwrite.")
    return [merge_datasets(parts, output, progress) for parts, output in merges]


def _check_finished(output_prefix: str, parts: Sequence[str]) -> None:
    for number, part in enumerate(parts):
        if file_paths(part)[1].exists():
            continue
        shard = Shard(number, len(parts))
        folder = work_folder_path(output_prefix + shard.suffix)
        state = f"is not finished: {folder} is there" if folder.exists() else f"is missing: there is no {part}.idx"
        raise ValueError(f"Shard {shard} {state}. Run it with --shard {shard}, then merge.")


def _check_one_job(parts: Sequence[str]) -> None:
    """Shards of other input or options would leave documents out, or have them twice."""
    jobs = [(read_record(part) or {}).get("job") for part in parts]
    for number, job in enumerate(jobs):
        if job != jobs[0]:
            shard, first = Shard(number, len(parts)), Shard(0, len(parts))
            raise ValueError(
                f"Shard {shard} is of another job than shard {first}: its input files or its options were others. Run "
                f"the one that is wrong again, with the command of the others and --overwrite, then merge."
            )
