"""What decides which samples a run reads and in which order, and whether a resumed run still reads the same."""

from __future__ import annotations

from megallm.config.data_sources import read_sources
from megallm.config.report import printable
from megallm.config.tree import Config
from megallm.data.feeding.orders import DataShare, layout_in_order, permutation
from megallm.plan.rules_data import data_sources

# What a change of each thing does. Where nothing is said the samples are others altogether.
_EFFECTS = {
    "training samples": "indices are dealt for so many samples, and another number of epochs deals all of them anew",
    "validation samples": "the indices of the validation data are dealt for so many",
    "surplus of each dataset": "another number of samples may deal the indices of a dataset anew",
    "tokenizer": "the numbers in the data, and the rows of the embedding, stand for other texts",
    "seed": "samples are shuffled by it",
    "sequence length": "samples begin and end elsewhere",
    "content of the data": "the files hold other documents, or the same in another order",
    "samples": "a sample is another piece of text",
    "share of masked tokens": "other tokens are to be found",
    "share of short samples": "samples begin and end elsewhere",
    "share of the data": "training gets other documents",
    "loader": "samples are read in another order",
    "layout in the order": "the cyclic order depends on it",
    "torch's shuffle of eight": "this version of torch shuffles otherwise",
}
# What checkpoints of the first versions lack.
_SAVED_SINCE_THEN = ("content of the data", "validation samples")
# What a run without it does not read: another one may begin to, or leave off.
_OF_EVALUATION = ("validation samples",)


def data_order(
    config: Config,
    num_train_samples: int,
    available_samples: int,
    share: DataShare,
    tokenizer: str = "",
    content: str = "",
    num_valid_samples: int | None = None,
) -> dict[str, str]:
    """Everything that the order of the training data depends on, by its name, as texts that can be compared.

    Reads the files that list datasets; raises ValueError where one cannot be read.

    Args:
        num_train_samples: what the indices were asked for.
        available_samples: the length of the training data, which may be greater.
        share: the layout, which the `cyclic` order depends on.
        tokenizer: the checksum of what made the tokens; empty if that is not known.
        content: the digest of what the files hold; empty if that is not known.
        num_valid_samples: what the indices of the validation data were asked for; None where it is read whole or not.
    """
    data = config.data
    order = {
        "data": "synthetic",
        "seed": str(config.training.seed),
        "sequence length": str(data.seq_length),
        "loader": data.dataloader_type,
    }
    if config.model.architecture == "bert":
        order |= {
            "samples": "pairs of texts" if config.model.bert_binary_head else "single texts",
            "share of masked tokens": f"{data.mask_prob:g}",
            "share of short samples": f"{data.short_seq_prob:g}",
        }
    if not data.mock_data:
        # A synthetic sample depends on its number and the seed alone.
        source = read_sources(data_sources(config))[0]
        assert source is not None, "there is training data"
        low, high = source.bounds
        order |= {
            "data": str(source),
            "share of the data": f"{low:.6g} to {high:.6g}",
            "training samples": str(num_train_samples),
        }
        if tokenizer:
            order["tokenizer"] = tokenizer
        if content:
            order["content of the data"] = content
        if num_valid_samples is not None:
            order["validation samples"] = str(num_valid_samples)
        if source.weights is not None:
            order["surplus of each dataset"] = str(data.mid_level_dataset_surplus)
    if data.dataloader_type == "cyclic":
        order["layout in the order"] = layout_in_order(
            data.dataloader_type, available_samples, share, sharding=data.data_sharding
        )
        order["torch's shuffle of eight"] = str(permutation(8, 0).tolist())
    return order


def check_data_order(saved: dict[str, str], now: dict[str, str], folder: str) -> None:
    """Raises ValueError if the run that saved `folder` read its data in another order than this one would."""
    # What older versions did not save is not held against their runs.
    names = [name for name in dict.fromkeys([*saved, *now]) if name in saved or name not in _SAVED_SINCE_THEN]
    names = [name for name in names if name in now or name not in _OF_EVALUATION]
    changed = [
        f"{printable(name)}: {printable(saved.get(name, 'none'))} there, {now.get(name, 'none')} here"
        + (f" ({_EFFECTS[name]})" if name in _EFFECTS else "")
        for name in names
        if saved.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{folder} was saved by a run that read its data in another order, so that samples may be seen again or "
            f"never: {'; '.join(changed)}. Give the flags of that run, or --allow-data-change to go on all the same"
        )
