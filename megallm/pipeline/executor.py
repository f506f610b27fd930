"""Walks this rank's list of steps and does what each says.

The executor knows nothing of any particular schedule. The order of work, the receive buffers and the waits are all in
the lowered schedule, which was verified before; here each kind of action is one short method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megallm.communication import Work
from megallm.device import Measures
from megallm.mesh import Mesh
from megallm.schedule import Action, Kind, LoweredSchedule, Step

Batch = dict[str, torch.Tensor]
Tensors = tuple[torch.Tensor, ...]

# (inputs, micro-batch, step that keys dropout or None) -> outputs
Stage = Callable[[Tensors, Batch, torch.Tensor | None], Tensors]
# (outputs of the last stage, micro-batch) -> scalar to differentiate. Values to report are the function's own affair.
LossFunction = Callable[[Tensors, Batch], torch.Tensor]


class _Anchor(torch.autograd.Function):
    """Stands for a stage's outputs in the backward pass, so that their memory is free as soon as they are sent."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensors], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[Any, ...]:
        return (None, *ctx.gradients.pop())


@dataclass
class _Run:
    """What is under way in one call: everything is keyed by (stage, micro-batch)."""

    micro_batches: list[Batch]
    loss_function: LossFunction
    dropout_step: torch.Tensor | None
    with_backward: bool
    received: dict[Action, tuple[list[Work], Tensors]] = field(default_factory=dict)
    sends: dict[Action, list[Work]] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Tensors] = field(default_factory=dict)
    input_gradients: dict[tuple[int, int], Tensors] = field(default_factory=dict)
    # inputs, what to differentiate, and where the gradient of the outputs is put
    saved: dict[tuple[int, int], tuple[Tensors, torch.Tensor, list[Tensors]]] = field(default_factory=dict)


