"""The truth, pinned by numbers worked out by hand, by `arange` targets and by fp64 gradcheck."""

import math

import pytest
import torch

from wmtp import excess_head_weights, td_head_weights
from wmtp.labels import shift_to_heads
from wmtp.reference import compute_weighted_mtp_loss, cross_entropy_per_head, next_token_ce

LOG2, LOG3, LOG4 = math.log(2), math.log(3), math.log(4)


def hand_made_logits():
    """[1, 3, 2, 2], targets 0 1 0: odds of 1 to 3 and 3 to 1, so that CE is log 4 or log 4/3."""
    logits = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    odds = torch.tensor([LOG3, 0.0], dtype=torch.float64)
    logits[0, 0, 0] = odds  # target 1: p = 1/4
    logits[0, 0, 1] = odds  # target 0: p = 3/4
    # logits[0, 1, 0] = 0, 0: target 0: p = 1/2
    return logits, torch.tensor([[0, 1, 0]])


def test_cross_entropy_by_hand():
    ce = cross_entropy_per_head(*hand_made_logits())
    expected = [[LOG4, LOG4 - LOG3], [LOG2, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(ce[0], torch.tensor(expected, dtype=torch.float64))


def test_arange_targets_pick_the_shifted_column():
    """logits[..., v] = -1000 |v - t - k - 1|: only the right target costs nothing."""
    length, heads = 6, 3
    t, k, v = torch.arange(length), torch.arange(heads), torch.arange(length)
    logits = -1000.0 * (v - (t[:, None] + k + 1)[..., None]).abs().double()[None]
    ce = cross_entropy_per_head(logits, torch.arange(length)[None])
    assert ce.abs().max() == 0
    wrong = cross_entropy_per_head(logits, torch.arange(length).roll(1)[None])
    assert wrong[0, 0, 0] == 1000


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # token 0: weights 1 and 3; token 1: weight 2 on head 0; token 2 has no target
        ("token_mean", ((1 * LOG4 + 3 * (LOG4 - LOG3)) / 4 + LOG2) / 2),
        ("weight_mean", (1 * LOG4 + 3 * (LOG4 - LOG3) + 2 * LOG2) / 6),
        ("sum", 1 * LOG4 + 3 * (LOG4 - LOG3) + 2 * LOG2),
    ],
)
def test_reductions_by_hand(reduction, expected):
    logits, ids = hand_made_logits()
    weights = torch.tensor([[[1.0, 3.0], [2.0, 9.0], [9.0, 9.0]]], dtype=torch.float64)
    result = compute_weighted_mtp_loss(logits, ids, weights, horizon=2, reduction=reduction)
    assert result.loss.item() == pytest.approx(expected, rel=1e-12)
    assert result.valid_mask.tolist() == [[True, True, False]]
    normalized = compute_weighted_mtp_loss(
        logits, ids, weights, horizon=2, reduction=reduction, normalizer=10
    )
    denominator = {"token_mean": 2, "weight_mean": 6, "sum": 1}[reduction]
    assert normalized.loss.item() == pytest.approx(expected * denominator / 10, rel=1e-12)


def test_uniform_by_hand():
    loss = compute_weighted_mtp_loss(*hand_made_logits(), None, horizon=2).loss
    assert loss.item() == pytest.approx(((2 * LOG4 - LOG3) / 2 + LOG2) / 2, rel=1e-12)


def test_tripled_weights_change_nothing():
    logits, ids = torch.randn(2, 7, 3, 11, dtype=torch.float64), torch.randint(11, (2, 7))
    weights = torch.rand(2, 7, 3, dtype=torch.float64)
    one = compute_weighted_mtp_loss(logits, ids, weights, horizon=3).loss
    per_token = 3 * torch.arange(1, 15).reshape(2, 7, 1)
    three = compute_weighted_mtp_loss(logits, ids, weights * per_token, horizon=3).loss
    torch.testing.assert_close(one, three)


def test_excess_weights_by_hand():
    ce = torch.tensor([[[2.0, 1.0], [3.0, 8.0], [8.0, 8.0]]], dtype=torch.float64)
    ref_ce = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    ids = torch.tensor([[0, 1, 2]])
    # token 0: |2 - 1| = 1 and |1 - 3| = 2 (signed: 1 and -2); token 1: head 0 alone
    odds = math.exp((2 - 1) / 0.5)
    w = excess_head_weights(ce, ref_ce, ids, temperature=0.5)
    expected = [[1 / (1 + odds), odds / (1 + odds)], [1, 0], [0, 0]]
    torch.testing.assert_close(w[0], torch.tensor(expected, dtype=torch.float64))
    odds = math.exp((-2 - 1) / 0.5)
    w = excess_head_weights(ce, ref_ce, ids, temperature=0.5, excess="signed")
    expected = [[1 / (1 + odds), odds / (1 + odds)], [1, 0], [0, 0]]
    torch.testing.assert_close(w[0], torch.tensor(expected, dtype=torch.float64))


