"""Folders of Hugging Face models: opened with everything checked before a tensor is read, and written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from megallm.checkpoint.manifest import MANIFEST
from megallm.config.tree import Config, DataConfig, ModelConfig
from megallm.convert.ahead import read_ahead
from megallm.convert.families import FAMILIES, LACKING
from megallm.convert.family import Family, is_left_behind, is_surplus, may_lack
from megallm.convert.fresh import WithFresh
from megallm.convert.model import Weights, config_of, logical_shapes
from megallm.convert.output import Progress, new_folder, where_now
from megallm.convert.raw import RawFiles, RawTensor
from megallm.convert.safetensors_file import Declared, read_header, write_file
from megallm.convert.stored import LogicalTensors, Stored, StoredTensors, gather
from megallm.convert.tokenizer_files import check_tokenizer, tokenizer_settings, write_companions, write_json
from megallm.convert.torch_file import read_torch_file

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
_TORCH_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@contextmanager
def open_folder(folder: Path) -> Iterator[Weights]:
    """The model in a folder, for as long as the block lasts.

    Raises:
        ValueError: a sentence about what is wrong: an architecture or a feature that megallm does not have, a missing
            or broken file, a tensor that is missing, surplus, or of another shape, a tokenizer that is too large.
    """
    folder = where_now(folder)
    family = family_of(read_config(folder), folder)
    config = config_of(read_settings(folder), DataConfig(**tokenizer_settings(folder)))
    check_tokenizer(folder, config.model.vocab_size or 0)
    shapes = logical_shapes(config)
    found = find_tensors(folder, family)
    wanted = family.stored(config.model, shapes)
    fresh = [part.name for one in wanted if one.name not in found for part in one.parts if may_lack(family, part.name)]
    stored = _match(folder, family, [one for one in wanted if one.parts[0].name not in fresh], found)
    with RawFiles() as files:
        _check_tied_head(folder, family, config, found, files)
        there = {name: shape for name, shape in shapes.items() if name not in fresh}
        tensors: LogicalTensors = StoredTensors(files, stored, there)
        if fresh:
            tensors = WithFresh(tensors, config, fresh)
        notes = tuple(_notes(folder, family, fresh, found))
        yield Weights(config, shapes, tensors, folder, fresh=tuple(fresh), notes=notes)


def _notes(folder: Path, family: Family, fresh: list[str], found: Mapping[str, RawTensor]) -> Iterator[str]:
    if fresh:
        yield (
            f"{folder} holds a {family.architecture} without {', '.join(fresh)}: they begin with their initial values"
        )
    left = [name for name in found if is_left_behind(family, name)]
    if left:
        yield f"{folder} also holds {', '.join(left)}, for which a {family.architecture} has no use: they stay behind"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`. Raises ValueError where there is none that can be read."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        if any(file.exists() for file in (folder / MANIFEST, *folder.glob(f"iter_*/{MANIFEST}"))):
            raise ValueError(
                f"{folder} holds checkpoints of megallm's and no Hugging Face model: --load continues their run, and "
                "--pretrained-checkpoint begins another with their weights"
            ) from None
        raise ValueError(
            f"{path} cannot be read: {error.strerror}; a Hugging Face model is a folder with a config.json, "
            "safetensors and the tokenizer's files"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return config


def read_settings(folder: Path) -> ModelConfig:
    """Our settings of the model in a folder. Raises ValueError where it is none that megallm has."""
    theirs = read_config(folder)
    return family_of(theirs, folder).read_settings(theirs)


def family_of(theirs: Mapping[str, Any], folder: Path) -> Family:
    """The family of a model by its architecture, or where none is given by its type.

    Raises ValueError, with the known ones, where it is none of them.
    """
    named = theirs.get("architectures")
    by_name = {family.architecture: family for family in FAMILIES} | {family.model_type: family for family in FAMILIES}
    wanted = str((named[0] if named and isinstance(named, list) else named) or theirs.get("model_type"))
    if wanted in LACKING:
        raise ValueError(f"{folder / CONFIG} describes a {wanted}, and megallm does not have its {LACKING[wanted]}")
    if wanted not in by_name:
        known = ", ".join(family.architecture for family in FAMILIES)
        close = get_close_matches(wanted, by_name, n=1)
        hint = f"; the nearest is {close[0]}" if close else ""
        raise ValueError(f"{folder / CONFIG} describes the architecture {wanted!r}; known are {known}{hint}")
    family = by_name[wanted]
    if "quantization_config" in theirs:
        raise ValueError(
            f"{folder} holds quantized weights; give the model from which they were made, in bfloat16 or float32"
        )
    return family


def find_tensors(folder: Path, family: Family) -> dict[str, RawTensor]:
    """All tensors of a folder by their full names.

    Raises ValueError for a file that is missing or broken.
    """
    found = {_as_now(name, family): raw for name, raw in _all_tensors(folder).items()}
    # Models that were saved without their head leave the prefix away.
    if not family.prefix or any(name.startswith(family.prefix) for name in found):
        return found
    return {name if name.startswith(f"{family.head}.") else family.prefix + name: raw for name, raw in found.items()}


def _as_now(name: str, family: Family) -> str:
    """The name of a tensor as newer versions write it."""
    old = next((ending for ending in family.older if name.endswith(ending)), "")
    return name.removesuffix(old) + family.older.get(old, "")


def _all_tensors(folder: Path) -> dict[str, RawTensor]:
    """From the first of the known forms that is there, with every shard that its index names."""
    for index, single, read in _FORMS:
        if (folder / index).exists():
            return _with_shards(folder, index, read)
        if (folder / single).exists():
            return read(folder / single)
    names = " nor ".join(name for index, single, _ in _FORMS for name in (single, index))
    raise ValueError(f"{folder} holds a {CONFIG}, but no weights: neither {names}")


def _with_shards(folder: Path, index_name: str, read: Callable[[Path], dict[str, RawTensor]]) -> dict[str, RawTensor]:
    index = folder / index_name
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        names = sorted({file + "" for file in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not an index of weights: it has no weight_map of names of files") from None
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index} names a file outside of its folder: {outside[0]}")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{len(missing)} of the {len(names)} files that {index} names are not there: {missing[0]}")
    found: dict[str, RawTensor] = {}
    for name in names:
        found |= read(folder / name)
    absent = sorted(places.keys() - found.keys())
    if absent:
        raise ValueError(f"{places[absent[0]]} of {folder} does not hold {absent[0]}, which {index_name} places there")
    return found


def _read_pickled(path: Path) -> dict[str, RawTensor]:
    """The tensors of a file of torch's. Raises ValueError where it holds anything else."""
    content = read_torch_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a dictionary of tensors")
    others = [str(name) for name, value in content.items() if not isinstance(value, RawTensor)]
    if others:
        raise ValueError(f"{path} holds what are no tensors of weights: {', '.join(others[:3])}")
    return content


