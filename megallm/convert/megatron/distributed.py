"""Folders of Megatron-LM's `torch_dist` format: torch's distributed checkpoints, whose tensors are whole or stacked.

`.metadata` says which file holds which box of which tensor; each box is a file of `torch.save` within another. Layers
of one shape are stacked: one tensor without a number in its name has all of them along its first dim.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megallm.config.tree import ModelConfig
from megallm.convert.megatron.arguments import (
    architecture_of,
    arguments_in,
    data_of,
    read_arguments,
    true_vocab_size,
)
from megallm.convert.megatron.names import first_tensors, in_engine, last_tensors, layer_tensors, stack_of
from megallm.convert.model import Weights, config_of, logical_shapes
from megallm.convert.pickled import read_pickle
from megallm.convert.raw import RawFiles, RawTensor
from megallm.convert.stored import Stored, StoredTensors, cut_columns, cut_rows
from megallm.convert.torch_file import read_torch_file

METADATA, COMMON, KEPT = ".metadata", "common.pt", "huggingface"
_NUMBERED = re.compile(r"(?:decoder|encoder)\.layers\.\d+\.")
_OF_MODELS = ("decoder.", "encoder.", "embedding.", "output_layer.", "lm_head.", "pooler.", "binary_head.")
_MOST_BYTES = 2**30


@contextmanager
def open_distributed_folder(folder: Path, asked_vocab_size: int | None = None) -> Iterator[Weights]:
    """The model in the folder of one iteration, for as long as the block lasts.

    Raises ValueError as `open_torch_folder` does.
    """
    sizes, boxes = _read_metadata(folder)
    given, iteration = _read_common(folder, boxes)
    model, notes = _model(folder, given, sizes, asked_vocab_size)
    origin = folder.parent / KEPT
    config = config_of(model, data_of(given, origin))
    shapes = logical_shapes(config)
    stored = list(_match(folder, _whole_tensors(config.model, shapes, sizes), sizes, boxes))
    with RawFiles() as files:
        tensors = StoredTensors(files, stored, shapes)
        yield Weights(config, shapes, tensors, origin if origin.is_dir() else None, iteration, notes=notes)


Box = tuple[tuple[int, ...], tuple[int, ...], Path, int, int]
"""Offset and shape in the tensor; file, first byte and number of bytes of what holds it."""


def _read_metadata(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, list[Box]]]:
    """Shape of each tensor, and the boxes of each tensor and other object."""
    path = folder / METADATA
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is larger than any that is known")
        metadata = read_pickle(path.read_bytes())
        entries, places = metadata["state_dict_metadata"], metadata["storage_data"]
        sizes, chunks = {}, {}
        for name, entry in entries.items():
            if entry.name.endswith(".TensorStorageMetadata"):
                sizes[name] = tuple(entry["size"])
                chunks[name] = {tuple(chunk["offsets"]): tuple(chunk["sizes"]) for chunk in entry["chunks"]}
        boxes: dict[str, list[Box]] = {}
        for index, info in places.items():
            # What is no tensor lies at no offset.
            name, offset = index["fqn"], tuple(index.state.get("offset") or ())
            file = info["relative_path"]
            if Path(file).name != file:
                raise ValueError(f"it names a file outside of its folder: {file}")
            shape = chunks.get(name, {}).get(offset, ())
            boxes.setdefault(name, []).append((offset, shape, folder / file, info["offset"], info["length"]))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not one that torch's distributed checkpoints have: {error}") from None
    return sizes, boxes


def _read_common(folder: Path, boxes: Mapping[str, list[Box]]) -> tuple[dict[str, Any], int]:
    """The arguments and the iteration, from `common.pt` or, in newer versions, an object among the tensors."""
    if (folder / COMMON).exists():
        content = read_torch_file(folder / COMMON)
    else:
        name = next((name for name in boxes if name.split("/")[0] == "common_state"), None)
        if name is None:
            raise ValueError(f"{folder} holds neither {COMMON} nor common_state: nothing says what its model is")
        _, _, path, begin, num_bytes = boxes[name][0]
        content = read_torch_file(path, begin, num_bytes)
    return arguments_in(content, folder)


def _model(
    folder: Path, given: Mapping[str, Any], sizes: Mapping[str, tuple[int, ...]], asked_vocab_size: int | None
) -> tuple[ModelConfig, tuple[str, ...]]:
    """The model of the arguments, and sentences about it for the user."""
    table = sizes.get("embedding.word_embeddings.weight")
    if table is None:
        raise ValueError(f"{folder} holds no embedding.word_embeddings.weight")
    vocab_size, notes = true_vocab_size(given, table[0], asked_vocab_size)
    return read_arguments(given, vocab_size, architecture_of(sizes)), notes


def _whole_tensors(
    model: ModelConfig, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, tuple[int, ...]]
) -> list[Stored]:
    """All tensors under the names of the folder, stacked where it stacks them."""
    padded = sizes["embedding.word_embeddings.weight"][0]
    found = [*first_tensors(model, shapes, padded, 1, 0)]
    layers = [list(layer_tensors(model, shapes, layer, 1, 0)) for layer in range(model.num_layers)]
    if any(_NUMBERED.match(name) for name in sizes):
        found += [
            replace(stored, name=f"{stack_of(model)}.layers.{number}.{stored.name}")
            for number, layer in enumerate(layers)
            for stored in layer
        ]
    else:
        for same in zip(*layers, strict=True):
            parts = tuple(part for stored in same for part in stored.parts)
            found.append(Stored(f"{stack_of(model)}.layers.{same[0].name}", parts))
    found += last_tensors(model, shapes, padded, 1, 0, repeats_embedding=False)
    return [replace(stored, name=in_engine(stored.name)) for stored in found]


def _match(
    folder: Path, wanted: list[Stored], sizes: Mapping[str, tuple[int, ...]], boxes: Mapping[str, list[Box]]
) -> Iterator[tuple[Stored, RawTensor]]:
    """Every box of the model's tensors with its place."""
    problems = []
    for stored in wanted:
        size = sizes.get(stored.name)
        if size is None:
            problems.append(f"{stored.name} is missing")
            continue
        stack = len(size) - len(stored.shape)
        flat = (size[0] * size[1], *size[2:]) if stack else size
        if flat != stored.shape:
            problems.append(f"{stored.name} has shape {list(size)}, not that of its arguments, {list(stored.shape)}")
            continue
        for offset, shape, path, begin, num_bytes in boxes[stored.name]:
            yield from _box(stored, size, bool(stack), offset, shape, read_torch_file(path, begin, num_bytes))
    known = {stored.name for stored in wanted}
    problems += [
        f"{name} of shape {list(size)} is not of this model"
        for name, size in sizes.items()
        if name not in known and name.startswith(_OF_MODELS)
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{folder} does not hold the model of its arguments: {'; '.join(problems[:3])}{more}")


def _box(
    stored: Stored, size: tuple[int, ...], is_stacked: bool, offset: tuple[int, ...], shape: tuple[int, ...], raw: Any
) -> Iterator[tuple[Stored, RawTensor]]:
    """A box of a tensor as stored tensors of their own, one for each layer in it."""
    if not isinstance(raw, RawTensor) or raw.shape != shape or raw.dtype is None:
        raise ValueError(f"{stored.name} has a box at {list(offset)} that is not of shape {list(shape)}")
    layers = range(offset[0], offset[0] + shape[0]) if is_stacked else range(1)
    inner_offset, inner_shape = (offset[1:], shape[1:]) if is_stacked else (offset, shape)
    rows = size[1] if is_stacked else 0
    layer_bytes = raw.dtype.itemsize
    for extent in inner_shape:
        layer_bytes *= extent
    for number, layer in enumerate(layers):
        first = layer * rows + inner_offset[0]
        cut = cut_rows(stored, first, first + inner_shape[0])
        if len(inner_shape) > 1:
            cut = cut_columns(cut, inner_offset[1], inner_offset[1] + inner_shape[1])
        yield cut, replace(raw, begin=raw.begin + number * layer_bytes, shape=inner_shape)
