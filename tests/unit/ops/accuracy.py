"""The rule that native operators are held to, and the checks by it, for any operator and device.

An operator enters with a `Case` in a module of `tests/unit/ops/cases`; `test_ops_rule.py` and `tests/gpu/test_ops.py`
put every case through every check, `tests/emulated/operators.py` through those that ask about results.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megallm.ops.accumulate import accumulate_weight_gradient
from megallm.ops.activation import gelu
from megallm.ops.dropout import Dropout
from megallm.ops.embedding import accumulate_rows
from megallm.ops.softmax import scaled_masked_softmax
from megallm.random import stream_key

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Rows 0, 1, prime, many; widths 1, odd, a vector's multiple and not, longer than what a block keeps in registers, in
# single elements and (the last) in whole vectors.
SHAPES = (
    (0, 8),
    (1, 1),
    (1, 256),
    (3, 1),
    (7, 3),
    (37, 17),
    (131, 100),
    (5, 64),
    (2, 3, 255),
    (67, 256),
    (33, 1000),
    (40, 1032),
    (1009, 24),
    (5, 4096),
    (3, 11008),
    (2, 65537),
    (2, 16392),
)
QUICK_SHAPES = ((0, 8), (1, 1), (7, 3), (2, 3, 255), (33, 1000))

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One operator in one use of it.

    Attributes:
        name: says which.
        operator: its name in `megallm.config.operators`.
        make: (shape, generator) -> float64, integer and boolean inputs by name. Shapes are (..., rows, width), and an
            input that is not `shared` has its rows along the first dim, as all outputs have.
        call: (inputs, implementation) -> the output or outputs. Must not change its inputs.
        shared: inputs that belong to all rows, such as weights.
        fixed: floating inputs that are not differentiated.
        wide: inputs that may be float32 beside 16-bit ones; each dtype is tried both ways.
        shapes, quick_shapes: what the rule is tried on.
        terms: float64 inputs and gradients of outputs -> by name ("grad_x") what a result is a sum or difference of.
            Where that may cancel, the unit in the last place is that of the terms.
        dtypes: of the floating inputs.
        differentiable_once: its backward pass writes over what it needs, so that gradcheck, which calls it again and
            again, cannot check it; a test of its own does.
    """

    name: str
    operator: str
    make: Callable[[tuple[int, ...], torch.Generator], Inputs]
    call: Callable[[Inputs, str], Tensor | tuple[Tensor, ...]]
    shared: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()
    shapes: Sequence[tuple[int, ...]] = SHAPES
    quick_shapes: Sequence[tuple[int, ...]] = QUICK_SHAPES
    terms: Callable[[Inputs, Sequence[Tensor]], Mapping[str, Tensor]] | None = None
    dtypes: Sequence[torch.dtype] = DTYPES
    differentiable_once: bool = False

    def __str__(self) -> str:
        return self.name

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, *, wide: bool = False) -> Inputs:
        """The same numbers in every dtype, rounded to it."""
        made = self.make(shape, torch.Generator().manual_seed(0))
        return {name: self._cast(name, tensor, dtype, device, wide) for name, tensor in made.items()}

    def _cast(self, name: str, tensor: Tensor, dtype: torch.dtype, device: str, wide: bool) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        return tensor.to(device, torch.float32 if wide and name in self.wide else dtype)

    def differentiable(self, inputs: Inputs) -> list[str]:
        return [name for name, tensor in inputs.items() if tensor.is_floating_point() and name not in self.fixed]

    def outputs(self, inputs: Inputs, implementation: str) -> tuple[Tensor, ...]:
        found = self.call(inputs, implementation)
        return (found,) if isinstance(found, Tensor) else found

    def results(self, inputs: Inputs, grads: Sequence[Tensor], implementation: str) -> dict[str, Tensor]:
        """Outputs "y0", "y1" and the gradients "grad_NAME" of every floating input: none may be missing."""
        names = self.differentiable(inputs)
        leaves = {
            name: tensor.detach().requires_grad_() if name in names else tensor for name, tensor in inputs.items()
        }
        outputs = self.outputs(leaves, implementation)
        result = {f"y{i}": output.detach() for i, output in enumerate(outputs)}
        if names:
            torch.autograd.backward(outputs, [grad.to(output) for grad, output in zip(grads, outputs, strict=True)])
            for name in names:
                gradient = leaves[name].grad
                assert gradient is not None, f"{self.name}: {name} has no gradient"
                result[f"grad_{name}"] = gradient
        return result

    def output_gradients(self, inputs: Inputs, seed: int = 7) -> list[Tensor]:
        """Random gradients of the outputs, exact in the dtype of the inputs."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            outputs = self.outputs(inputs, "reference")
        return [
            torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device, output.dtype)
            for output in outputs
        ]


def widened(inputs: Inputs) -> Inputs:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def assert_not_worse(name: str, result: Tensor, eager: Tensor, exact: Tensor, terms: Tensor | None = None) -> None:
    """error(result) <= 2 error(eager) + 1 unit in the last place of the exact result, which is float64.

    In the largest value and in the 2-norm. Where the result is a difference that may cancel, `terms` is what it is
    taken of, and the unit is theirs.
    """
    assert result.dtype == eager.dtype, name
    assert result.shape == eager.shape == exact.shape, name
    if exact.numel() == 0:
        return
    # Nothing wider checks float64: eager is as good as exact, and both carry the rounding of their sums.
    ulp = torch.finfo(result.dtype).eps * (32 if result.dtype == torch.float64 else 1)
    for norm, order in (("largest", float("inf")), ("2-norm", 2)):
        size = torch.linalg.vector_norm(exact if terms is None else terms, order)
        error = torch.linalg.vector_norm(result.double() - exact, order)
        allowed = 2 * torch.linalg.vector_norm(eager.double() - exact, order) + ulp * size
        assert error <= allowed, f"{name}: {norm} error {error:.3e}, allowed {allowed:.3e}"


def check_accuracy(case: Case, shape: tuple[int, ...], dtype: torch.dtype, device: str, *, wide: bool = False) -> None:
    inputs = case.inputs(shape, dtype, device, wide=wide)
    grads = case.output_gradients(inputs)
    native, eager = (case.results(inputs, grads, choice) for choice in ("native", "reference"))
    exact_grads = [grad.double() for grad in grads]
    exact = case.results(widened(inputs), exact_grads, "reference")
    terms = case.terms(widened(inputs), exact_grads) if case.terms else {}
    assert native.keys() == eager.keys()
    for name, result in native.items():
        what = f"{case.name}: {name} {shape} {dtype}{' wide' if wide else ''}"
        if not result.is_floating_point():
            assert torch.equal(result, eager[name]), what
            continue
        truth = eager[name] if dtype == torch.float64 else exact[name]
        assert_not_worse(what, result, eager[name], truth.double(), terms.get(name))


def variants(case: Case) -> Iterator[tuple[torch.dtype, bool]]:
    for dtype in case.dtypes:
        yield dtype, False
        if case.wide and dtype != torch.float32:
            yield dtype, True


def check_shapes(case: Case, device: str, shapes: Sequence[tuple[int, ...]]) -> None:
    """The rule in every dtype; long rows in two of them, which is enough to find a loop's end."""
    for shape, (dtype, wide) in itertools.product(shapes, variants(case)):
        if shape[-1] < 4096 or (not wide and dtype in (torch.float32, torch.bfloat16)):
            check_accuracy(case, shape, dtype, device, wide=wide)