class PipelineExecutor:
    """Runs lowered schedules over this rank's stages.

    Args:
        stages: this rank's stages by their global number.
        mesh: for the pipeline neighbours.
        message: shape and dtype of each tensor that passes between stages; constant within one call.

    Attributes:
        close_chunk: called with a stage's number after its last backward pass; does nothing until it is set.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        mesh: Mesh,
        message: list[tuple[tuple[int, ...], torch.dtype]],
    ) -> None:
        self.stages = stages
        self.mesh = mesh
        self.message = message
        self.close_chunk: Callable[[int], None] = lambda stage: None
        self.channels = mesh.connect_pipeline()
        self._buffers: dict[tuple[Kind, int], Tensors] = {}
        self._check_messages_agree()
        self._methods = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.SEND_F: self._send_outputs,
            Kind.RECV_F: self._receive,
            Kind.SEND_B: self._send_input_gradients,
            Kind.RECV_B: self._receive,
            Kind.GRAD_SYNC: lambda run, schedule, step: self.close_chunk(step.action.stage),
        }

    def expect(self, message: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
        """From the next call on, other tensors pass between stages. Called by all ranks with the same `message`."""
        if message != self.message:
            self.message = message
            self._buffers.clear()

    def run(
        self,
        lowered: LoweredSchedule,
        micro_batches: list[Batch],
        loss_function: LossFunction,
        dropout_step: torch.Tensor | None = None,
        stopwatch: Measures | None = None,
    ) -> None:
        """Takes `micro_batches` through the schedule. Gradients are left with the parameters or their sinks.

        `stopwatch` measures each forward and backward pass.
        """
        schedule = lowered.schedule
        assert len(micro_batches) == schedule.num_micro_batches, (
            "the schedule is made for another number of micro-batches"
        )
        run = _Run(micro_batches, loss_function, dropout_step, with_backward=not schedule.forward_only)
        with torch.set_grad_enabled(run.with_backward):
            for step in lowered.steps[self.mesh.pp.rank]:
                for action in step.awaits:
                    _wait(run.sends.pop(action))
                self._wait_for_input(run, step.action)
                if stopwatch is not None and step.action.kind in (Kind.F, Kind.B):
                    with stopwatch.measure(step.action):
                        self._methods[step.action.kind](run, lowered, step)
                else:
                    self._methods[step.action.kind](run, lowered, step)
        for works in run.sends.values():
            _wait(works)

    def receive_buffers(self) -> list[torch.Tensor]:
        """The buffers that messages have come into so far; they stay."""
        return [tensor for tensors in self._buffers.values() for tensor in tensors]

    # One method for each kind of action

    def _forward(self, run: _Run, lowered: LoweredSchedule, step: Step) -> None:
        stage, micro_batch = step.action.stage, step.action.micro_batch
        assert micro_batch is not None, "a forward pass belongs to a micro-batch"
        key = (stage, micro_batch)
        inputs = self._inputs(run, lowered, stage, micro_batch)
        batch = run.micro_batches[micro_batch]
        outputs = self.stages[stage](inputs, batch, run.dropout_step)
        if stage == lowered.schedule.num_stages - 1:
            loss = run.loss_function(outputs, batch)
            if run.with_backward:
                run.saved[key] = (inputs, loss, [])
            return
        run.outputs[key] = tuple(output.detach() for output in outputs)
        if run.with_backward and stage >= lowered.schedule.first_trainable_stage:
            gradients: list[Tensors] = []
            run.saved[key] = (inputs, _Anchor.apply(gradients, *outputs), gradients)

    def _backward(self, run: _Run, lowered: LoweredSchedule, step: Step) -> None:
        stage, micro_batch = step.action.stage, step.action.micro_batch
        assert micro_batch is not None, "a backward pass belongs to a micro-batch"
        inputs, root, gradients = run.saved.pop((stage, micro_batch))
        if stage < lowered.schedule.num_stages - 1:
            gradients.append(self._output_gradients(run, stage, micro_batch))
        root.backward()
        if stage > lowered.schedule.first_trainable_stage:
            run.input_gradients[(stage, micro_batch)] = tuple(_gradient(tensor) for tensor in inputs)

    def _send_outputs(self, run: _Run, lowered: LoweredSchedule, step: Step) -> None:
        action = step.action
        tensors = run.outputs.pop(_key(action))
        run.sends[action] = self._send(lowered, tensors, to_stage=action.stage + 1)

    def _send_input_gradients(self, run: _Run, lowered: LoweredSchedule, step: Step) -> None:
        action = step.action
        tensors = run.input_gradients.pop(_key(action))
        run.sends[action] = self._send(lowered, tensors, to_stage=action.stage - 1)

    def _receive(self, run: _Run, lowered: LoweredSchedule, step: Step) -> None:
        action = step.action
        assert step.slot is not None, "a receive names its buffer"
        from_stage = action.stage - 1 if action.kind is Kind.RECV_F else action.stage + 1
        channel = self.channels[(self._rank_of(lowered, from_stage), self.mesh.rank)]
        buffers = self._buffer(action.kind, step.slot)
        run.received[action] = ([channel.receive(buffer) for buffer in buffers], buffers)

    # What they share

    def _wait_for_input(self, run: _Run, action: Action) -> None:
        """Waits for the message that a forward or backward pass needs, before its time is taken."""
        kind = {Kind.F: Kind.RECV_F, Kind.B: Kind.RECV_B}.get(action.kind)
        if kind is None:
            return
        arriving = run.received.get(Action(kind, action.stage, action.micro_batch))
        if arriving is not None:
            _wait(arriving[0])

    def _inputs(self, run: _Run, lowered: LoweredSchedule, stage: int, micro_batch: int) -> Tensors:
        if stage == 0:
            return ()
        arrived = run.received.pop(Action(Kind.RECV_F, stage, micro_batch), None)
        # Two neighbouring stages on one rank hand their values over without a message.
        tensors = run.outputs.pop((stage - 1, micro_batch)) if arrived is None else arrived[1]
        differentiable = run.with_backward and stage > lowered.schedule.first_trainable_stage
        return tuple(tensor.detach().requires_grad_(differentiable) for tensor in tensors)

    def _output_gradients(self, run: _Run, stage: int, micro_batch: int) -> Tensors:
        arrived = run.received.pop(Action(Kind.RECV_B, stage, micro_batch), None)
        return run.input_gradients.pop((stage + 1, micro_batch)) if arrived is None else arrived[1]

    def _send(self, lowered: LoweredSchedule, tensors: Tensors, to_stage: int) -> list[Work]:
        channel = self.channels[(self.mesh.rank, self._rank_of(lowered, to_stage))]
        return [channel.send(tensor.contiguous()) for tensor in tensors]

    def _rank_of(self, lowered: LoweredSchedule, stage: int) -> int:
        return self.mesh.pp.ranks[lowered.schedule.placement[stage]]

    def _buffer(self, kind: Kind, slot: int) -> Tensors:
        if (kind, slot) not in self._buffers:
            self._buffers[(kind, slot)] = tuple(
                torch.empty(shape, dtype=dtype, device=self.mesh.device) for shape, dtype in self.message
            )
        return self._buffers[(kind, slot)]

    def _check_messages_agree(self) -> None:
        """Compares what both ends of every channel expect: a short send into a long receive is not noticed by gloo."""
        described = [[len(shape), *shape, torch.finfo(dtype).bits] for shape, dtype in self.message]
        flat = [number for tensor in described for number in tensor]
        mine = torch.tensor([len(self.message), *flat] + [0] * (63 - len(flat)), device=self.mesh.device)
        theirs = {edge: torch.empty_like(mine) for edge in self.channels if edge[1] == self.mesh.rank}
        works = [self.channels[edge].receive(theirs[edge]) for edge in theirs]
        works += [self.channels[edge].send(mine) for edge in self.channels if edge[0] == self.mesh.rank]
        _wait(works)
        for edge, other in theirs.items():
            if not torch.equal(mine, other):
                raise RuntimeError(
                    f"pipeline ranks {edge[0]} and {edge[1]} expect messages of different shapes: "
                    f"{other.tolist()} and {mine.tolist()}"
                )


def _wait(works: list[Work]) -> None:
    for work in works:
        work.wait()


def _key(action: Action) -> tuple[int, int]:
    assert action.micro_batch is not None, "a message belongs to a micro-batch"
    return action.stage, action.micro_batch


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The gradient of a stage's input; zeros where no output depends on it, since the neighbour waits for a message."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
