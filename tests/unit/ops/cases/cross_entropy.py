from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from megallm.ops.cross_entropy import CrossEntropy, cross_entropy
from tests.unit.ops.accuracy import Case, Inputs


def make(shape: tuple[int, ...], generator: torch.Generator) -> Inputs:
    """A column of padding for every eleven words, and a target in nine that has no loss."""
    targets = torch.randint(0, words(shape[-1]), shape[:-1], generator=generator)
    ignored = torch.randint(0, 9, shape[:-1], generator=generator) == 0
    return {
        "logits": torch.randn(shape, generator=generator, dtype=torch.float64) * 3,
        "targets": targets.masked_fill(ignored, -100),
    }


def words(width: int) -> int:
    return width - width // 12


def losses(inputs: Inputs, implementation: str, label_smoothing: float, z_loss: float) -> Tensor:
    # A copy: the gradient is written over what is given.
    logits = inputs["logits"] * 1.0
    loss = CrossEntropy(words(logits.shape[-1]), label_smoothing=label_smoothing, z_loss=z_loss)
    return cross_entropy(logits, inputs["targets"], loss, implementation).unsqueeze(-1)


def terms(inputs: Inputs, grads: Sequence[Tensor], label_smoothing: float, z_loss: float) -> dict[str, Tensor]:
    """A loss is a difference of logits; what is smoothed is one of their means, whose terms may cancel."""
    logits, columns = inputs["logits"], words(inputs["logits"].shape[-1])
    used = logits[..., :columns]
    logarithm = torch.logsumexp(used, dim=-1, keepdim=True)
    size = logarithm.abs() + used.abs().amax(dim=-1, keepdim=True) + z_loss * logarithm.square()
    probabilities = torch.softmax(used, dim=-1) * (1 + 2 * z_loss * logarithm.abs())
    target = torch.nn.functional.one_hot(inputs["targets"].clamp(min=0), columns)
    gradient = torch.zeros_like(logits)
    gradient[..., :columns] = grads[0].abs() * (probabilities + target + label_smoothing / columns)
    return {"y0": size, "grad_logits": gradient}


def case(name: str, label_smoothing: float, z_loss: float) -> Case:
    settings = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    call, sizes = partial(losses, **settings), partial(terms, **settings)
    return Case(name, "cross_entropy", make, call, terms=sizes, differentiable_once=True)


CASES = [case("cross_entropy", 0.0, 0.0), case("cross_entropy smoothed, with z-loss", 0.1, 1e-2)]