_FORMS: tuple[tuple[str, str, Callable[[Path], dict[str, RawTensor]]], ...] = (
    (INDEX, SINGLE, read_header),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", _read_pickled),
)


def _match(
    folder: Path, family: Family, wanted: list[Stored], found: Mapping[str, RawTensor]
) -> list[tuple[Stored, RawTensor]]:
    """Each wanted tensor with its place. Raises ValueError for one that is missing, surplus or of another shape."""
    pairs, problems = [], []
    for stored in wanted:
        raw = found.get(stored.name)
        if raw is None:
            problems.append(f"{stored.name} of shape {list(stored.shape)} is missing")
        elif raw.shape != stored.shape:
            problems.append(f"{stored.name} has shape {list(raw.shape)}, but config.json wants {list(stored.shape)}")
        elif raw.dtype is None:
            problems.append(f"{stored.name} is of a type that weights do not have")
        else:
            pairs.append((stored, raw))
    known = {stored.name for stored in wanted} | {f"{family.head}.weight", *family.copies}
    problems += [
        f"{name} of shape {list(raw.shape)} is none of a {family.architecture}"
        for name, raw in found.items()
        if name not in known and not is_surplus(family, name) and not is_left_behind(family, name)
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{folder} does not hold the model of its config.json: {'; '.join(problems[:3])}{more}")
    return pairs


def _check_tied_head(
    folder: Path, family: Family, config: Config, found: Mapping[str, RawTensor], files: RawFiles
) -> None:
    """A head in the file of a model whose head is its embedding must be just that."""
    head = found.get(f"{family.head}.weight")
    if head is None or head.dtype is None or not config.model.tie_embeddings:
        return
    names = r"(.*\.)?(embed_tokens|wte|embed_in|word_embeddings)\.weight"
    embedding = next(raw for name, raw in found.items() if re.fullmatch(names, name))
    if (head.shape, head.dtype) == (embedding.shape, embedding.dtype):
        step = max(1, 2**26 // (head.shape[1] * head.dtype.itemsize))
        for row in range(0, head.shape[0], step):
            shape = (min(step, head.shape[0] - row), head.shape[1])
            one, other = torch.empty(shape, dtype=head.dtype), torch.empty(shape, dtype=head.dtype)
            files.fill(head, (row, 0), one)
            files.fill(embedding, (row, 0), other)
            if not torch.equal(one, other):
                break
        else:
            return
    raise ValueError(
        f"{folder} ties its head to the embedding, but {family.head}.weight is another matrix; to keep it, set "
        "tie_word_embeddings to false in config.json"
    )


def write_folder(
    final: Path,
    weights: Weights,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    log: Callable[[str], None] = lambda text: None,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Writes a model as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    `dtype` None keeps the types that the tensors have. The vocabulary has its true size. `between` is called between
    tensors; what it raises ends the writing, and leaves nothing.

    Raises:
        ValueError: no known architecture holds the model, naming what each lacks; or the folder cannot be written.
    """
    theirs = {} if weights.origin is None else read_config_if_any(weights.origin)
    family, entries = choose_family(weights.config, theirs.get("model_type"))
    stored = family.stored(weights.config.model, weights.shapes)
    declared = [Declared(one.name, dtype or _common_dtype(one, weights), one.shape) for one in stored]
    shards = _shards(declared, max_shard_bytes)
    total = sum(one.num_bytes for one in declared)
    progress = Progress(total, log)

    def read(number: int) -> torch.Tensor:
        return gather(stored[number], weights.tensors, declared[number].dtype)

    def advance(num_bytes: int) -> None:
        progress.advance(num_bytes)
        between()

    with new_folder(final, total, overwrite) as folder:
        with read_ahead([one.num_bytes for one in declared], read, advance) as tensors:
            for number, shard in enumerate(shards):
                write_file(folder / _shard_name(number, len(shards)), shard, islice(tensors, len(shard)))
        if len(shards) > 1:
            places = {
                one.name: _shard_name(number, len(shards)) for number, shard in enumerate(shards) for one in shard
            }
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        tokens = write_companions(folder, weights.config.data, weights.origin)
        name = _TORCH_NAMES[max((one.dtype for one in declared), key=lambda kind: kind.itemsize)]
        write_json(folder / CONFIG, entries | tokens | {"dtype": name, "torch_dtype": name})
    progress.finish()


def read_config_if_any(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder that may hold a tokenizer only."""
    return read_config(folder) if (folder / CONFIG).exists() else {}


def choose_family(config: Config, model_type: str | None) -> tuple[Family, dict[str, Any]]:
    """The family that holds a model, that of `model_type` before others, and its entries of `config.json`.

    Raises ValueError, with what each lacks, where there is none.
    """
    reasons = []
    for family in sorted(FAMILIES, key=lambda family: family.model_type != model_type):
        try:
            return family, family.write_settings(config.model)
        except ValueError as error:
            reasons.append(str(error))
    # The one that lacks least says most.
    nearest = min(reasons, key=lambda reason: (reason.count(" (it has "), len(reason)))
    raise ValueError(f"no architecture of Hugging Face that is known here holds this model; the nearest: {nearest}")


def _common_dtype(stored: Stored, weights: Weights) -> torch.dtype:
    return max((weights.tensors.dtypes[part.name] for part in stored.parts), key=lambda dtype: dtype.itemsize)


def _shards(declared: list[Declared], max_bytes: int) -> list[list[Declared]]:
    """Consecutive tensors, together at most `max_bytes` unless one alone has more."""
    shards: list[list[Declared]] = [[]]
    held = 0
    for one in declared:
        if shards[-1] and held + one.num_bytes > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(one)
        held += one.num_bytes
    return shards


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
