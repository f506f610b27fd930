"""Rules about where samples come from."""

from __future__ import annotations

from collections.abc import Iterator

from megallm.config.data_sources import DataSources, parse_data_path, parse_split
from megallm.config.tree import Config
from megallm.plan.problem import Problem, rule


def data_sources(config: Config) -> DataSources:
    """The datasets that a configuration names."""
    data = config.data
    return DataSources(
        data_path=tuple(data.data_path),
        data_args_path=data.data_args_path,
        split=data.split,
        train_data_path=tuple(data.train_data_path),
        valid_data_path=tuple(data.valid_data_path),
        test_data_path=tuple(data.test_data_path),
        per_split_data_args_path=data.per_split_data_args_path,
    )


@rule()
def one_source_of_data(config: Config, world_size: int) -> Iterator[Problem]:
    """Samples come from files, named in one way, or are synthetic."""
    ways = data_sources(config).flags
    if config.data.mock_data and ways:
        yield Problem((ways[0], "--mock-data"), "both files and synthetic data are given", "", "leave out --mock-data")
    elif not config.data.mock_data and not ways:
        yield Problem(
            ("--data-path", "--mock-data"),
            "there is no data",
            "",
            "give the prefix of a .bin/.idx dataset with --data-path, or use --mock-data",
        )
    elif len(ways) > 1:
        yield Problem(tuple(ways), "the data is named in more than one way", "", f"leave out {' or '.join(ways)}")


@rule()
def data_weights_are_numbers(config: Config, world_size: int) -> Iterator[Problem]:
    """Each list is one prefix, several prefixes, or pairs of a weight and a prefix."""
    data = config.data
    for flag, words in (
        ("--data-path", data.data_path),
        ("--train-data-path", data.train_data_path),
        ("--valid-data-path", data.valid_data_path),
        ("--test-data-path", data.test_data_path),
    ):
        try:
            if words:
                parse_data_path(words)
        except ValueError as error:
            way_out = f"write {flag} 0.3 first_prefix 0.7 second_prefix, or prefixes alone"
            yield Problem((flag,), str(error).rstrip("."), "", way_out)


@rule()
def split_is_three_shares(config: Config, world_size: int) -> Iterator[Problem]:
    """`--split` is up to three shares, and some of the data is for training."""
    try:
        if parse_split(config.data.split)[0] is not None:
            return
        wrong = f"'{config.data.split}' leaves nothing for training"
    except ValueError:
        wrong = f"'{config.data.split}' is not a list of one to three shares"
    yield Problem(("--split",), wrong, "", "write training, validation and test shares as in --split 969,30,1")


@rule()
def training_has_data(config: Config, world_size: int) -> Iterator[Problem]:
    """Lists for each split include one for training."""
    if (config.data.valid_data_path or config.data.test_data_path) and not config.data.train_data_path:
        yield Problem(
            ("--train-data-path",),
            "other splits have data of their own, and training has none",
            "",
            "add --train-data-path prefix",
        )


@rule("training.eval_interval")
def evaluation_has_data(config: Config, world_size: int) -> Iterator[Problem]:
    """An evaluation needs validation data."""
    data = config.data
    if config.training.eval_interval is None or data.mock_data:
        return
    if data.train_data_path and not data.valid_data_path:
        yield Problem(
            ("--valid-data-path", "--eval-interval"),
            "evaluations are asked for, but there is no validation data",
            "",
            "add --valid-data-path prefix, or leave out --eval-interval",
        )
    if not (data.data_path or data.data_args_path):
        return
    try:
        is_given = parse_split(data.split)[1] is not None
    except ValueError:  # another rule's
        return
    if not is_given:
        yield Problem(
            ("--split", "--eval-interval"),
            f"evaluations are asked for, but '{data.split}' leaves nothing for validation",
            "",
            "use --split 969,30,1, or leave out --eval-interval",
        )


@rule("training.eval_interval")
def full_validation_has_no_weights(config: Config, world_size: int) -> Iterator[Problem]:
    """Weights say how often a dataset is drawn in so many samples; all of the data has no such number."""
    data = config.data
    words = data.valid_data_path or data.data_path
    if not data.full_validation or data.multiple_validation_sets or config.training.eval_interval is None:
        return
    try:
        weights = parse_data_path(words)[1] if len(words) > (2 if data.valid_data_path else 1) else None
    except ValueError:  # another rule's
        return
    if weights is not None:
        yield Problem(
            ("--full-validation",),
            "the datasets of the validation data have weights, but all of them are to be read whole",
            "",
            "add --multiple-validation-sets, or leave out the weights",
        )
