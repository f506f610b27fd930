"""Training throughput per CPU-second: megallm against transformers, and layouts against one process.

    python benchmarks/train_step.py [--layouts tp2 pp2] [--steps 4] [--output [FILE]]

A small Llama in float32 takes whole steps (forward, backward, clipping to a norm of 1, AdamW) on batches of 8 sequences
of 256 tokens. Every process has one thread. What counts is the CPU time of all threads of all processes, so that
neither idle waiting nor a busy machine enters; starting the processes does not count either. Contenders take turns
within one run, block by block, and each ratio is that of two neighbouring blocks: the median of the repetitions stands,
with their range beside it.

The peer is transformers' LlamaForCausalLM as a user would set it up: scaled dot product attention, torch's AdamW in
whichever of its fast forms (fused, foreach) is the faster here, clip_grad_norm_. megallm has the C library keep freed
memory, which nobody does for transformers of himself; a second figure is against transformers with that too. A single
process, and tensor parallelism alone, take all 8 sequences at once; pipelines take micro-batches of 2.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from record import RESULTS, machine, write

from megallm.config import resolve
from megallm.config.dictionary import build
from megallm.device import keep_freed_memory
from megallm.mesh import Mesh, MeshShape
from megallm.train.engine import build_engine
from megallm.train.step import train_step
from megallm.train.tasks.gpt import GPTTask

NUM_LAYERS, HIDDEN_SIZE, NUM_HEADS, FFN_SIZE, VOCAB_SIZE = 4, 256, 4, 688, 8000
SEQ_LENGTH, BATCH_SIZE = 256, 8
TOKENS_PER_STEP = SEQ_LENGTH * BATCH_SIZE
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 3e-4, 0.1, 1.0
WARMUP_STEPS = 2
# Whether freed memory is kept.
PEERS = {"transformers": False, "transformers with memory kept": True}
DEFAULT_OUTPUT = RESULTS / "train_step.json"


@dataclass(frozen=True)
class Layout:
    """How the processes are laid out. `megatron_core` is the ratio to one process that Megatron-core keeps on a CPU."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    virtual_stages: int = 1
    micro_batch_size: int = BATCH_SIZE
    megatron_core: float | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


SINGLE = Layout()
LAYOUTS = {
    "tp2": Layout(tp=2, megatron_core=0.72),
    "pp2": Layout(pp=2, virtual_stages=2, micro_batch_size=2, megatron_core=0.87),
    "tp2pp2": Layout(tp=2, pp=2, micro_batch_size=2, megatron_core=0.65),
    "tp2pp2dp2": Layout(tp=2, pp=2, dp=2, micro_batch_size=2, megatron_core=0.62),
}

# Takes one step on the batch of that number and returns its loss.
TakeStep = Callable[[int], float]


