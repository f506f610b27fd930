"""The rule that native operators are held to, and RMSNorm's checks by it, for any device."""

import itertools

import torch
from torch import Tensor

from megallm.ops.rms_norm import rms_norm, rms_norm_reference

EPSILON = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rows 0, 1, prime; widths 1, odd, a vector's multiple and not, longer than what a thread block keeps in registers.
SHAPES = [
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
    (17, 4096),
    (3, 11008),
    (2, 65537),
    (3, 65536),
]


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


def gradients(function, x: Tensor, weight: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, grad_x, grad_weight of function(x, weight, EPSILON)."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight, EPSILON)
    y.backward(grad_output)
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad


def weight_dtypes(dtype: torch.dtype) -> list[torch.dtype]:
    return [dtype] if dtype == torch.float32 else [dtype, torch.float32]


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.25
    weight = torch.rand(shape[-1], generator=generator, dtype=torch.float64) + 0.5
    grad_output = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(device, dtype), weight.to(device), grad_output.to(device, dtype)


def sizes_of_terms(x: Tensor, weight: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """What the gradients are differences and sums of: they may cancel, but their rounding errors do not.

    A term of the weight's gradient counts twice: it is the product of a rounded product.
    """
    reciprocal = (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    normalised, grad = x * reciprocal, grad_output * weight
    projection = normalised * (grad * normalised).mean(-1, keepdim=True)
    products = (grad_output * normalised).reshape(-1, x.shape[-1])
    return {"grad_x": reciprocal * (grad.abs() + projection.abs()), "grad_weight": 2 * products.abs().sum(0)}


def check_accuracy(x: Tensor, weight: Tensor, grad_output: Tensor) -> None:
    native = gradients(rms_norm, x, weight, grad_output)
    eager = gradients(rms_norm_reference, x, weight, grad_output)
    exact = gradients(rms_norm_reference, x.double(), weight.double(), grad_output.double())
    if x.dtype == torch.float64:
        exact = eager
    terms = sizes_of_terms(x.double(), weight.double(), grad_output.double())
    for name, *values in zip(("y", "grad_x", "grad_weight"), native, eager, exact, strict=True):
        what = f"{name} {tuple(x.shape)} {x.dtype} weight {weight.dtype}"
        assert_not_worse(what, *values, terms=terms.get(name))


def check_shapes(device: str) -> None:
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        x, weight, grad_output = random_inputs(shape, dtype, device)
        for weight_dtype in weight_dtypes(dtype):
            check_accuracy(x, weight.to(weight_dtype), grad_output)


def check_views(device: str) -> None:
    """Slices of packed tensors, base pointers off by one element, transposed and broadcast inputs: as their copies.

    On the CPU bit for bit.
    """
    generator = torch.Generator().manual_seed(1)
    for dtype, width in itertools.product(DTYPES, (64, 100, 1032)):
        packed = torch.randn(6, 5, 3 * width + 1, generator=generator).to(device, dtype)
        weight = torch.rand(width + 1, generator=generator).to(device, dtype)[1:]
        grad = torch.randn(6, 5, 1, generator=generator).to(device, dtype).expand(6, 5, width)
        views = {
            "slice": packed[..., width : 2 * width],
            "off by one": packed[..., 1 : width + 1],
            "every second row": packed[::2, :, :width],
            "transposed": packed[..., :width].transpose(0, 1),
            "columns": packed[0, 0, : 2 * width : 2].expand(4, width),
        }
        for name, view in views.items():
            grad_output = {"transposed": grad.transpose(0, 1), "columns": grad[0, :4]}.get(name, grad[: len(view)])
            found = gradients(rms_norm, view, weight, grad_output)
            expected = gradients(rms_norm, view.contiguous(), weight.clone(), grad_output.contiguous())
            for left, right in zip(found, expected, strict=True):
                check_close_sums(left, right, exact=device == "cpu", what=f"{name} {dtype} {width}")


def check_close_sums(left: Tensor, right: Tensor, exact: bool, what: str) -> None:
    """Bitwise on the CPU. On a GPU narrow accesses change which thread adds what, hence the order."""
    if exact:
        assert torch.equal(left, right), what
    else:
        tolerance = 4 * torch.finfo(right.dtype).eps * right.abs().max().clamp(min=1).item()
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance, msg=what)


def check_determinism(device: str) -> None:
    """Two runs give the same bits; so does each row alone, whatever the batch around it."""
    for dtype, width in itertools.product(DTYPES, (33, 256, 4096)):
        x, weight, grad_output = random_inputs((97, width), dtype, device)
        weight = weight.to(dtype)
        first, second = (gradients(rms_norm, x, weight, grad_output) for _ in range(2))
        for left, right in zip(first, second, strict=True):
            assert torch.equal(left, right)
        start = 0
        for stop in (1, 4, 50, 97):
            y, grad_x, _ = gradients(rms_norm, x[start:stop], weight, grad_output[start:stop])
            assert torch.equal(y, first[0][start:stop])
            assert torch.equal(grad_x, first[1][start:stop])
            start = stop


def check_non_finite(device: str) -> None:
    """A NaN or infinity stays in its row of y and grad_x, and reaches its column of the weight's gradient."""
    for dtype, bad in itertools.product(DTYPES, (float("nan"), float("inf"))):
        x, weight, grad_output = random_inputs((5, 70), dtype, device)
        x[2, 69] = bad
        y, grad_x, grad_weight = gradients(rms_norm, x, weight.to(dtype), grad_output)
        assert y[2, 69].isnan()
        assert grad_x[2].isnan().any()
        assert grad_weight[69].isnan()
        for rows in (slice(0, 2), slice(3, 5)):
            assert y[rows].isfinite().all()
            assert grad_x[rows].isfinite().all()


def check_raw_operators(device: str) -> None:
    """No weight, an offset added to it, and a residual's gradient that is added before the rounding."""
    operators = torch.ops.megallm
    for dtype, width in itertools.product(DTYPES, (40, 4097)):
        x, weight, grad_output = random_inputs((19, width), dtype, device)
        weight, residual = weight.to(dtype), grad_output.flip(0)
        y, reciprocal = operators.rms_norm_forward(x, weight, EPSILON, 1.0)
        grad_x, grad_weight = operators.rms_norm_backward(grad_output, x, weight, reciprocal, residual, 1.0)
        shifted = gradients(rms_norm_reference, x.double(), weight.double() + 1, grad_output.double())
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for name, found, exact, target in (
            ("y", y, shifted[0], dtype),
            ("grad_x", grad_x, shifted[1] + residual.double(), dtype),
            ("grad_weight", grad_weight, shifted[2], wide),
        ):
            error, ulp = (found.double() - exact).abs().max(), torch.finfo(target).eps
            assert found.dtype == target, name
            assert error <= 8 * ulp * exact.abs().max(), f"{name} {dtype} {width}: {error:.3e}"
        y, reciprocal = operators.rms_norm_forward(x, None, EPSILON, 1.0)
        ones = torch.ones(width, dtype=dtype, device=device)
        assert torch.equal(y, operators.rms_norm_forward(x, ones, EPSILON, 0.0)[0])
        grad_x, grad_weight = operators.rms_norm_backward(grad_output, x, None, reciprocal, None, 1.0)
        assert grad_weight.shape == (0,)
        assert torch.equal(grad_x, operators.rms_norm_backward(grad_output, x, ones, reciprocal, None, 0.0)[0])
