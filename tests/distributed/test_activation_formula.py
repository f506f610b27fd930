"""What a plan says of memory equals what is there: bytes that autograd keeps, and parameters, of every stage."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megallm.config import Config, resolve
from megallm.config.dictionary import build
from megallm.config.operators import parse_choices
from megallm.layers.context import LayoutContext
from megallm.mesh import Mesh, MeshShape
from megallm.ops.library import NATIVE
from megallm.parameter import description_of
from megallm.plan.activations import Sizes, saved_by_stage
from megallm.plan.parameters import HeldParameters, held_by_stage
from megallm.plan.validate import validate
from megallm.train.saved_bytes import SavedBytes
from megallm.train.tasks.bert import BERTTask
from megallm.train.tasks.gpt import GPTTask
from megallm.train.tasks.task import Task
from tests.distributed.pool import WorkerPool

# Layers, and whether the stage is the first and the last one.
STAGES = (
    ((0, 2), True, False),
    ((1, 3), False, False),
    ((2, 3), False, True),
    ((0, 3), True, True),
    ((1, 1), False, False),
)
MODULES = (["core_attn"], ["mlp"], ["core_attn", "mlp"])
RECOMPUTE: list[dict[str, Any]] = [
    *[{}] * 3,
    *({"training.recompute_granularity": "selective", "training.recompute_modules": modules} for modules in MODULES),
    *({"training.recompute_granularity": "full", "training.recompute_num_layers": number} for number in (1, 2)),
    *(
        {
            "training.recompute_granularity": "full",
            "training.recompute_method": "block",
            "training.recompute_num_layers": number,
        }
        for number in (1, 2)
    ),
]
OPS = (
    ["reference"],
    ["softmax=reference", "rms_norm=reference"],
    ["reference", "rotary=native", "swiglu=native"],
    ["dropout_add=reference", "layer_norm=reference"],
)
DTYPES = {"": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def random_configuration(number: int, architecture: str = "gpt", ops: Sequence[str] = ()) -> Config:
    """A valid configuration; the same for the same number and operators."""
    draw = random.Random(number)
    while True:
        tensor = draw.choice([1, 1, 2, 4])
        heads = draw.choice([4, 8])
        groups = draw.choice([heads, heads // 2, 2, 1])
        precision = draw.choice(list(DTYPES))
        values: dict[str, Any] = {
            "model.num_layers": 3,
            "model.hidden_size": heads * draw.choice([4, 8]),
            "model.ffn_hidden_size": draw.choice([32, 48]),
            "model.num_attention_heads": heads,
            "model.kv_channels": draw.choice([None, 8, 12]),
            "model.group_query_attention": groups < heads,
            "model.num_query_groups": groups if groups < heads else None,
            "model.position_embedding_type": draw.choice(["learned_absolute", "sinusoidal", "rope", "rope", "none"]),
            "model.normalization": draw.choice(["RMSNorm", "LayerNorm"]),
            "model.activation": draw.choice(["gelu", "gelu_tanh", "relu", "squared_relu", "swiglu", "swiglu", "geglu"]),
            "model.add_bias_linear": draw.random() < 0.5,
            "model.add_qkv_bias": draw.random() < 0.3,
            "model.qk_layernorm": draw.random() < 0.3,
            "model.apply_layernorm_1p": draw.random() < 0.3,
            "model.parallel_residual": draw.random() < 0.2,
            "model.apply_residual_connection_post_layernorm": draw.random() < 0.2,
            "model.scale_embeddings": draw.random() < 0.2,
            "model.window_size": draw.choice([None, None, None, "3,0"]),
            "model.tie_embeddings": draw.random() < 0.5,
            "model.hidden_dropout": draw.choice([0.0, 0.1]),
            "model.attention_dropout": draw.choice([0.0, 0.0, 0.1]),
            "model.vocab_size": draw.choice([40, 51]),
            "model.make_vocab_size_divisible_by": draw.choice([1, 8]),
            "parallel.tensor_model_parallel_size": tensor,
            "parallel.sequence_parallel": draw.random() < 0.7,
            "training.micro_batch_size": draw.choice([1, 2, 3]),
            "training.loss_chunk_size": draw.choice([0, 0, 5]),
            **draw.choice(RECOMPUTE),
            "training.train_iters": 10,
            "optimizer.lr": 1e-3,
            "data.seq_length": draw.choice([8, 16]),
            "data.mock_data": True,
            "data.tokenizer_type": "NullTokenizer",
            "data.reset_attention_mask": draw.random() < 0.3,
            "data.reset_position_ids": draw.random() < 0.3,
        }
        values |= {f"training.{precision}": True} if precision else {}
        values |= {"training.ops": list(ops)}
        if architecture == "bert":
            values |= {
                "model.architecture": "bert",
                "model.window_size": None,
                "data.reset_attention_mask": False,
                "data.reset_position_ids": False,
                "model.bert_binary_head": draw.random() < 0.6,
                "model.num_token_types": draw.choice([None, 2]),
            }
        config = build(values)
        if not validate(config, tensor):
            return resolve(config, tensor)


@dataclass
class Counted:
    """Of one stage on one rank: bytes kept by autograd, and elements of parameters by what they are reduced over."""

    kept: int
    held: HeldParameters


def count_stages(rank: int, config: Config) -> list[Counted]:
    """Runs forward passes of all kinds of stages and counts."""
    mesh = Mesh(MeshShape(tp=config.parallel.tensor_model_parallel_size), rank, torch.device("cpu"))
    precision = next((name for name in DTYPES if name and getattr(config.training, name)), "")
    context = LayoutContext(
        tp=mesh.tp,
        sequence_parallel=config.parallel.sequence_parallel and mesh.tp.size > 1,
        dtype=DTYPES[precision],
        device=mesh.device,
        seed=1,
        operators=parse_choices(config.training.ops),
    )
    task = (BERTTask if config.model.architecture == "bert" else GPTTask).from_config(config)
    return [
        _count(config, task, context, range(*layers), is_first=is_first, is_last=is_last)
        for layers, is_first, is_last in STAGES
    ]


def _count(
    config: Config, task: Task, context: LayoutContext, layers: range, *, is_first: bool, is_last: bool
) -> Counted:
    size, length = config.training.micro_batch_size, config.data.seq_length
    stage = task.build_stage(config, layers, context, is_first=is_first, is_last=is_last)
    batch = {
        "tokens": torch.randint(0, 40, (size, length)),
        "labels": torch.randint(0, 40, (size, length)),
        "loss_mask": torch.ones(size, length),
        "position_ids": torch.arange(length).repeat(size, 1),
        "sample_ids": torch.arange(size),
    }
    if config.model.architecture == "bert":
        some = torch.arange(length).repeat(size, 1) % 2
        batch |= {"types": some, "padding_mask": some, "is_random": torch.arange(size) % 2}
    if config.data.reset_attention_mask:
        batch["document_ids"] = torch.zeros(size, length, dtype=torch.int64)
    local = length // (context.tp.size if context.sequence_parallel else 1)
    input = torch.randn(local, size, config.model.hidden_size).to(context.dtype).requires_grad_()
    step = torch.zeros((), dtype=torch.int64)
    known = [*stage.parameters(), *stage.buffers(), *batch.values(), step]
    with SavedBytes(known) as saved:
        outputs = stage(() if is_first else (input,), batch, step)
        terms = task.loss_terms(outputs, batch, context) if is_last else None
        kept = saved.current
    (sum(term.differentiated for term in terms) if terms else outputs[0].float().sum()).backward()
    del outputs, terms
    assert saved.current == 0, "after the backward pass nothing is kept"
    over_both = sum(
        parameter.numel() for parameter in stage.parameters() if "tp" in description_of(parameter).gradient_partial_over
    )
    return Counted(kept, HeldParameters(sum(p.numel() for p in stage.parameters()) - over_both, over_both))


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE.in_use, reason="the formula is that of the native operators")
@pytest.mark.parametrize(
    ("architecture", "number"),
    [
        pytest.param(architecture, n, id=f"{architecture}, configuration {n}")
        for architecture, numbers in (("gpt", range(40)), ("bert", range(6)))
        for n in numbers
    ],
)
def test_formulas_equal_what_is_there(pool: WorkerPool, architecture: str, number: int) -> None:
    _check(pool, random_configuration(number, architecture))


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE.in_use, reason="some of the operators are the native ones")
@pytest.mark.parametrize("number", range(100, 124))
def test_formulas_hold_for_operators_in_plain_torch(pool: WorkerPool, number: int) -> None:
    _check(pool, random_configuration(number, "bert" if number % 6 == 0 else "gpt", OPS[number % len(OPS)]))


def _check(pool: WorkerPool, config: Config) -> None:
    sizes = Sizes(config, on_gpu=False)
    ranks = pool.run(config.parallel.tensor_model_parallel_size, count_stages, config)
    for counted in ranks:
        for (layers, is_first, is_last), stage in zip(STAGES, counted, strict=True):
            num_layers = len(range(*layers))
            kept = saved_by_stage(sizes, num_layers, is_first=is_first, is_last=is_last)
            assert stage.kept == kept, f"{layers} {is_first} {is_last}: {config}"
            assert stage.held == held_by_stage(config, num_layers, is_first=is_first, is_last=is_last)
