"""A run that is resumed reads on where it was, or says why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megallm.config.dictionary import build
from megallm.data.feeding.orders import DataShare
from megallm.train.data_order import check_data_order, data_order

FILES = {
    "data.data_path": ["0.3", "news", "0.7", "code"],
    "data.seq_length": 64,
    "training.seed": 7,
}
FOUR_RANKS = DataShare(2, 0, 4)


def order_of(changes: dict[str, Any], *, samples: int = 1000, share: DataShare = FOUR_RANKS) -> dict[str, str]:
    return data_order(build(FILES | changes), samples, samples + 24, share)


@pytest.mark.parametrize(
    ("changes", "samples", "sentence"),
    [
        ({}, 2000, "training samples: 1000 there, 2000 here .*deals all of them anew"),
        ({"data.seq_length": 128}, 1000, "sequence length: 64 there, 128 here"),
        ({"data.data_path": ["news"]}, 1000, "data: 0.3 news 0.7 code there, news here"),
        ({"data.split": "90,10"}, 1000, "share of the data: 0 to 0.969 there, 0 to 0.9 here"),
        ({"training.seed": 8}, 1000, "seed: 7 there, 8 here"),
        ({"data.mid_level_dataset_surplus": 0.5}, 1000, "surplus of each dataset: 0.005 there, 0.5 here"),
        (
            {"data.dataloader_type": "cyclic"},
            1000,
            "loader: single there, cyclic here.*layout in the order: none there",
        ),
        ({"data.mock_data": True, "data.data_path": []}, 1000, "data: .* there, synthetic here"),
    ],
)
def test_what_changes_the_order_is_refused_by_name(changes: dict[str, Any], samples: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"read its data in another order.*{sentence}.*--allow-data-change"):
        check_data_order(order_of({}), order_of(changes, samples=samples), "iter_0000005")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.mask_prob": 0.2}, "share of masked tokens: 0.15 there, 0.2 here"),
        ({"data.short_seq_prob": 0.0}, "share of short samples: 0.1 there, 0 here"),
        ({"model.bert_binary_head": False}, "samples: pairs of texts there, single texts here"),
    ],
)
def test_what_changes_the_samples_of_a_bert_is_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    bert = {"model.architecture": "bert"}
    check_data_order(order_of(bert), order_of(bert), "iter_0000005")
    with pytest.raises(ValueError, match=sentence):
        check_data_order(order_of(bert), order_of(bert | changes), "iter_0000005")


@pytest.mark.parametrize(
    "changes",
    [
        {"data.num_workers": 4},
        {"data.split": "969,31"},
        {"data.eod_mask_loss": True},
        {"training.global_batch_size": 64},
        {"data.data_cache_path": "elsewhere"},
        {"model.num_layers": 3},
    ],
)
def test_what_does_not_change_it_is_not(changes: dict[str, Any]) -> None:
    check_data_order(order_of({}), order_of(changes, share=DataShare(1, 3, 8)), "iter_0000005")


def test_synthetic_samples_do_not_depend_on_their_number() -> None:
    mock = {"data.mock_data": True, "data.data_path": []}
    check_data_order(order_of(mock), order_of(mock, samples=5), "iter_0000005")


def test_the_cyclic_order_depends_on_the_layout_unless_it_is_not_sharded() -> None:
    cyclic = {"data.dataloader_type": "cyclic"}
    with pytest.raises(ValueError, match="layout in the order: micro-batches of 2 on 4 data parallel ranks there"):
        check_data_order(order_of(cyclic), order_of(cyclic, share=DataShare(2, 0, 2)), "iter_0000005")
    whole = cyclic | {"data.data_sharding": False}
    # 1024 samples divide by every group here, by 2 x 3 they do not.
    check_data_order(order_of(whole), order_of(whole, share=DataShare(1, 0, 16)), "iter_0000005")
    with pytest.raises(ValueError, match="layout in the order: epochs of 1024 of 1024 samples there"):
        check_data_order(order_of(whole), order_of(whole, share=DataShare(2, 0, 3)), "iter_0000005")


def test_lists_in_files_count_by_what_they_hold(tmp_path: Path) -> None:
    def listed(words: str) -> dict[str, str]:
        (tmp_path / "list").write_text(words)
        return order_of({"data.data_path": [], "data.data_args_path": str(tmp_path / "list")})

    check_data_order(order_of({}), listed("0.3 news\n0.7 code\n"), "iter_0000005")
    with pytest.raises(ValueError, match=r"data: 0\.3 news 0\.7 code there, 0\.3 code 0\.7 news here"):
        check_data_order(order_of({}), listed("0.3 code 0.7 news"), "iter_0000005")


def test_another_tokenizer_of_the_same_size_is_noticed() -> None:
    config = build(FILES)
    before, after = (data_order(config, 1000, 1024, FOUR_RANKS, tokenizer) for tokenizer in ("sha256:a", "sha256:b"))
    with pytest.raises(ValueError, match=r"tokenizer: sha256:a there, sha256:b here .*stand for other texts"):
        check_data_order(before, after, "iter_0000005")
    check_data_order(before, before, "iter_0000005")


def test_other_indices_of_the_validation_data_are_noticed() -> None:
    config = build(FILES)

    def order(num_valid_samples: int | None) -> dict[str, str]:
        return data_order(config, 1000, 1024, FOUR_RANKS, "t", "0a", num_valid_samples)

    with pytest.raises(
        ValueError, match=r"validation samples: 80 there, 160 here \(the indices of the validation data"
    ):
        check_data_order(order(80), order(160), "iter_0000005")
    # A run that evaluates no more, one that begins to, and one whose checkpoint does not say.
    for saved, now in ((80, None), (None, 80), (80, 80)):
        check_data_order(order(saved), order(now), "iter_0000005")


def test_other_content_under_the_same_names_is_noticed() -> None:
    config = build(FILES)
    before, after = (data_order(config, 1000, 1024, FOUR_RANKS, "t", content) for content in ("0a", "0b"))
    with pytest.raises(ValueError, match=r"content of the data: 0a there, 0b here \(the files hold other documents"):
        check_data_order(before, after, "iter_0000005")
    check_data_order(before, before, "iter_0000005")
    # A checkpoint of a version that did not save it.
    check_data_order(data_order(config, 1000, 1024, FOUR_RANKS, "t"), after, "iter_0000005")