def check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, exact: bool, what: str) -> None:
    """Bitwise where `exact`, otherwise within rounding."""
    for name, right in expected.items():
        left = found[name]
        if exact or not right.is_floating_point():
            assert torch.equal(left, right), f"{what}: {name}"
        elif right.numel():
            tolerance = 4 * torch.finfo(right.dtype).eps * right.abs().max().clamp(min=1).item()
            torch.testing.assert_close(left, right, rtol=0, atol=tolerance, msg=f"{what}: {name}")


def check_views(case: Case, device: str, *, exact: bool = True) -> None:
    """Slices of packed tensors, base pointers off by one element, transposed and repeated inputs: as their copies."""
    for dtype, width in itertools.product(case.dtypes, (64, 100, 1032)):
        inputs = case.inputs((6, 5, width), dtype, device)
        grads = case.output_gradients(inputs)
        expected = case.results(inputs, grads, "native")
        for name, change in VIEWS.items():
            changed = {key: change(tensor) for key, tensor in inputs.items()}
            changed_grads = [change(grad) for grad in grads]
            found = case.results(changed, changed_grads, "native")
            check_same(found, expected, exact=exact, what=f"{case.name}: {name} {dtype} {width}")


# What works on flat tensors makes one that is not so, and a matrix of scores comes whole from the product before it.
COPIES = ("accumulate", "adamw", "sum_of_squares", "softmax causal")
TABLES = ("cosines", "sines")


