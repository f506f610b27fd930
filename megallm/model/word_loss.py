"""What the loss of a word is, as a configuration asks for it."""

from __future__ import annotations

from megallm.config.tree import Config
from megallm.ops.cross_entropy import CrossEntropy


def word_loss(config: Config) -> CrossEntropy:
    """The loss over the vocabulary of a resolved configuration, for a rank that has all of it (see `loss_over`)."""
    assert config.model.vocab_size, "the configuration is resolved"
    return CrossEntropy(
        config.model.vocab_size,
        label_smoothing=config.training.label_smoothing,
        z_loss=config.training.z_loss_coeff,
    )
