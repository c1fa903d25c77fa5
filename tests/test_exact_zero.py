"""Products that a 0 wins: their values, their derivatives, and who may differentiate them how."""

import math

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from wmtp.exact_zero import log_sum_exp, product
from wmtp.reference import compute_weighted_mtp_loss

IDS = torch.tensor([[1, 2, 0, 4]])


def inputs():
    logits = torch.randn(1, 4, 2, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(1, 4, 2, dtype=torch.float64)
    weights[0, 1, 0] = 0.0
    return logits, weights.requires_grad_()


def loss(logits, weights):
    return compute_weighted_mtp_loss(logits, IDS, weights, horizon=2).loss


def test_zero_wins_on_the_left_alone():
    a = torch.tensor([0.0, 0.0, 0.0, math.inf, math.nan, 2.0])
    b = torch.tensor([math.inf, math.nan, -math.inf, 0.0, 0.0, 3.0])
    found = product(a, b)
    assert found[:3].tolist() == [0, 0, 0]
    assert found[3:5].isnan().all()
    assert found[5] == 6


def test_the_slope_at_zero_is_the_other_factor():
    a = torch.tensor([0.0, 0.0, 2.0], requires_grad=True)
    b = torch.tensor([math.inf, 3.0, 0.0], requires_grad=True)
    of_a, of_b = grad(product(a, b).sum(), [a, b], create_graph=True)
    assert of_a.tolist() == [math.inf, 3, 0]
    assert of_b.tolist() == [0, 0, 2]
    assert grad(of_b.sum(), a)[0].tolist() == [1, 1, 1]  # d2 / da db


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_derivatives(check):
    a, b = inputs()[1], torch.rand(1, 1, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert check(product, (a, b))
    assert check(lambda rows: log_sum_exp(rows, most := rows.detach().amax(-1)) + most, rows)


def test_forward_mode_and_functional_transformations():
    logits, weights = inputs()
    assert gradcheck(loss, (logits, weights.clamp(min=0.1)), check_forward_ad=True)
    tangents = torch.randn_like(logits), torch.rand_like(weights)
    gradients = torch.func.grad(loss, argnums=(0, 1))(logits, weights)
    wanted = sum((one * other).sum() for one, other in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(loss, (logits, weights), tangents)[1], wanted)
    torch.testing.assert_close(torch.func.jacrev(loss)(logits, weights), gradients[0])


def test_compiled_whole():
    """torch.compile takes no autograd function with a forward mode."""
    arguments = inputs()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        grad(compiled(*arguments), arguments), grad(loss(*arguments), arguments)
    )