def check_no_copies(case: Case) -> None:
    """Slices of packed tensors, of inputs and of gradients, are read where they lie."""

    def sliced(tensor: Tensor) -> Tensor:
        long = tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[-1] > 1
        return _in_a_packed_tensor(tensor, 32, 32) if long else tensor

    inputs = case.inputs((6, 5, 64), case.dtypes[0], "cpu")
    grads = case.output_gradients(inputs)
    slices = {name: tensor if name in (*TABLES, *case.shared) else sliced(tensor) for name, tensor in inputs.items()}
    numbers = []
    for tensors, gradients in ((inputs, grads), (slices, [sliced(grad) for grad in grads])):
        with torch.profiler.profile() as profile:
            case.results(tensors, gradients, "native")
        numbers.append([event.name for event in profile.events()].count("aten::copy_"))
    assert numbers[0] == numbers[1], f"{case.name}: {numbers[1] - numbers[0]} copies of slices"


def check_views_of_kernels(case: Case, device: str) -> None:
    """Within rounding: narrow accesses may change which thread of a kernel adds what, and with it the order."""
    check_views(case, device, exact=False)


def check_each_unaligned(case: Case, device: str) -> None:
    """One input or gradient alone begins one element after a multiple of 16 bytes, and is contiguous as the others."""

    def unaligned(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.numel() + 1)[1:].copy_(tensor.flatten()).view(tensor.shape)

    for dtype in case.dtypes:
        inputs = case.inputs((6, 5, 64), dtype, device)
        grads = case.output_gradients(inputs)
        expected = case.results(inputs, grads, "native")
        for name, tensor in inputs.items():
            found = case.results({**inputs, name: unaligned(tensor)}, grads, "native")
            check_same(found, expected, exact=False, what=f"{case.name}: {name} alone {dtype}")
        for number, grad in enumerate(grads):
            changed = [*grads[:number], unaligned(grad), *grads[number + 1 :]]
            found = case.results(inputs, changed, "native")
            check_same(found, expected, exact=False, what=f"{case.name}: gradient {number} alone {dtype}")


def _in_a_packed_tensor(tensor: Tensor, before: int, after: int) -> Tensor:
    """The same values as a slice of the last dim of something wider."""
    packed = tensor.new_zeros((*tensor.shape[:-1], before + tensor.shape[-1] + after))
    view = packed[..., before : before + tensor.shape[-1]]
    view.copy_(tensor)
    return view


def _transposed(tensor: Tensor) -> Tensor:
    """The same values, the last dim not contiguous."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _every_second(tensor: Tensor) -> Tensor:
    """The same values, every second row of something longer."""
    return tensor.repeat_interleave(2, dim=0)[::2]


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda tensor: _in_a_packed_tensor(tensor, 32, 32) if tensor.dim() else tensor,
    "off by one": lambda tensor: _in_a_packed_tensor(tensor, 1, 0) if tensor.dim() else tensor,
    "every second row": lambda tensor: _every_second(tensor) if tensor.dim() else tensor,
    "transposed": lambda tensor: _transposed(tensor) if tensor.dim() > 1 else tensor,
}


def check_determinism(case: Case, device: str) -> None:
    """Two runs give the same bits; so do a row's results, whatever the batch around it."""
    for dtype, width in itertools.product(case.dtypes, (33, 256, 4096)):
        inputs = case.inputs((97, width), dtype, device)
        grads = case.output_gradients(inputs)
        first, second = (case.results(inputs, grads, "native") for _ in range(2))
        check_same(second, first, exact=True, what=f"{case.name}: a second run, {dtype} {width}")
        start = 0
        for stop in (1, 4, 50, 97):
            part = {key: tensor if key in case.shared else tensor[start:stop] for key, tensor in inputs.items()}
            found = case.results(part, [grad[start:stop] for grad in grads], "native")
            sums = {f"grad_{name}" for name in case.shared}
            expected = {name: value[start:stop] for name, value in first.items() if name not in sums}
            check_same(found, expected, exact=True, what=f"{case.name}: rows {start} to {stop}, {dtype} {width}")
            start = stop


def check_large(case: Case) -> None:
    """Results that the CPU writes past its caches have the bits of a few of their rows alone, which it does not."""
    for dtype in case.dtypes:
        inputs = case.inputs((1030, 2080), dtype, "cpu")  # the last piece of a row is not whole
        grads = case.output_gradients(inputs)
        whole = case.results(inputs, grads, "native")
        assert whole["y0"].nbytes >= 4 << 20
        rows = slice(1000, 1030)
        part = {key: tensor if key in case.shared else tensor[rows] for key, tensor in inputs.items()}
        found = case.results(part, [grad[rows] for grad in grads], "native")
        sums = {f"grad_{name}" for name in case.shared}
        expected = {name: value[rows] for name, value in whole.items() if name not in sums}
        check_same(found, expected, exact=True, what=f"{case.name}: rows of a large tensor, {dtype}")


