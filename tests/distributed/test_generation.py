"""Writing: keys and values that are kept give the logits of computing everything anew, in every layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megallm.generate.choice import SamplingSettings
from megallm.generate.sampling import NextLogits, generate_tokens
from megallm.train.perplexity import score
from megallm.train.step import train_step
from tests.distributed.parity import GPT, LLAMA, Case, global_batch, make_engine, micro_batches
from tests.distributed.parity_cases import (
    NO_SEQUENCE_PARALLEL,
    ODD_VOCABULARY,
    ONE_GROUP,
    REGULARISED,
    SINUSOIDAL,
    TWO_STAGES,
)
from tests.distributed.pool import WorkerPool

PROMPT = [3, 1, 4, 1, 5]
WINDOW = {"model.window_size": "3,0"}
CASES = [
    Case("gpt", GPT | ODD_VOCABULARY),
    Case("sinusoidal", GPT | SINUSOIDAL | ONE_GROUP),
    Case("llama, tensor", LLAMA | ODD_VOCABULARY, tp=2, layout=NO_SEQUENCE_PARALLEL),
    Case("llama, interleaved", LLAMA, pp=2, layout=TWO_STAGES),
    Case("llama, tensor 4, fewer groups than ranks", LLAMA, tp=4, layout=NO_SEQUENCE_PARALLEL),
    Case(
        "llama, tensor 2, pipeline 2, micro-batch 2",
        LLAMA,
        tp=2,
        pp=2,
        layout=NO_SEQUENCE_PARALLEL | {"training.micro_batch_size": 2},
    ),
    # Nothing is kept here.
    Case("llama, tensor 2, sequence parallelism", LLAMA, tp=2),
]
SLOW = (
    "llama, tensor",
    "llama, tensor 2, sequence parallelism",
    "llama, tensor 4, fewer groups than ranks",
    "sinusoidal",
    "llama, interleaved",
    "gpt",
)


@dataclass
class Written:
    """What a rank saw: the largest difference of logits at each length, texts with both ways, and a step after them."""

    differences: list[float]
    texts: list[list[int]]
    loss: float


def write(rank: int, case: Case) -> Written:
    engine = make_engine(rank, case)
    differences = []
    tokens = list(PROMPT)
    # Longer than the sequence of 16, so that the beginning drops out.
    continuation = [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]
    for cached in (True, False):
        with NextLogits(engine, 18, cached=cached) as next_logits:
            logits = [next_logits([tokens + continuation[:number]]) for number in range(len(continuation))]
        differences.append(logits)
    worst = [
        float((with_cache - anew).abs().max() / anew.abs().max())
        for with_cache, anew in zip(*differences, strict=True)
        if with_cache is not None and anew is not None
    ]
    texts = [generate_tokens(engine, [PROMPT], 20, [SamplingSettings(seed=seed)])[0] for seed in (1, 1, 2)]
    # Of other lengths in one batch, and one of them again: the first runs out of the sequence before the others.
    together = generate_tokens(engine, [PROMPT * 2, PROMPT, [7]], 20, [SamplingSettings(seed=n) for n in (3, 1, 4)])
    texts += together
    # The engine trains on as if nothing had been written.
    batch = global_batch(0, 8, engine.config.data.seq_length, 51, "full")
    loss = float(train_step(engine, micro_batches(engine, batch)).losses[0])
    engine.mesh.close()
    return Written(worst, texts, loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name in SLOW else ()) for case in CASES]
)
def test_kept_keys_and_values_give_the_same_logits(pool: WorkerPool, case: Case) -> None:
    written = pool.run(case.world_size, write, case)
    (alone,) = pool.run(1, write, Case("alone", case.features))
    assert len(written[-1].differences) == 13
    assert max(max(rank.differences, default=0.0) for rank in written) < 1e-12
    for rank in written:
        assert rank.texts == alone.texts, "every layout writes the same"
        assert rank.loss == pytest.approx(alone.loss, rel=1e-12)
    assert alone.texts[0] == alone.texts[1] == alone.texts[4] != alone.texts[2]


def finish(rank: int) -> list[list[int]]:
    engine = make_engine(rank, Case("gpt", GPT))
    greedy = SamplingSettings(temperature=0.0)
    (whole,) = generate_tokens(engine, [PROMPT], 6, [greedy])
    (ended,) = generate_tokens(engine, [PROMPT], 6, [greedy], end_id=whole[2])
    (asked,) = generate_tokens(engine, [PROMPT], 6, [greedy], is_finished=lambda tokens: len(tokens) == 2)
    engine.mesh.close()
    return [whole, ended, asked]


def test_a_text_ends_where_it_is_to_end(pool: WorkerPool) -> None:
    ((whole, ended, asked),) = pool.run(1, finish)
    assert len(whole) == 6
    assert ended == whole[: whole.index(whole[2]) + 1]
    assert asked == whole[:2]


TEXTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9], [7, 9, 3], list(range(1, 15))]


def write_together(rank: int, case: Case) -> tuple[list[list[int]], list[list[int]], float]:
    """Texts of one batch, the same one by one, and the largest difference of logits between the two."""
    engine = make_engine(rank, case)
    settings = [SamplingSettings(seed=seed, top_p=0.9, repetition_penalty=1.3) for seed in range(len(TEXTS))]
    # Ends at different lengths; the last one outgrows the sequence of 16.
    ends = {"end_id": 7, "is_finished": lambda tokens: sum(tokens) > 400}
    together = generate_tokens(engine, TEXTS, 12, settings, **ends)
    alone = [generate_tokens(engine, [TEXTS[n]], 12, [settings[n]], **ends)[0] for n in range(len(TEXTS))]
    worst = 0.0
    grown = [[*text, 5, 6] for text in TEXTS]
    with NextLogits(engine, 16) as next_logits:
        batched = [next_logits(TEXTS), next_logits([text[:-1] for text in grown]), next_logits(grown)]
    for number, text in enumerate(TEXTS):
        with NextLogits(engine, 16) as next_logits:
            for at, length in enumerate((len(text), len(text) + 1, len(text) + 2)):
                one, several = next_logits([grown[number][:length]]), batched[at]
                if one is not None and several is not None:
                    worst = max(worst, float((one[0] - several[number]).abs().max() / one.abs().max()))
    engine.mesh.close()
    return together, alone, worst


@pytest.mark.parametrize(
    "case",
    [
        Case("gpt", GPT),
        pytest.param(Case("window", LLAMA | WINDOW, pp=2, layout=TWO_STAGES), marks=pytest.mark.slow),
        pytest.param(Case("tensor 2, sequence parallelism", LLAMA, tp=2), marks=pytest.mark.slow),
    ],
    ids=lambda case: case.name,
)
def test_a_text_in_a_batch_is_what_it_would_be_alone(pool: WorkerPool, case: Case) -> None:
    for together, alone, worst in pool.run(case.world_size, write_together, case):
        assert together == alone
        assert len({len(text) for text in together}) > 1, "they end at different lengths"
        assert worst < 1e-12


def write_windowed(rank: int) -> float:
    engine = make_engine(rank, Case("window", LLAMA | WINDOW))
    logits = []
    for cached in (True, False):
        with NextLogits(engine, 10, cached=cached) as next_logits:
            logits.append(torch.stack([next_logits([(PROMPT * 2)[:n]]) for n in (1, 2, 6, 10)]))  # type: ignore[list-item]
    engine.mesh.close()
    return float((logits[0] - logits[1]).abs().max())


def test_a_window_moves_along(pool: WorkerPool) -> None:
    assert pool.run(1, write_windowed)[0] < 1e-12


class Letters:
    """A tokenizer of single characters; 0 ends a document."""

    eod_id = 0

    def decode(self, ids: list[int]) -> str:
        return "".join("? äb"[number % 4] for number in ids)


DOCUMENTS = [np.array([5, 2, 1, 3, 0], dtype=np.uint16), np.array([], dtype=np.uint16), np.arange(1, 41) % 50]


def rate(rank: int, case: Case) -> dict[str, float]:
    engine = make_engine(rank, case)
    figures = score(engine, Letters(), DOCUMENTS).to_dict()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the data holds 1 tokens"):
        score(engine, Letters(), [np.array([3])])  # type: ignore[arg-type]
    engine.mesh.close()
    return figures


def rate_one_token_after_another(rank: int) -> float:
    """The same sum from the logits of each token by itself."""
    engine = make_engine(rank, Case("alone", LLAMA))
    tokens = np.concatenate(DOCUMENTS).tolist()
    total = 0.0
    for number in range(1, len(tokens)):
        # Windows of 16, each from its own beginning on.
        before = tokens[(number - 1) // 16 * 16 : number]
        with NextLogits(engine, 16, cached=False) as next_logits:
            logits = next_logits([before])
        assert logits is not None
        total -= float(logits[0].log_softmax(dim=-1)[tokens[number]])
    engine.mesh.close()
    return total


def test_loss_per_token_word_and_byte_in_every_layout(pool: WorkerPool) -> None:
    (total,) = pool.run(1, rate_one_token_after_another)
    text = Letters().decode([5, 2, 1, 3]) + "".join(Letters().decode([number]) for number in range(1, 41))
    for case in (
        Case("alone", LLAMA, layout={"training.micro_batch_size": 1}),
        # What training adds to the cross-entropy has no part in it.
        Case("tensor", LLAMA | REGULARISED, tp=2, layout={"training.micro_batch_size": 2}),
        Case("pipeline, data", LLAMA, pp=2, dp=2),
    ):
        for figures in pool.run(case.world_size, rate, case):
            assert figures["tokens"] == 44
            assert figures["bytes"] == len(text.encode()) > len(text)
            words = len(Letters().decode([5, 2, 1, 3]).split()) + len(Letters().decode(list(range(1, 41))).split())
            assert figures["words"] == words > 5
            assert figures["loss_per_token"] == pytest.approx(total / 44, rel=1e-12)
            assert figures["loss_per_word"] == pytest.approx(total / words, rel=1e-12)
            assert figures["bits_per_byte"] == pytest.approx(total / len(text.encode()) / math.log(2), rel=1e-12)
            assert figures["perplexity_per_token"] == pytest.approx(math.exp(total / 44), rel=1e-12)
