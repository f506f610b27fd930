"""Linear layers whose matrices are cut over the tensor parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megallm.communication import Group, Work
from megallm.layers.context import LayoutContext, WeightGradients
from megallm.layers.regions import gather_first_dim, gradient_of_first_rank, scatter_sum_sequence, sum_over_group
from megallm.parameter import Description, Initial, InitialMethod, Piece, make_parameter, part, whole


class _Linear(torch.autograd.Function):
    """`input @ weight.T`, its weight gradient handed to the context.

    With `group`, the input is shared by (or, with `sequence_parallel`, spread over) the group while each rank holds
    other rows of the weight: the input's gradient is summed over the group while the weight gradient is computed. A
    spread input is gathered anew in the backward pass rather than kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: nn.Parameter,
        weight_gradients: WeightGradients,
        group: Group | None,
        sequence_parallel: bool,
    ) -> torch.Tensor:
        # The parameter itself, not a saved copy: recomputation would hand back a tensor that the sink does not know.
        ctx.weight = weight
        ctx.save_for_backward(input)
        ctx.weight_gradients = weight_gradients
        ctx.group = group if group is not None and group.size > 1 else None
        ctx.sequence_parallel = sequence_parallel and ctx.group is not None
        if ctx.sequence_parallel:
            input = gather_first_dim(input, group)  # type: ignore[arg-type]
        return functional.linear(input, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (input,), weight = ctx.saved_tensors, ctx.weight
        grad_output = grad_output.contiguous()
        gathered, gathering = input, Work()
        if ctx.sequence_parallel and ctx.needs_input_grad[1]:
            gathered = input.new_empty((input.shape[0] * ctx.group.size, *input.shape[1:]))
            gathering = ctx.group.all_gather(gathered, input, asynchronous=True)
        grad_input, reducing = None, Work()
        if ctx.needs_input_grad[0]:
            grad_input = grad_output.matmul(weight)
            if ctx.sequence_parallel:
                full, grad_input = grad_input, torch.empty_like(input)
                reducing = ctx.group.reduce_scatter(grad_input, full, asynchronous=True)
            elif ctx.group is not None:
                reducing = ctx.group.all_reduce(grad_input, asynchronous=True)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            gathering.wait()
            grad_weight = ctx.weight_gradients.compute(weight, grad_output, gathered)
        reducing.wait()
        return grad_input, grad_weight, None, None, None


class _InGraph(torch.autograd.Function):
    """Passes `input`; the parameters take part in the backward pass without a gradient, as if they had got one."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, *parameters: nn.Parameter) -> torch.Tensor:
        ctx.number = len(parameters)
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad, *(None,) * ctx.number


class ColumnParallelLinear(nn.Module):
    """Each tensor rank computes some of the output features: [.., sequence (/ tp), batch, in] -> [sequence, batch, out
    / tp].

    The output is a concatenation of logical outputs `names` (query, key, value; gate, up), each cut evenly by itself.
    """

    def __init__(
        self,
        names: dict[str, int],
        input_size: int,
        context: LayoutContext,
        *,
        bias: bool,
        initial: InitialMethod,
    ) -> None:
        super().__init__()
        self.context = context
        parts, index = context.tp.size, context.tp.rank
        self.local_sizes = [size // parts for size in names.values()]
        weight_pieces = [part(f"{name}.weight", (size, input_size), 0, parts, index) for name, size in names.items()]
        self.weight = _parameter(weight_pieces, context, initial((sum(names.values()), input_size)))
        self.bias = None
        if bias:
            bias_pieces = [part(f"{name}.bias", (size,), 0, parts, index) for name, size in names.items()]
            self.bias = make_parameter(Description(tuple(bias_pieces), decays=False), context.dtype, context.device)

    def forward(self, input: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        context = self.context
        output = _Linear.apply(input, self.weight, context.weight_gradients, context.tp, context.sequence_parallel)
        return output if self.bias is None or not with_bias else output + self.bias

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """The output without the bias, for what follows to add."""
        # Through the call of the module: what was hung before its forward pass waits for the weights.
        return self(input, with_bias=False)


class RowParallelLinear(nn.Module):
    """Each tensor rank sees some of the input features: [sequence, batch, in / tp] -> [sequence (/ tp), batch, out].

    The partial outputs are summed over the group, and the sequence is cut again where it is parallel. The bias is
    added after that.
    """

    def __init__(
        self,
        name: str,
        input_size: int,
        output_size: int,
        context: LayoutContext,
        *,
        bias: bool,
        initial: InitialMethod,
    ) -> None:
        super().__init__()
        self.context = context
        piece = part(f"{name}.weight", (output_size, input_size), 1, context.tp.size, context.tp.rank)
        self.weight = _parameter([piece], context, initial((output_size, input_size)))
        self.bias = None
        if bias:
            description = Description(
                (whole(f"{name}.bias", (output_size,)),),
                replicated_over=("tp",),
                gradient_partial_over=context.partial_axes,
                decays=False,
            )
            self.bias = make_parameter(description, context.dtype, context.device)

    def forward(self, input: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        context = self.context
        output = _Linear.apply(input, self.weight, context.weight_gradients, None, False)
        if context.sequence_parallel:
            output = scatter_sum_sequence(output, context.tp)
        else:
            output = sum_over_group(output, context.tp)
        return output if self.bias is None or not with_bias else output + self.bias

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """The output without the bias, for what follows to add."""
        # Through the call of the module: what was hung before its forward pass waits for the weights.
        return self(input, with_bias=False)


class ReplicatedLinear(nn.Module):
    """Whole on every tensor rank, with a bias: [..., in] -> [..., out].

    `sees_parts` says that ranks see different rows of the input. Where all see the same, a product may still round
    differently from rank to rank (seen on a CPU), and copies of weights that each rank updates by itself would drift
    apart: only the first rank's gradients count.
    """

    def __init__(
        self,
        name: str,
        input_size: int,
        output_size: int,
        context: LayoutContext,
        initial: InitialMethod,
        *,
        sees_parts: bool,
    ) -> None:
        super().__init__()
        self.context = context
        self.sees_parts = sees_parts

        def parameter(suffix: str, shape: tuple[int, ...], initial: Initial, decays: bool) -> nn.Parameter:
            description = Description(
                (whole(f"{name}.{suffix}", shape),),
                initial,
                replicated_over=("tp",),
                gradient_partial_over=("tp",),
                decays=decays,
            )
            return make_parameter(description, context.dtype, context.device)

        shape = (output_size, input_size)
        self.weight = parameter("weight", shape, initial(shape), decays=True)
        self.bias = parameter("bias", (output_size,), Initial("constant", 0.0), decays=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.weight
        bias: torch.Tensor = self.bias
        if not self.sees_parts:
            input = gradient_of_first_rank(input, self.context.tp)
            if self.context.tp.rank > 0:
                # Their buckets are complete where they are on the first rank: all ranks must start reductions in one
                # order.
                input = _InGraph.apply(input, weight, bias)
                weight, bias = weight.detach(), bias.detach()
        return _Linear.apply(input, weight, self.context.weight_gradients, None, False) + bias


def column_parallel_linear(input: torch.Tensor, weight: nn.Parameter, context: LayoutContext) -> torch.Tensor:
    """The product of a column parallel layer with a weight that belongs to another layer, such as a tied output
    matrix.
    """
    return _Linear.apply(input, weight, context.weight_gradients, context.tp, context.sequence_parallel)


def _parameter(pieces: list[Piece], context: LayoutContext, initial: Initial) -> nn.Parameter:
    return make_parameter(Description(tuple(pieces), initial), context.dtype, context.device)