def check_a_much_used_row(device: str) -> None:
    """Many blocks share its sum: an entry of few tokens before it, runs that end and begin at any place."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-1, 4, (5003,), generator=generator).clamp(max=2).to(device)
    gradient = torch.randn(5003, 40, generator=generator).to(device)
    tables = [torch.ones(5, 40, device=device) for _ in range(3)]
    exact = torch.ones(5, 40, dtype=torch.float64, device=device)
    for table, implementation in zip(tables, ("native", "native", "reference"), strict=True):
        accumulate_rows(table, gradient, rows, implementation)
    accumulate_rows(exact, gradient.double(), rows, "reference")
    assert torch.equal(tables[0], tables[1])
    assert_not_worse("table", tables[0], tables[2], exact)


def check_gelu_of_every_number(device: str) -> None:
    """In 16 bits each value is good to a unit in its last place, however near to 0; each slope to one of its terms'."""
    for dtype in (torch.bfloat16, torch.float16):
        numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
        x = numbers[numbers.isfinite()].view(-1, 64).to(device).requires_grad_()
        y = gelu(x, implementation="native")
        (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
        wide = x.detach().double()
        probability = 0.5 * torch.special.erfc(-wide / math.sqrt(2))
        density = (-0.5 * wide.square()).exp() / math.sqrt(2 * math.pi)
        exact, terms = wide * probability, probability + (wide * density).abs()
        # An exponential below float32's smallest normal number may be 0, and x is 13 there.
        finfo = torch.finfo(dtype)
        least = max(finfo.smallest_normal * finfo.eps, 8 * torch.finfo(torch.float32).smallest_normal)
        assert ((y.double() - exact).abs() <= finfo.eps * exact.abs() + least).all(), dtype
        assert ((slope.double() - probability - wide * density).abs() <= finfo.eps * terms + least).all(), dtype


def check_unseen_keys(device: str) -> None:
    """What causal queries do not see has no gradient: not in a row that is NaN, and not where a NaN comes in there."""
    generator = torch.Generator().manual_seed(0)
    # In single elements, in vectors that are seen in part, and in a loop over what registers do not hold.
    for (queries, keys), dtype in itertools.product(((3, 5), (16, 96), (12, 16392)), DTYPES):
        scores = torch.randn(queries, keys, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        given = torch.randn(queries, keys, generator=generator, dtype=torch.float64).to(device, dtype)
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        rows = torch.arange(queries, device=device)
        dropout = Dropout(0.25, stream_key(3, "x").to(device), torch.tensor(5, device=device), rows)
        for dropped in (None, dropout):
            what = f"softmax causal {queries} x {keys} {dtype}{' with dropout' if dropped else ''}"
            weights = scaled_masked_softmax(scores, None, 0.3, True, dropout=dropped, implementation="native")
            expected, found, broken = (
                torch.autograd.grad(weights, scores, grad, retain_graph=True)[0]
                for grad in (given, given.masked_fill(~seen, torch.nan), given.masked_fill(seen, torch.nan))
            )
            assert torch.equal(found, expected), f"{what}: NaN where nothing is seen"
            assert (broken[~seen] == 0).all(), f"{what}: NaN in all that is seen"
            assert broken[seen].isnan().all(), f"{what}: NaN in all that is seen is lost"


def check_weight_gradients(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int], implementation: str = "auto"
) -> None:
    """Factors that are slices, [tokens, outputs] and [tokens, inputs]: their products are summed as wide as the
    gradient, and on a GPU not rounded before.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, outputs, inputs = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gradient = torch.ones(outputs, inputs, dtype=wide, device=device)
    exact = torch.ones(outputs, inputs, dtype=torch.float64, device=device)
    largest = torch.zeros_like(exact)
    for _ in range(8):
        packed = torch.randn(tokens, outputs + inputs, generator=generator, dtype=torch.float64).to(device, dtype)
        grad_output, input = packed.split((outputs, inputs), dim=-1)
        accumulate_weight_gradient(gradient, grad_output, input, implementation)
        exact += grad_output.double().t() @ input.double()
        largest += grad_output.double().abs().t() @ input.double().abs()
    # Half a unit of each product, and of the sums some.
    rounding = 0.5 * torch.finfo(dtype).eps if dtype.itemsize == 2 and device == "cpu" else 0.0
    allowed = rounding * largest + 4 * torch.finfo(wide).eps * (1 + largest)
    assert ((gradient - exact).abs() <= allowed).all()


def check_threads(case: Case) -> None:
    """The number of threads changes no bit."""
    inputs = case.inputs((700, 256), torch.float32, "cpu")
    grads = case.output_gradients(inputs)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(case.results(inputs, grads, "native"))
    finally:
        torch.set_num_threads(threads)
    check_same(*results, exact=True, what=f"{case.name}: two threads")


def check_non_finite(case: Case, device: str) -> None:
    """A NaN or infinity in a row reaches what the reference lets it reach, and no other row."""
    for dtype, bad in itertools.product(case.dtypes, (float("nan"), float("inf"), float("-inf"))):
        inputs = case.inputs((5, 70), dtype, device)
        for name in [name for name, each in inputs.items() if each.is_floating_point() and name not in case.shared]:
            broken = {key: tensor.clone() for key, tensor in inputs.items()}
            broken[name][2].flatten()[-1] = bad
            broken[name][2, ..., -1] = bad
            grads = case.output_gradients(inputs)
            found, eager = (case.results(broken, grads, choice) for choice in ("native", "reference"))
            for key, value in found.items():
                what = f"{case.name}: {bad} in {name}, {key} {dtype}"
                if key.removeprefix("grad_") in case.shared:
                    assert torch.equal(value.isfinite(), eager[key].isfinite()), what
                    continue
                assert torch.equal(value.isfinite().all(-1), eager[key].isfinite().all(-1)), what
                for others in (slice(0, 2), slice(3, 5)):
                    assert value[others].isfinite().all(), what


def check_gradients(case: Case, device: str, implementation: str) -> None:
    """gradcheck in float64; outputs that are integers or boolean are left out."""
    inputs = case.inputs((3, 2, 5), torch.float64, device)
    names = case.differentiable(inputs)
    if not names or case.differentiable_once:
        return

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        outputs = case.outputs({**inputs, **dict(zip(names, values, strict=True))}, implementation)
        return tuple(output for output in outputs if output.is_floating_point())

    leaves = tuple(inputs[name].detach().clone().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(function, leaves), case.name


def check_single_gradients(case: Case) -> None:
    """Each input alone may require a gradient, and has the same one then."""
    inputs = case.inputs((4, 6), torch.float32, "cpu")
    grads = case.output_gradients(inputs)
    expected = case.results(inputs, grads, "native")
    for name in case.differentiable(inputs):
        leaf = inputs[name].detach().requires_grad_()
        outputs = case.outputs({**inputs, name: leaf}, "native")
        torch.autograd.backward(outputs, grads)
        assert leaf.grad is not None, f"{case.name}: {name}"
        assert torch.equal(leaf.grad, expected[f"grad_{name}"]), f"{case.name}: {name}"


def check_compiles(case: Case, device: str) -> None:
    """In one graph, forward and backward, for any size."""
    inputs = case.inputs((6, 48), torch.float32, device)
    grads = case.output_gradients(inputs)
    # The reference is of torch's own operators: that it is one graph is all there is to see.
    for implementation, backend in (("native", "aot_eager"), ("reference", "eager")):
        torch._dynamo.reset()
        compiled = torch.compile(case.call, fullgraph=True, backend=backend, dynamic=True)
        traced = replace(case, call=compiled)
        expected = case.results(inputs, grads, implementation)
        for name, value in traced.results(inputs, grads, implementation).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=f"{case.name}: {name}")


class _RawCalls(TorchDispatchMode):
    """Notes every call of a compiled operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "megallm":
            copies = [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args]
            self.calls.append((func, tuple(copies), dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def check_registration(case: Case, parts: Sequence[str]) -> None:
    """opcheck on every compiled operator that a forward and a backward pass call; they call all of `parts`.

    In the first dtype and the last: float32 and float64 as a rule, whose accumulation types differ.
    """
    called = set()
    for dtype in dict.fromkeys((case.dtypes[0], case.dtypes[-1])):
        inputs = case.inputs((3, 4, 10), dtype, "cpu")
        grads = case.output_gradients(inputs)
        with _RawCalls() as raw:
            case.results(inputs, grads, "native")
        for function, args, kwargs in raw.calls:
            called.add(function._schema.name.removeprefix("megallm::"))
            torch.library.opcheck(function, args, kwargs)
    assert called, f"{case.name} runs nothing native"
    assert called <= set(parts), f"{case.name}: {called - set(parts)} is not listed in OPERATORS"
