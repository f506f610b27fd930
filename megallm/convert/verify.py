"""What two forms of a model say about the same text, each computed layer by layer, with one layer in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from megallm.config.tree import Config
from megallm.convert.family import Family
from megallm.convert.huggingface import family_of, find_tensors, read_config
from megallm.convert.model import Weights, rank_context
from megallm.convert.raw import RawFiles, RawTensor
from megallm.convert.tokenizer_files import build_tokenizer_of
from megallm.model.architecture import build_stage
from megallm.parameter import description_of, piece_views

NUM_TOKENS = 256
# Largest difference of two logits, in parts of the largest logit, by the type that weights were rounded to on the way:
# sums in another order where they were not, and what rounding each weight once does to a deep model otherwise.
BOUNDS = {None: 1e-4, torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Verdict:
    """How far two models are apart on a text: by their logits, as a share of the largest, and by their losses."""

    num_tokens: int
    largest: float
    share: float
    losses: tuple[float, float]


def judge(source: torch.Tensor, target: torch.Tensor, tokens: torch.Tensor, architecture: str = "gpt") -> Verdict:
    """Compares logits [sequence, vocabulary] of two models on tokens int64 [sequence].

    The losses are those of the token that follows, or in an encoder of the token itself.
    """
    apart = float((source - target).abs().max())
    ahead = 1 if architecture == "gpt" else 0
    losses = [
        float(functional.cross_entropy(logits[: len(tokens) - ahead].double(), tokens[ahead:]))
        for logits in (source, target)
    ]
    return Verdict(len(tokens), apart, apart / max(float(source.abs().max()), 1e-30), (losses[0], losses[1]))


def tokens_for(config: Config, origin: Path | None, text_file: Path | None) -> torch.Tensor:
    """Tokens int64 [sequence] of a text, or where there is no tokenizer of any kind, numbers below the vocabulary.

    Raises ValueError where the file cannot be read or holds fewer than two tokens.
    """
    model = config.model
    assert model.vocab_size and model.max_position_embeddings, "the configuration is resolved"
    count = min(NUM_TOKENS, model.max_position_embeddings)
    try:
        tokenizer = build_tokenizer_of(config.data, origin)
    except ValueError as error:
        if text_file is not None:
            raise ValueError(f"--verify-text needs a tokenizer beside the model: {error}") from None
        return torch.randint(model.vocab_size, (count,), generator=torch.Generator().manual_seed(1))
    text = _text() if text_file is None else _read(text_file)
    ids = [number for number in tokenizer.encode(text) if number < model.vocab_size][:count]
    if len(ids) < 2:
        raise ValueError(f"{text_file} holds fewer than two tokens")
    return torch.tensor(ids, dtype=torch.int64)


def _text() -> str:
    """Some English that every machine has."""
    from pydoc_data.topics import topics

    return topics["exceptions"] + topics["naming"]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--verify-text {path} cannot be read: {error}") from None


@torch.no_grad()
def our_logits(weights: Weights, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits [sequence, vocabulary] of our model on tokens int64 [sequence]."""
    config = weights.config
    model = config.model
    assert model.vocab_size, "the configuration is resolved"
    if model.position_embedding_type != "learned_absolute":
        # Tables of positions that are not parameters need not be longer than the text.
        config = replace(config, model=replace(model, max_position_embeddings=len(tokens)))
    context = rank_context(dtype, torch.device("cpu"))
    # [sequence] -> [1, sequence]
    batch = {
        "tokens": tokens.unsqueeze(0),
        "position_ids": torch.arange(len(tokens)).unsqueeze(0),
        "sample_ids": torch.zeros(1, dtype=torch.int64),
        # What an encoder reads too: one text, without padding.
        "types": torch.zeros((1, len(tokens)), dtype=torch.int64),
        "padding_mask": torch.ones((1, len(tokens)), dtype=torch.int64),
    }
    hidden: Any = ()
    last = model.num_layers + 1
    for number in range(last + 1):
        layers = range(number - 1, number) if 0 < number < last else range(0)
        stage: Any = build_stage(config, layers, context, is_first=number == 0, is_last=number == last)
        for parameter in stage.parameters():
            for piece, view in piece_views(parameter, description_of(parameter)):
                weights.tensors.fill(piece.name, piece.offset, view)
        hidden = stage(hidden, batch, None)
    # [sequence, 1, padded vocabulary] -> [sequence, vocabulary]
    return hidden[0][:, 0, : model.vocab_size]


def has_transformers() -> bool:
    """Whether the library is there that runs Hugging Face models."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


class _WithoutMemory(TorchFunctionMode):
    """Parameters are made without memory; buffers, which are computed, have theirs."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@torch.no_grad()
def their_logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits [sequence, vocabulary] of the model in a folder, by the transformers library."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(folder)
    family = family_of(read_config(folder), folder)
    config.use_cache = False
    with _WithoutMemory():
        model: Any = getattr(transformers, family.loader).from_config(config).to(dtype).eval()
    with RawFiles() as files:
        _stream(model, family, find_tensors(folder, family), files, dtype)
        return model(input_ids=tokens.unsqueeze(0))[family.logits][0]


def _stream(model: Any, family: Family, found: dict[str, RawTensor], files: RawFiles, dtype: torch.dtype) -> None:
    """Has each module read its own parameters before it runs, and forget them after."""
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())

    def raw_of(name: str) -> RawTensor:
        name = family.copies.get(name, name)
        if name in found:
            return found[name]
        # In memory the head has one name in all families; with tied weights it has none of its own.
        return found.get(f"{family.head}.weight", found[f"{embedding}.weight"])

    for module_name, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if not own:
            continue

        def read(module: nn.Module, _: Any, own: list[str] = own, module_name: str = module_name) -> None:
            for name in own:
                raw = raw_of(f"{module_name}.{name}")
                tensor = torch.empty(raw.shape, dtype=dtype)
                files.fill(raw, (0,) * len(raw.shape), tensor)
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)

        def forget(module: nn.Module, *_: Any, own: list[str] = own) -> None:
            for name in own:
                shape = getattr(module, name).shape
                module._parameters[name] = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)

        module.register_forward_pre_hook(read)
        module.register_forward_hook(forget)
