"""What a run tells of each step: the log line, and scalars for those who write them down.

Scalars are read one step late: the device is then already past the step they belong to, and nobody waits.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

import torch

from megallm.config.tree import Config
from megallm.device import Readback, memory_in_bytes
from megallm.plan.flops import flops_per_token
from megallm.train.step import StepMetrics
from megallm.train.writers import Writer, build_writers


@dataclass(frozen=True)
class StepRecord:
    """One step's scalars on the host. `more` holds what only some runs ask for."""

    iteration: int
    consumed_samples: int
    losses: dict[str, float]
    loss_scale: float
    grad_norm: float
    learning_rate: float
    global_batch_size: int
    skipped: int
    step_time_ms: float
    tokens_per_second: float
    more: dict[str, float]

    def scalars(self) -> dict[str, Any]:
        """Flat form, each loss under its own name, without the number of the step."""
        fields = asdict(self)
        del fields["iteration"]
        losses, more = fields.pop("losses"), fields.pop("more")
        return {"consumed_samples": fields.pop("consumed_samples"), **losses, **fields, **more}


class _Pending(NamedTuple):
    """A step that is not yet published."""

    iteration: int
    consumed_samples: int
    batch_size: int
    readback: Readback
    more: tuple[str, ...]
    seconds: float


class Reporter:
    """Turns step metrics into records one step late, and hands them to whoever listens.

    All ranks keep step with each other, so that only the rank that is told to `report` reads scalars at all.
    """

    def __init__(
        self,
        config: Config,
        world_size: int,
        report: bool,
        term_names: tuple[str, ...],
        last_iteration: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.world_size = world_size
        self.report = report
        self.term_names = term_names
        self._pending: _Pending | None = None
        self._device = device or torch.device("cpu")
        self._last = time.perf_counter()
        self._window: list[StepRecord] = []
        # Batch size and seconds of the latest steps, of all but the first, which warms up.
        self._seconds: deque[tuple[int, float]] = deque(maxlen=1000)
        self._is_warm = False
        self.last_iteration = config.training.train_iters if last_iteration is None else last_iteration
        training = config.training
        moves = training.fp16 and training.loss_scale is None
        # Below this, overflows no longer come from the scale; None once that has been said.
        self._loss_scale_floor = training.min_loss_scale if moves else None
        self._writers: list[Writer] = build_writers(config) if report else []

    def start(self) -> None:
        """Begins to measure the first step's time."""
        self._last = time.perf_counter()

    def step(self, iteration: int, consumed_samples: int, metrics: StepMetrics) -> None:
        """Takes note of a step and publishes the one before."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if self._is_warm:
            self._seconds.append((metrics.global_batch_size, seconds))
        self._is_warm = True
        if not self.report:
            return
        scalars = torch.stack((metrics.loss_scale, metrics.grad_norm, metrics.learning_rate, metrics.skipped))
        more = [value.reshape(1) for value in metrics.more.values()]
        readback = Readback(torch.cat((scalars, metrics.losses, *more)))
        previous, batch_size = self._pending, metrics.global_batch_size
        self._pending = _Pending(iteration, consumed_samples, batch_size, readback, tuple(metrics.more), seconds)
        if previous is not None:
            self._publish(previous)

    def flush(self) -> None:
        """Publishes the last step. To be called before a save, an evaluation and the end."""
        if self._pending is not None:
            previous, self._pending = self._pending, None
            self._publish(previous)

    def median_seconds(self, batch_size: int) -> float | None:
        """The median time of the latest steps of this batch size; None where there were none but the first."""
        times = [seconds for size, seconds in self._seconds if size == batch_size]
        return median(times) if times else None

    def pause(self) -> Callable[[], None]:
        """Leaves the time until the returned function is called out of the next step's."""
        begin = time.perf_counter()

        def resume() -> None:
            self._last += time.perf_counter() - begin

        return resume

    def evaluation(
        self, iteration: int, consumed_samples: int, losses: dict[str, float], dataset: str = "", *, test: bool = False
    ) -> None:
        """Publishes an evaluation on the validation data, on one `dataset` of several, or on the test data."""
        if not self.report:
            return
        # As Megatron does, the exponential of a loss that means nothing yet is cut off. That of a z-loss never does.
        perplexities = {name: math.exp(min(20.0, value)) for name, value in losses.items() if name != "z_loss"}
        text = " | ".join(
            f"{name.replace('_', ' ')} {kind}: {values[name]:.6E}"
            for name in losses
            for kind, values in (("value", losses), ("PPL", perplexities))
            if name in values
        )
        on_dataset = f" on {dataset}" if dataset else ""
        print(f" {'test' if test else 'validation'} loss at iteration {iteration}{on_dataset} | {text} |", flush=True)
        prefix = "_".join(word for word in ("test" if test else "valid", dataset) if word)
        named = {"consumed_samples": consumed_samples, **{f"{prefix}_{name}": loss for name, loss in losses.items()}}
        if self.config.logging.log_validation_ppl_to_tensorboard:
            named |= {f"{prefix}_{name}_ppl": value for name, value in perplexities.items()}
        self.write(iteration, named)

    def write(self, iteration: int, scalars: dict[str, Any]) -> None:
        """Hands scalars to all who write them down."""
        for writer in self._writers:
            writer.write(iteration, scalars)

    def sample(self, iteration: int, text: str) -> None:
        """Publishes a text that the model wrote."""
        if self.report:
            print(f" sample at iteration {iteration} | {text!r} |", flush=True)
        for writer in self._writers:
            writer.write_text(iteration, "sample", text)

    def close(self) -> None:
        """Publishes what is left and closes the files."""
        self.flush()
        for writer in self._writers:
            writer.close()

    def _publish(self, step: _Pending) -> None:
        loss_scale, grad_norm, learning_rate, skipped, *rest = step.readback.values()
        losses, more = rest[: len(self.term_names)], rest[len(self.term_names) :]
        iteration, batch_size, seconds = step.iteration, step.batch_size, step.seconds
        record = StepRecord(
            iteration=iteration,
            consumed_samples=step.consumed_samples,
            losses=dict(zip(self.term_names, losses, strict=True)),
            loss_scale=loss_scale,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            global_batch_size=batch_size,
            skipped=int(skipped),
            step_time_ms=seconds * 1e3,
            tokens_per_second=batch_size * self.config.data.seq_length / seconds,
            more=dict(zip(step.more, more, strict=True)),
        )
        self._warn_at_the_floor(record)
        self._window.append(record)
        scalars = record.scalars()
        if self.config.logging.log_memory_to_tensorboard:
            scalars |= memory_in_bytes(self._device)
        self.write(iteration, scalars)
        if iteration % self.config.logging.log_interval == 0 or iteration == self.last_iteration:
            print(self._log_line(), flush=True)
            self._window.clear()

    def _warn_at_the_floor(self, record: StepRecord) -> None:
        floor = self._loss_scale_floor
        if floor is not None and record.skipped and record.loss_scale <= floor:
            self._loss_scale_floor = None
            print(
                f"> iteration {record.iteration} was skipped with the loss scale at --min-loss-scale {floor:g}: what "
                "overflows is not the scaled gradient but the model itself. Go back to an earlier checkpoint with a "
                "lower --lr, or with --bf16",
                flush=True,
            )

    def _log_line(self) -> str:
        """Megatron's fields in Megatron's order; times, losses and counts are those since the last line.

        A skipped step has no part in the mean loss.
        """
        last = self._window[-1]
        counted = [record for record in self._window if not record.skipped] or self._window
        skipped = sum(record.skipped for record in self._window)
        nan = sum(any(math.isnan(loss) for loss in record.losses.values()) for record in self._window)
        milliseconds = sum(record.step_time_ms for record in self._window) / len(self._window)
        samples = sum(record.global_batch_size for record in self._window) / len(self._window)
        tokens = samples * self.config.data.seq_length
        flops = flops_per_token(self.config.model, self.config.data.seq_length).half * tokens
        teraflops = flops / (milliseconds / 1e3) / self.world_size / 1e12
        losses = " | ".join(
            f"{name.replace('_', ' ')}: {sum(record.losses[name] for record in counted) / len(counted):.6E}"
            for name in self.term_names
        )
        more = {
            "decoupled_learning_rate": " decoupled learning rate: {:.6E} |",
            "num_zeros": " num zeros: {:.0f} |",
            "params_norm": " params norm: {:.3f} |",
        }
        rate, zeros, norm = (text.format(last.more[name]) if name in last.more else "" for name, text in more.items())
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        return (
            f" [{stamp}] iteration {last.iteration:8d}/{self.last_iteration:8d} |"
            f" consumed samples: {last.consumed_samples:12d} |"
            f" elapsed time per iteration (ms): {milliseconds:.1f} |"
            f" throughput per GPU (TFLOP/s/GPU): {teraflops:.4g} |"
            f" learning rate: {last.learning_rate:.6E} |{rate}"
            f" global batch size: {last.global_batch_size:5d} |"
            f" {losses} | loss scale: {last.loss_scale:.1f} | grad norm: {last.grad_norm:.3f} |{zeros}{norm}"
            f" number of skipped iterations: {skipped:3d} | number of nan iterations: {nan:3d} |"
            f" tokens per second per process: {tokens / (milliseconds / 1e3) / self.world_size:.0f} |"
        )


def log_on_rank_zero(rank: int) -> Callable[[str], None]:
    """A print that only rank 0 does."""
    return (lambda message: print(f"> {message}", flush=True)) if rank == 0 else (lambda message: None)


def mean_losses(sums: torch.Tensor, counts: torch.Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """Losses of an evaluation from its sums and counts."""
    return dict(zip(names, (sums / counts.clamp(min=1.0)).tolist(), strict=True))
