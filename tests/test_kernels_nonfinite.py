"""NaN, infinities and targets out of range, in every tier: where they count they surface, and
nowhere else.
"""

import pytest
import torch

from support.agreement import kernel_gradient
from support.covering import in_pairs
from support.kernel_outputs import (
    IGNORED,
    INF,
    NAN,
    assert_close,
    make,
    true_gradient,
    truth,
    weighted_loss,
)
from wmtp import kernels


@pytest.mark.parametrize(("dtype", "vocabulary"), [(torch.float32, 33), (torch.bfloat16, 5000)])
def test_nonfinite_logits_behave_as_in_eager(device, tier, dtype, vocabulary):
    logits, target_ids = make((1, 9, 1, vocabulary), dtype, device, ignored=0.0)
    target_ids[:] = 5
    logits[0, 0, 0, -1] = NAN
    logits[0, 1, 0, 0] = NAN
    logits[0, 2, 0, : vocabulary - 3] = -INF  # whole first blocks
    logits[0, 2, 0, 5] = 1.0
    logits[0, 3] = -INF
    logits[0, 4, 0, 5] = -INF
    logits[0, 5, 0, vocabulary // 2] = INF
    logits[0, 6, 0, 5] = INF
    logits[0, 7, 0, :] = NAN
    *found, row_max, log_sum, (grad, _) = weighted_loss(logits, target_ids)
    assert_close(found, truth(logits, target_ids)[:4])
    lse = (row_max + log_sum)[:, :8]
    assert_close([lse], [logits[:, :8].double().cpu().logsumexp(-1)])
    grad = grad.cpu().double()
    assert grad[0, [0, 1, 3, 7]].isnan().all()
    exact = true_gradient(logits, target_ids, torch.ones(1, 9, 1))[0, [2, 4, 5]]
    torch.testing.assert_close(grad[0, [2, 4, 5]], exact, rtol=1e-2, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("bad", "shared"), [(33, False), (-1, False), (2**40, False), (33, True)])
def test_target_out_of_range_gives_nan_and_only_there(device, tier, bad, shared):
    logits, target_ids = make((1, 6, 1 if shared else 2, 33), torch.float32, device, 0.0)
    logits = logits.expand(-1, -1, 2, -1)
    target_ids[0, 3] = bad
    *_, ce, _, _, (grad, _) = weighted_loss(logits, target_ids)
    hit = torch.zeros(1, 6, 2, dtype=torch.bool)
    hit[0, 2, 0] = hit[0, 1, 1] = True  # the two that predict position 3
    assert torch.equal(ce.isnan().cpu(), hit)
    # Their token's loss is NaN, and nothing but their own gradient.
    rows = hit.any(-1, keepdim=True) if shared else hit
    assert torch.equal(grad.isnan().all(-1).cpu(), rows)
    assert torch.equal(grad.isnan().any(-1).cpu(), rows)


@pytest.mark.parametrize("normalize", [True, False])
def test_what_has_no_weight_spoils_nothing(device, tier, normalize):
    """An infinite cross entropy, a NaN, a target out of range, each of weight 0."""
    logits, target_ids = make((1, 6, 2, 100), torch.float32, device, ignored=0.0)
    weights = torch.rand(1, 6, 2).add(0.1).to(device)
    clean = logits.clone()
    for t, k in ((0, 0), (1, 1), (2, 0), (3, 1)):
        weights[0, t, k] = 0.0
    logits[0, 0, 0, target_ids[0, 1]] = -INF
    logits[0, 1, 1] = NAN
    logits[0, 2, 0, 7] = INF
    options = {"weights": weights, "normalize": normalize}
    *wanted, (clean_grad, _) = weighted_loss(clean, target_ids, **options)
    target_ids[0, 5] = 100  # head 1's at t = 3; head 0's at t = 4 surfaces
    *found, (grad, _) = weighted_loss(logits, target_ids, **options)
    for ours, theirs in zip(found[:3], wanted[:3], strict=True):
        assert torch.equal(ours[:, :4], theirs[:, :4])
    assert torch.equal(grad[:, :4], clean_grad[:, :4])
    assert (grad[weights == 0] == 0).all()
    assert found[0][0, 4].isnan()
    assert grad[0, 4, 0].isnan().all()
    ce = found[3]
    assert ce[0, 0, 0] == ce[0, 2, 0] == INF
    assert ce[0, 1, 1].isnan()
    assert ce[0, 3, 1].isnan()
    of_ce = kernel_gradient(kernels, logits, target_ids, found[1], *found[4:])
    assert (of_ce[weights == 0] == 0).all()
    assert of_ce[:, :4].isfinite().all()


def test_a_shared_row_without_weight_spoils_nothing(device, tier):
    rows, target_ids = make((1, 5, 1, 100), torch.float32, device, ignored=0.0)
    weights = torch.rand(1, 5, 3).add(0.1).to(device)
    weights[0, 0] = weights[0, 1, 2] = 0.0
    rows[0, 0] = NAN
    rows[0, 1, 0, target_ids[0, 4]] = -INF  # head 2's target
    *found, (grad, _) = weighted_loss(rows.expand(-1, -1, 3, -1), target_ids, weights)
    assert (grad[0, 0] == 0).all()
    assert grad.isfinite().all()
    assert found[0].isfinite().all()
    assert found[3][0, 1, 2] == INF


# A row alone does not know excess weights.
@in_pairs(tier=["token", "online"], signed=[True, False])
def test_infinite_references_do_as_in_eager(device, tier, signed):
    """Signed, +inf gives a weight of 0; all else is NaN, for that token alone."""
    logits, target_ids = make((1, 6, 2, 33), torch.float32, device, ignored=0.0)
    target_ids[0, 5] = IGNORED  # its reference does not count, and is not read
    ref_ce = torch.tensor([[1.0, INF, 2.0, -INF, NAN]]).to(device)
    *found, (grad, _) = weighted_loss(logits, target_ids, ref_ce=ref_ce, signed=signed)
    assert_close(found[:4], truth(logits, target_ids, ref_ce=ref_ce, signed=signed)[:4])
    spoiled = [not signed, not signed, True, True, False]  # t = 0 and 1 meet +inf, 2 and 3 -inf
    assert found[0][0, :5].isnan().tolist() == spoiled
    assert grad[0, :5].isnan().all(-1).any(-1).tolist() == spoiled
    if signed:
        assert found[1][0, 0, 1] == found[1][0, 1, 0] == 0
        assert (grad[0, 0, 1] == 0).all()