def test_excess_compares_with_the_reference_at_the_same_target():
    """A reference that equals head k's CE at its target leaves no excess, whatever k."""
    ids = torch.randint(9, (2, 8))
    per_token = torch.rand(2, 8, dtype=torch.float64)  # the CE of predicting token s
    ce = shift_to_heads(per_token, 3, 0.0)
    w = excess_head_weights(ce, per_token[:, 1:], ids)
    valid = shift_to_heads(torch.ones_like(ids), 3, 0)
    torch.testing.assert_close(w, valid / valid.sum(-1, keepdim=True).clamp(min=1).double())


def test_td_weights_by_hand():
    values = torch.tensor([[1.0, 2.0, 4.0, 3.0]], dtype=torch.float64)
    # deltas with discount 0.5: 1, 1.5, 3, 1
    w = td_head_weights(values, torch.tensor([[0, 1, 2, 3]]), 2, discount=0.5, temperature=2.0)
    pairs = torch.tensor([[1.5, 3.0], [3.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(w[0, :2], (pairs / 2).softmax(-1))
    assert w[0, 2].tolist() == [1, 0]
    assert w[0, 3].tolist() == [0, 0]


def test_no_gradient_through_derived_weights():
    values = torch.rand(1, 4, requires_grad=True)
    ids = torch.randint(5, (1, 4))
    assert not td_head_weights(values, ids, 2).requires_grad
    ce = torch.rand(1, 4, 2, requires_grad=True)
    assert not excess_head_weights(ce, torch.rand(1, 3, requires_grad=True), ids).requires_grad


def test_ignored_and_missing_targets_have_no_weight():
    ids = torch.tensor([[1, -100, 2, 3]])
    values = torch.rand(1, 4)
    w = td_head_weights(values, ids, 3)
    assert (w > 0).tolist() == [
        [[False, True, True], [True, True, False], [True, False, False], [False] * 3]
    ]


def test_next_token_ce_is_head_zero():
    logits, ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(next_token_ce(logits, ids).flatten(), expected)


@pytest.mark.parametrize("reduction", ["token_mean", "weight_mean", "sum"])
@pytest.mark.parametrize("weighting", ["uniform", "given"])
def test_gradcheck(reduction, weighting):
    logits = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(3, (2, 4))
    ids[0, 2] = -100
    weights = torch.rand(2, 4, 2, dtype=torch.float64, requires_grad=True)

    def loss(logits, weights):
        given = weights if weighting == "given" else None
        result = compute_weighted_mtp_loss(logits, ids, given, horizon=2, reduction=reduction)
        return result.loss, result.ce_per_head

    assert torch.autograd.gradcheck(loss, (logits, weights))


@pytest.mark.parametrize("shape", [(0, 4, 2, 3), (2, 1, 2, 3), (2, 0, 2, 3)])
def test_no_valid_token(shape):
    logits = torch.full(shape, float("nan"), requires_grad=True)
    ids = torch.zeros(shape[:2], dtype=torch.long)
    for reduction in ("token_mean", "weight_mean", "sum"):
        loss, valid_mask, ce = compute_weighted_mtp_loss(
            logits, ids, None, shape[2], reduction=reduction
        )
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss == 0
        assert not valid_mask.any()
        assert grad.abs().sum() == 0
        assert ce.shape == shape[:3]


def test_nan_surfaces_and_minus_infinity_is_probability_zero():
    logits = torch.zeros(1, 4, 2, 3)
    logits[..., 2] = float("-inf")
    ids = torch.tensor([[0, 1, 0, 1]])
    loss = compute_weighted_mtp_loss(logits, ids, None, 2).loss
    assert loss.item() == pytest.approx(LOG2)
    logits[0, 1, 1, 0] = float("nan")
    for ref_ce in (None, torch.zeros(1, 3)):
        assert compute_weighted_mtp_loss(logits, ids, None, 2, ref_ce=ref_ce).loss.isnan()