def text_of_step(step: int) -> torch.Tensor:
    """int64 [batch, sequence + 1], the same for every contender."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCAB_SIZE, (BATCH_SIZE, SEQ_LENGTH + 1), generator=generator)


def megallm_contender(layout: Layout, rank: int) -> TakeStep:
    settings = {
        "model.num_layers": NUM_LAYERS,
        "model.hidden_size": HIDDEN_SIZE,
        "model.ffn_hidden_size": FFN_SIZE,
        "model.num_attention_heads": NUM_HEADS,
        "model.vocab_size": VOCAB_SIZE,
        "model.position_embedding_type": "rope",
        "model.normalization": "RMSNorm",
        "model.activation": "swiglu",
        "model.add_bias_linear": False,
        "model.tie_embeddings": False,
        "parallel.tensor_model_parallel_size": layout.tp,
        "parallel.pipeline_model_parallel_size": layout.pp,
        "parallel.num_virtual_stages_per_pipeline_rank": layout.virtual_stages,
        "parallel.use_distributed_optimizer": layout.dp > 1,
        "training.micro_batch_size": layout.micro_batch_size,
        "training.global_batch_size": BATCH_SIZE,
        "training.train_iters": 10_000,
        "optimizer.lr": LEARNING_RATE,
        "optimizer.lr_decay_style": "constant",
        "optimizer.weight_decay": WEIGHT_DECAY,
        "optimizer.clip_grad": MAX_GRAD_NORM,
        "data.seq_length": SEQ_LENGTH,
        "data.mock_data": True,
    }
    keep_freed_memory()  # as a training program does when it starts
    mesh = Mesh(MeshShape(tp=layout.tp, pp=layout.pp, dp=layout.dp), rank, torch.device("cpu"))
    config = resolve(build(settings), layout.world_size)
    engine = build_engine(config, GPTTask.from_config(config), mesh)

    def take_step(step: int) -> float:
        text = text_of_step(step)
        batch = {
            "tokens": text[:, :-1],
            "labels": text[:, 1:],
            "loss_mask": torch.ones(BATCH_SIZE, SEQ_LENGTH),
            "position_ids": torch.arange(SEQ_LENGTH).expand(BATCH_SIZE, SEQ_LENGTH),
            "sample_ids": torch.arange(BATCH_SIZE),
        }
        # Data parallel ranks take turns in picking micro-batches.
        micro_batches = zip(*(tensor.split(layout.micro_batch_size) for tensor in batch.values()), strict=True)
        own = [dict(zip(batch, tensors, strict=True)) for tensors in micro_batches][mesh.dp.rank :: mesh.dp.size]
        return float(train_step(engine, own).losses[0])

    return take_step


def transformers_contender(optimizer_form: str, keeps_memory: bool, rank: int) -> TakeStep:
    from transformers import LlamaConfig, LlamaForCausalLM

    if keeps_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=NUM_LAYERS,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=FFN_SIZE,
            num_attention_heads=NUM_HEADS,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=SEQ_LENGTH,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **{optimizer_form: True}
    )

    def take_step(step: int) -> float:
        tokens = text_of_step(step)[:, :-1]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return take_step


def serve(connection: Connection, rank: int, world_size: int, port: int, make: Callable[[int], TakeStep]) -> None:
    """Takes as many steps as the parent asks for; answers with the CPU seconds that they took, and the last loss."""
    torch.set_num_threads(1)
    if world_size > 1:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    take_step = make(rank)
    steps = itertools.count()
    while (num_steps := connection.recv()) > 0:
        begin = time.process_time()
        for step in itertools.islice(steps, num_steps):
            loss = take_step(step)
        connection.send((time.process_time() - begin, loss))
    if world_size > 1:
        dist.destroy_process_group()


class Contender:
    """Processes that were warmed up and wait for their turn."""

    def __init__(self, make: Callable[[int], TakeStep], world_size: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, world_size, self.store.port, make), daemon=True)
            process.start()
            theirs.close()
            self.processes.append((process, ours))
        self.loss = float("nan")
        self.tokens_per_cpu_second(WARMUP_STEPS)

    def tokens_per_cpu_second(self, num_steps: int) -> float:
        """Takes steps; CPU seconds are summed over threads and processes."""
        for _, connection in self.processes:
            connection.send(num_steps)
        answers = [connection.recv() for _, connection in self.processes]
        self.loss = answers[0][1]
        return num_steps * TOKENS_PER_STEP / sum(seconds for seconds, _ in answers)

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        for process, connection in self.processes:
            with contextlib.suppress(OSError):
                connection.send(0)
            process.join(timeout=10)
            process.kill()


def megallm(layout: Layout) -> Contender:
    return Contender(partial(megallm_contender, layout), layout.world_size)


def fastest_peer(keeps_memory: bool) -> tuple[Contender, str]:
    """transformers with the form of AdamW that is the faster here."""
    forms = {form: Contender(partial(transformers_contender, form, keeps_memory)) for form in ("fused", "foreach")}
    rates = {form: statistics.median(peer.tokens_per_cpu_second(2) for _ in range(3)) for form, peer in forms.items()}
    best = max(rates, key=lambda form: rates[form])
    for form, peer in forms.items():
        if form != best:
            peer.__exit__()
    return forms[best], best


def compare(contender: Contender, baseline: Contender, num_steps: int, repetitions: int) -> dict[str, float]:
    """Rates of both and the ratio of the first to the second; they change places in every repetition."""
    rates, baseline_rates = [], []
    for repetition in range(repetitions):
        turns = [(contender, rates), (baseline, baseline_rates)]
        for who, record in turns if repetition % 2 else reversed(turns):
            record.append(who.tokens_per_cpu_second(num_steps))
    ratios = [rate / other for rate, other in zip(rates, baseline_rates, strict=True)]
    return {
        "tokens_per_cpu_second": round(statistics.median(rates), 1),
        "baseline_tokens_per_cpu_second": round(statistics.median(baseline_rates), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "loss": round(contender.loss, 4),
        "baseline_loss": round(baseline.loss, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="training steps in a block (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=7, help="pairs of blocks (default: %(default)s)")
    parser.add_argument(
        "--layouts", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS), help="layouts to measure (default: all)"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave out the comparison with transformers")
    parser.add_argument(
        "--output",
        type=Path,
        nargs="?",
        const=DEFAULT_OUTPUT,
        help=f"write JSON (to {DEFAULT_OUTPUT.name} in results/)",
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "machine": machine("torch"),
        "steps_per_block": arguments.steps,
        "repetitions": arguments.repetitions,
    }
    with megallm(SINGLE) as single:
        for what, keeps_memory in [] if arguments.no_peer else PEERS.items():
            peer, form = fastest_peer(keeps_memory)
            with peer:
                result = compare(single, peer, arguments.steps, arguments.repetitions)
            record[f"one process against {what}"] = {"adamw": form, **result}
            print(
                f"one process: {result['tokens_per_cpu_second']:.0f} tokens per CPU second, {what} "
                f"({form} AdamW) {result['baseline_tokens_per_cpu_second']:.0f}: ratio {result['ratio']:.2f} "
                f"({result['ratio_min']:.2f} to {result['ratio_max']:.2f})",
                flush=True,
            )
        record["layouts against one process"] = {}
        for name in arguments.layouts:
            layout = LAYOUTS[name]
            with megallm(layout) as contender:
                result = compare(contender, single, arguments.steps, arguments.repetitions)
            record["layouts against one process"][name] = {"layout": asdict(layout), **result}
            print(
                f"{name}: {result['tokens_per_cpu_second']:.0f} tokens per CPU second, one process "
                f"{result['baseline_tokens_per_cpu_second']:.0f}: ratio {result['ratio']:.2f} "
                f"({result['ratio_min']:.2f} to {result['ratio_max']:.2f}); Megatron-core {layout.megatron_core}",
                flush=True,
            )
    if arguments.output:
        write(arguments.output, record)


if __name__ == "__main__":
    main()
