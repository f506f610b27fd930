"""Cross-entropy: what the rule does not ask."""

import pytest
import torch
import torch.nn.functional as F

from megallm.ops.cross_entropy import CrossEntropy, cross_entropy, token_losses

every_implementation = pytest.mark.parametrize("implementation", ["auto", "reference"])


def gradients(losses, logits, grad):
    return torch.autograd.grad(losses, logits, grad)[0]


@every_implementation
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_as_torch_has_it(smoothing, implementation):
    torch.manual_seed(0)
    logits = (torch.randn(4, 3, 40, dtype=torch.float64) * 3).requires_grad_()
    targets = torch.randint(0, 33, (4, 3))
    targets[1, 1] = -100
    loss = CrossEntropy(33, label_smoothing=smoothing)
    losses = cross_entropy(logits * 1.0, targets, loss, implementation)
    words = logits[..., :33].flatten(0, 1)
    expected = F.cross_entropy(words, targets.flatten(), reduction="none", label_smoothing=smoothing).view(4, 3)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-13)
    grad = torch.randn(4, 3, dtype=torch.float64)
    found, wanted = gradients(losses, logits, grad), gradients(expected, logits, grad)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    assert (found[..., 33:] == 0).all()
    assert (found[1, 1] == 0).all()


@every_implementation
def test_z_loss(implementation):
    torch.manual_seed(0)
    logits = torch.randn(5, 21, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 21, (5,))
    losses = cross_entropy(logits * 1.0, targets, CrossEntropy(21, z_loss=0.3), implementation)
    expected = F.cross_entropy(logits, targets, reduction="none") + 0.3 * logits.logsumexp(-1).square()
    torch.testing.assert_close(losses, expected)
    grad = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(gradients(losses, logits, grad), gradients(expected, logits, grad))


@every_implementation
def test_what_is_told_is_plain(implementation):
    torch.manual_seed(0)
    logits = (torch.randn(5, 21, dtype=torch.float64) * 3).requires_grad_()
    targets = torch.tensor([3, 20, -100, 0, 7])
    loss = CrossEntropy(21, label_smoothing=0.2, z_loss=0.3)
    losses = token_losses(logits * 1.0, targets, loss, implementation)
    squares = logits.logsumexp(-1).square().masked_fill(targets == -100, 0.0)
    smoothed = F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(losses.objective, smoothed + 0.3 * squares)
    torch.testing.assert_close(losses.plain, F.cross_entropy(logits, targets, reduction="none").detach())
    torch.testing.assert_close(losses.squares, squares.detach())
    assert [each.requires_grad for each in losses] == [True, False, False]


@every_implementation
def test_nothing_but_ignored_targets(implementation):
    logits = torch.full((3, 8), torch.nan, requires_grad=True)
    losses = cross_entropy(logits * 1.0, torch.full((3,), -100), CrossEntropy(8), implementation)
    assert (losses == 0).all()
    assert (gradients(losses, logits, torch.ones(3)) == 0).all()


@every_implementation
def test_columns_of_minus_infinity_get_no_probability(implementation):
    logits = torch.randn(2, 70)
    logits[:, :66] = -torch.inf
    logits.requires_grad_()
    losses = cross_entropy(logits * 1.0, torch.tensor([66, 69]), CrossEntropy(70), implementation)
    expected = F.cross_entropy(logits[:, 66:], torch.tensor([0, 3]), reduction="none")
    torch.testing.assert_close(losses, expected)
    assert (gradients(losses, logits, torch.ones(2))[:, :66] == 0).all()


@every_implementation
def test_the_gradient_is_written_over_the_logits_once(implementation):
    source = torch.randn(4, 9, requires_grad=True)
    logits = source * 1.0
    losses = cross_entropy(logits, torch.tensor([0, 1, 2, 3]), CrossEntropy(9), implementation)
    (found,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    assert found.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize("ranks", [2, 3])
@every_implementation
def test_over_ranks(ranks, implementation):
    """Parts of the vocabulary one after the other, reduced by hand; the last may be padding altogether."""
    regularised = {"label_smoothing": 0.1, "z_loss": 0.02}
    torch.manual_seed(0)
    width, size = 8, 14
    logits = torch.randn(6, ranks * width, dtype=torch.float64) * 5
    targets = torch.randint(0, size, (6,))
    grad = torch.randn(6, dtype=torch.float64)
    parts = [logits[:, rank * width : (rank + 1) * width].clone().requires_grad_() for rank in range(ranks)]
    largest, sums, total = logits[:, :size].amax(-1), [], []

    def reduce(tensor, reduction):
        """What all ranks would have: the sum once every rank has shown its own."""
        if reduction == "max":
            tensor.copy_(largest)
            return
        sums.append(tensor.clone())
        if total:
            tensor.copy_(total[0])

    def run():
        return [
            cross_entropy(
                part * 1.0,
                targets,
                CrossEntropy(size, first=rank * width, reduce=reduce, **regularised),
                implementation,
            )
            for rank, part in enumerate(parts)
        ]

    run()
    total.append(torch.stack(sums).sum(0))
    whole = logits[:, :size].clone().requires_grad_()
    expected = F.cross_entropy(whole, targets, reduction="none", label_smoothing=0.1)
    expected = expected + 0.02 * whole.logsumexp(-1).square()
    wanted = gradients(expected, whole, grad)
    found = []
    for losses, part in zip(run(), parts, strict=True):
        torch.testing.assert_close(losses, expected)
        found.append(gradients(losses, part, grad))
    torch.testing.assert_close(torch.cat(found, dim=-1)[:, :size], wanted)
