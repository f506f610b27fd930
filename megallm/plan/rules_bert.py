"""Rules about what goes together with a BERT, and what with a decoder only."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megallm.config.resolve import PROGRAMS
from megallm.config.tree import Config, DataConfig, ModelConfig
from megallm.plan.problem import Problem, rule

# [CLS] before the texts, [SEP] after each of two.
_SPECIAL_TOKENS = 3


@rule("data.mask_prob", "data.short_seq_prob")
def settings_of_bert_act(config: Config, world_size: int) -> Iterator[Problem]:
    """Settings of BERT in a decoder would change nothing, in silence."""
    model, data = config.model, config.data
    if model.architecture == "bert":
        return
    asked = {
        "--bert-no-binary-head": not model.bert_binary_head,
        "--num-token-types": model.num_token_types is not None,
        "--mask-prob": data.mask_prob != DataConfig().mask_prob,
        "--short-seq-prob": data.short_seq_prob != DataConfig().short_seq_prob,
    }
    flags = tuple(flag for flag, given in asked.items() if given)
    if flags:
        yield Problem(
            flags,
            f"this is for BERT, but the model is a {model.architecture}",
            "",
            f"leave out {', '.join(flags)}, or train a BERT with {PROGRAMS['bert']}, as --architecture bert",
        )


@rule()
def settings_of_decoders_act(config: Config, world_size: int) -> Iterator[Problem]:
    """A BERT looks everywhere, reads no ends of documents, and cannot write."""
    model, data = config.model, config.data
    if model.architecture != "bert":
        return
    if not data.drop_last_partial_validation_sequence:
        yield Problem(
            ("--no-drop-last-partial-validation-sequence",),
            "this is for decoders, and samples of BERT are whole sentences",
            "",
            "use --drop-last-partial-validation-sequence, as is the default",
        )
    reasons = {
        "--window-size": (model.window_size != ModelConfig().window_size, "tokens look at all others"),
        "--reset-position-ids": (data.reset_position_ids, "a sample lies within one document"),
        "--reset-attention-mask": (data.reset_attention_mask, "a sample lies within one document"),
        "--eod-mask-loss": (data.eod_mask_loss, "a sample holds no end of a document"),
        "--sample-interval": (config.logging.sample_interval is not None, "it cannot continue a text"),
    }
    for flag, (given, reason) in reasons.items():
        if given:
            yield Problem((flag,), f"this is for decoders, and in a BERT {reason}", "", f"leave out {flag}")


@rule("model.num_token_types")
def pairs_have_two_token_types(config: Config, world_size: int) -> Iterator[Problem]:
    """Who is to tell whether two texts are in their order must see which is which."""
    model = config.model
    if model.architecture != "bert" or not model.bert_binary_head:
        return
    if model.num_token_types is not None and model.num_token_types < 2:
        yield Problem(
            ("--num-token-types", "--bert-binary-head"),
            f"samples are pairs of texts, but there are {model.num_token_types} types of tokens to tell them apart",
            f"{model.num_token_types} < 2",
            "use --num-token-types 2, or --bert-no-binary-head",
        )


@rule("data.tokenizer_type")
def masks_need_a_tokenizer(config: Config, world_size: int) -> Iterator[Problem]:
    """Masked words stand behind [MASK], which numbers do not have."""
    data = config.data
    if config.model.architecture == "bert" and data.tokenizer_type == "NullTokenizer" and not data.mock_data:
        yield Problem(
            ("--tokenizer-type",),
            "BERT's samples need [CLS], [SEP], [MASK] and padding, and NullTokenizer has none of them",
            "",
            "use --tokenizer-type BertWordPieceLowerCase --vocab-file vocab.txt, or --mock-data",
        )


@rule("data.seq_length", "data.mask_prob")
def masks_have_room(config: Config, world_size: int) -> Iterator[Problem]:
    """Of each sample at least one token is masked."""
    length, share = config.data.seq_length, config.data.mask_prob
    room = max(0, length - _SPECIAL_TOKENS)
    if config.model.architecture != "bert" or room * share >= 1:
        return
    needed = math.ceil(1 / share) + _SPECIAL_TOKENS
    yield Problem(
        ("--seq-length", "--mask-prob"),
        f"of {length} tokens, {_SPECIAL_TOKENS} of them special ones, not one would be masked",
        f"{room} x {share:g} = {room * share:.2g} < 1",
        f"use --seq-length {needed} or more",
    )
