"""Rotary embedding: what the rule does not ask."""

import pytest
import torch

from megallm.ops.rotary import apply_rotary, apply_rotary_reference, split_and_rotate

every_implementation = pytest.mark.parametrize("implementation", ["auto", "reference"])


def angles(sequence, dim):
    angle = torch.randn(sequence, 1, 1, dim, dtype=torch.float64)
    return angle.cos(), angle.sin()


@every_implementation
def test_wider_angles_are_rounded_once(implementation):
    torch.manual_seed(0)
    cosines, sines = (table.float() for table in angles(5, 16))
    x = torch.randn(5, 2, 3, 16).bfloat16()
    (exact,) = apply_rotary_reference([x.double()], cosines.double(), sines.double(), False)
    (rotated,) = apply_rotary([x], cosines, sines, False, implementation)
    assert rotated.dtype == torch.bfloat16
    assert ((rotated.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


@every_implementation
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gradient_undoes_the_rotation(interleaved, implementation):
    torch.manual_seed(0)
    angle = torch.randn(4, 1, 1, 4, dtype=torch.float64).repeat(1, 1, 1, 2)
    x = torch.randn(4, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    (y,) = apply_rotary([x], angle.cos(), angle.sin(), interleaved, implementation)
    (back,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(back, x.detach(), rtol=0, atol=1e-14)


@every_implementation
def test_no_turn_and_a_quarter_turn(implementation):
    x = torch.randn(4, 2, 3, 8, dtype=torch.float64)
    zero, one = torch.zeros(4, 1, 1, 8).double(), torch.ones(4, 1, 1, 8).double()
    assert torch.equal(apply_rotary([x], one, zero, False, implementation)[0], x)
    (turned,) = apply_rotary([x], zero, one, False, implementation)
    assert torch.equal(turned, torch.cat((-x[..., 4:], x[..., :4]), dim=-1))
    (turned,) = apply_rotary([x], zero, one, True, implementation)
    assert torch.equal(turned[..., 0::2], -x[..., 1::2])
    assert torch.equal(turned[..., 1::2], x[..., 0::2])


@pytest.mark.parametrize("dim", [5, 10])
def test_refuses_odd_and_too_wide(dim):
    table = torch.ones(2, 1, 1, dim)
    with pytest.raises(ValueError, match="even last dimension of at most the head's 8"):
        apply_rotary([torch.ones(2, 1, 1, 8)], table, table, False)


def test_nothing_is_copied_on_the_way():
    """Strided parts of a packed tensor are read, and their gradients written, where they lie."""
    table = torch.ones(3, 1, 1, 8)
    packed = torch.randn(3, 2, 4 * 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        parts = split_and_rotate(packed, (2, 1, 1), table, table, False, "native")
        torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])
    names = [event.name for event in profile.events()]
    assert "aten::cat" not in names
    assert names.count("aten::copy_") == 1, "of the values' gradient alone"
    assert packed.grad is not None
