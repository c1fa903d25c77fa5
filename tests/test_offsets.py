"""A constant added to a row of logits changes nothing: not a digit of the loss or its gradients."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd import grad

from support.agreement import assert_identical, loss_and_gradients, make_case, relative_error
from support.backends import FUSED_ON_CPU, ON_CPU
from support.covering import in_pairs
from wmtp import fused_linear_weighted_mtp_loss, fused_weighted_mtp_loss, mtp_cross_entropy
from wmtp.reference import compute_weighted_mtp_loss

# The offset, and a unit of logits that it leaves exact.
OFFSETS = {
    torch.float64: (2.0**40, 2.0**-9),
    torch.float32: (2.0**15, 2.0**-7),
    torch.float16: (1024.0, 1.0),
    torch.bfloat16: (128.0, 1.0),
}


def offset_case(dtype, weighting="given"):
    """Logits >= 0 that are multiples of the unit, and the same with the offset: exact, both."""
    offset, unit = OFFSETS[dtype]
    case = make_case((2, 6, 3, 40), dtype, weighting)
    case.logits = ((3 * torch.randn(2, 6, 3, 40).abs()) / unit).round().mul(unit).to(dtype)
    moved = replace(case, logits=(case.logits.double() + offset).to(dtype))
    assert torch.equal(moved.logits.double() - offset, case.logits.double())
    return case, moved


@pytest.mark.parametrize("backend", ON_CPU)
def test_two_equal_logits_of_1e8_cost_log_2(backend):
    logits, target_ids = torch.full((1, 3, 1, 2), 1e8), torch.tensor([[0, 1, 0]])
    hidden, weight = torch.full((1, 3, 1, 1), 1e4), torch.full((2, 1), 1e4)
    for result in (
        fused_weighted_mtp_loss(logits, target_ids, backend=backend),
        fused_weighted_mtp_loss([logits[:, :, 0]], target_ids, backend=backend),
        fused_linear_weighted_mtp_loss(hidden, weight, target_ids, backend=backend),
    ):
        assert result.loss.item() == pytest.approx(math.log(2), rel=1e-6)
        assert result.ce_per_head[0, :2, 0].tolist() == pytest.approx([math.log(2)] * 2, rel=1e-6)


@in_pairs(
    backend=ON_CPU,
    dtype=OFFSETS,
    weighting=["given", "signed"],
    where=lambda backend, dtype, _: (backend, dtype) != ("triton", torch.float64),
)
def test_an_offset_changes_no_bit(backend, dtype, weighting):
    """The gradient that forward writes, and the one of the cross entropies."""
    function = partial(fused_weighted_mtp_loss, backend=backend)
    found, wanted = (loss_and_gradients(function, case) for case in offset_case(dtype, weighting))
    assert_identical(found, wanted)


@pytest.mark.parametrize("backend", FUSED_ON_CPU)
def test_second_backward_at_an_offset(backend):
    _, case = offset_case(torch.float32, "uniform")
    exact = case.cast(torch.float64).logits.requires_grad_()
    truth = compute_weighted_mtp_loss(exact, case.target_ids, horizon=3)
    logits = case.logits.requires_grad_()
    found = fused_weighted_mtp_loss(logits, case.target_ids, backend=backend)
    ce = mtp_cross_entropy(logits, case.target_ids, backend=backend)
    (of_loss,), (of_ce,) = (
        grad(truth.loss, exact, retain_graph=True),
        grad(truth.ce_per_head.sum(), exact),
    )
    for _ in range(2):
        (gradient,) = grad(found.loss, logits, retain_graph=True)
        assert relative_error(gradient, of_loss) < 1e-6
    assert relative_error(grad(ce.sum(), logits)[0], of_ce) < 1e-6


def test_the_truth_differentiates_twice_at_an_offset():
    case, moved = offset_case(torch.float64, "uniform")
    hessians = []
    for each in (case, moved):
        logits = each.logits.requires_grad_()
        loss = compute_weighted_mtp_loss(logits, each.target_ids, horizon=3).loss
        (gradient,) = grad(loss, logits, create_graph=True)
        hessians.append(grad(gradient.square().sum(), logits)[0])
    assert torch.equal(*hessians)
    small = torch.randn(1, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    function = partial(compute_weighted_mtp_loss, target_ids=torch.tensor([[0, 3, 1]]), horizon=1)
    assert torch.autograd.gradgradcheck(lambda logits: function(logits).loss, small)


@pytest.mark.parametrize("backend", ON_CPU)
def test_infinite_logits_beside_the_largest_finite_ones(backend):
    """-inf is a probability of 0, +inf an infinite cross entropy, NaN stays in its row."""
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor(
        [
            [largest, largest, -math.inf],
            [largest, 3.2e38, -math.inf],
            [-largest, -largest, -math.inf],
            [0.0, largest, math.inf],
            [0.0, math.nan, 1.0],
            [-math.inf, 1.0, 1.0],
            [0.0, 0.0, 0.0],
        ]
    )[None, :, None].requires_grad_()
    target_ids = torch.zeros(1, 7, dtype=torch.int64)
    ce = mtp_cross_entropy(logits, target_ids, backend=backend)
    found = ce[0, :6, 0].tolist()
    assert found == pytest.approx(
        [math.log(2), 0.0, math.log(2), math.inf, math.nan, math.inf], nan_ok=True, rel=1e-6
    )
    result = fused_weighted_mtp_loss(logits, target_ids, reduction="sum", backend=backend)
    for gradient in (grad(ce.sum(), logits)[0], grad(result.loss, logits)[0]):
        half = pytest.approx([-0.5, 0.5, 0.0], abs=1e-6)
        assert gradient[0, 0, 0].tolist() == gradient[0, 2, 0].tolist() == half
        assert gradient[0, 1, 0].tolist() == [0.0, 0.0, 0.0]
        assert gradient[0, 3, 0].tolist() == pytest.approx([-1.0, 0.0, math.nan], nan_ok=True)
        assert gradient[0, 4].isnan().all()
        assert gradient[0, 5, 0].tolist() == pytest.approx([-1.0, 0.5, 0.5])
