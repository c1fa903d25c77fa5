"""Every backend against the truth, through the public functions."""

from functools import partial

import pytest
import torch

import wmtp
from support.agreement import (
    WEIGHTINGS,
    assert_agrees,
    loss_and_gradients,
    make_case,
    relative_error,
)
from support.covering import in_pairs
from wmtp import fused_weighted_mtp_loss, mtp_cross_entropy, next_token_cross_entropy
from wmtp.checks import REDUCTIONS
from wmtp.reference import compute_weighted_mtp_loss, cross_entropy_per_head, next_token_ce

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@in_pairs(weighting=WEIGHTINGS, reduction=REDUCTIONS, dtype=DTYPES)
def test_agrees_with_the_truth(target, dtype, weighting, reduction):
    backend, device = target
    case = make_case((2, 4, 3, 133), dtype, weighting, device, reduction=reduction)
    assert_agrees(partial(fused_weighted_mtp_loss, backend=backend), case)


def test_longer_rows(target):
    backend, device = target
    for vocabulary in (5000, 8191):
        case = make_case((1, 4, 2, vocabulary), torch.bfloat16, "ref_ce", device)
        assert_agrees(partial(fused_weighted_mtp_loss, backend=backend), case)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_eager_backend_is_the_reference(weighting):
    case = make_case((2, 5, 3, 17), weighting=weighting)
    ours = fused_weighted_mtp_loss(case.logits, case.target_ids, **case.options, backend="eager")
    truth = compute_weighted_mtp_loss(case.logits, case.target_ids, **case.options, horizon=3)
    for mine, true in zip(ours, truth, strict=True):
        assert torch.equal(mine, true)


def layouts():
    def odd_rows(x):  # rows start at odd offsets
        return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]

    def vocabulary_first(x):
        return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)

    def sequence_first(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def every_second_token(x):
        return x.repeat_interleave(2, dim=1)[:, ::2]

    return [odd_rows, vocabulary_first, sequence_first, every_second_token]


@pytest.mark.parametrize("layout", layouts(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(target, layout, dtype):
    backend, device = target
    case = make_case((2, 4, 3, 37), dtype, "given", device)

    def strided(logits, *args, **options):
        return fused_weighted_mtp_loss(layout(logits), *args, **options, backend=backend)

    assert_agrees(strided, case)


@in_pairs(weighting=["uniform", "given", "ref_ce"], dtype=DTYPES, unit_stride=[True, False])
def test_heads_that_share_one_set_of_logits(target, weighting, dtype, unit_stride):
    backend, device = target
    case = make_case((2, 6, 3, 50), dtype, weighting, device)
    rows = case.logits[:, :, 0] if unit_stride else case.logits[:, :, 0].mT.contiguous().mT

    def gradient(function, rows, **more):
        rows = rows.detach().requires_grad_()
        shared = rows[:, :, None].expand(-1, -1, 3, -1)
        result = function(shared, case.target_ids, **case.options, **more)
        result.loss.backward()
        return result.loss, rows.grad

    loss, grad = gradient(fused_weighted_mtp_loss, rows, backend=backend)
    true_loss, true_grad = gradient(compute_weighted_mtp_loss, rows.double(), horizon=3)
    _, eager_grad = gradient(compute_weighted_mtp_loss, rows, horizon=3)
    torch.testing.assert_close(loss.double(), true_loss, rtol=2e-5, atol=0)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative_error(grad, true_grad) <= relative_error(eager_grad, true_grad) + tolerance


def test_mtp_cross_entropy(target):
    backend, device = target
    case = make_case((2, 6, 3, 77), device=device)
    logits = case.logits.requires_grad_()
    ce = mtp_cross_entropy(logits, case.target_ids, backend=backend)
    truth = cross_entropy_per_head(logits.double(), case.target_ids)
    torch.testing.assert_close(ce.double(), truth, rtol=2e-5, atol=2e-6)
    found, expected = (torch.autograd.grad(x, logits, case.grad_ce.to(x))[0] for x in (ce, truth))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_next_token_cross_entropy(target, dtype):
    backend, device = target
    case = make_case((2, 6, 1, 77), dtype, device=device)
    logits = case.logits[:, :, 0].requires_grad_()
    ref_ce = next_token_cross_entropy(logits, case.target_ids, backend=backend)
    assert ref_ce.dtype == torch.float32
    assert not ref_ce.requires_grad
    truth = next_token_ce(logits.double(), case.target_ids)
    torch.testing.assert_close(ref_ce.double(), truth, rtol=2e-5, atol=2e-6)


@in_pairs(
    weighting=WEIGHTINGS,
    shape=[(0, 4, 2, 7), (2, 1, 2, 7), (1, 3, 2, 7)],
    reduction=REDUCTIONS,
)
def test_no_valid_token_means_zero(target, weighting, shape, reduction):
    backend, device = target
    case = make_case(shape, torch.float32, weighting, device, ignored=1.1, reduction=reduction)
    case.logits.fill_(float("nan"))
    result, gradient = loss_and_gradients(partial(fused_weighted_mtp_loss, backend=backend), case)
    assert result.loss == 0
    assert not result.valid_mask.any()
    assert torch.count_nonzero(gradient) == 0


@in_pairs(
    weighting=WEIGHTINGS,
    poison=[float("nan"), float("inf"), float("-inf")],
    place=["target", "elsewhere", "all"],
)
def test_non_finite_logits_behave_as_in_eager(target, weighting, poison, place):
    backend, device = target
    case = make_case((1, 5, 2, 37), torch.float32, weighting, device, ignored=0)
    goal = case.target_ids[0, 2 + 1 + 1]
    column = {"target": goal, "elsewhere": (goal + 1) % 37, "all": slice(None)}[place]
    case.logits[0, 2, 1, column] = poison
    result, gradient = loss_and_gradients(partial(fused_weighted_mtp_loss, backend=backend), case)
    truth, true_gradient = loss_and_gradients(compute_weighted_mtp_loss, case, horizon=2)
    torch.testing.assert_close(result.loss, truth.loss, equal_nan=True, rtol=2e-5, atol=0)
    torch.testing.assert_close(
        result.ce_per_head, truth.ce_per_head, equal_nan=True, rtol=2e-5, atol=2e-6
    )
    finite_rows = true_gradient.isfinite().all(-1)
    torch.testing.assert_close(gradient[finite_rows], true_gradient[finite_rows])
    assert torch.equal(gradient.isfinite().all(-1), finite_rows)


def test_rows_without_a_target_are_not_read(target):
    backend, device = target
    case = make_case((2, 6, 3, 40), weighting="ref_ce", device=device, ignored=0.4)
    clean, clean_gradient = loss_and_gradients(
        partial(fused_weighted_mtp_loss, backend=backend), case
    )
    from wmtp.labels import shift_to_heads

    case.logits[shift_to_heads(case.target_ids, 3, -100) == -100] = float("nan")
    result, gradient = loss_and_gradients(partial(fused_weighted_mtp_loss, backend=backend), case)
    assert torch.equal(result.loss, clean.loss)
    assert torch.equal(gradient, clean_gradient)


def test_target_outside_the_vocabulary(target):
    backend, device = target
    case = make_case((1, 6, 2, 30), device=device, ignored=0)
    case.target_ids[0, 3] = 30
    call = partial(fused_weighted_mtp_loss, case.logits, case.target_ids, backend=backend)
    if backend == "cpu":
        with pytest.raises(IndexError, match=r"asks head 1 at \[0, 1\] for 30, outside \[0, 30\)"):
            call()
    else:
        loss, _, ce = call()
        assert loss.isnan()
        wrong = torch.zeros(6, 2, dtype=torch.bool)
        wrong[2, 0] = wrong[1, 1] = True
        assert torch.equal(ce[0].isnan().cpu(), wrong)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf")])
def test_bad_weights_on_the_cpu(backend, bad):
    case = make_case((1, 6, 2, 30), weighting="given", ignored=0)
    case.options["head_weights"][0, 5, 1] = bad  # no target there: whatever stands there is fine
    call = partial(
        fused_weighted_mtp_loss, case.logits, case.target_ids, **case.options, backend=backend
    )
    assert call().loss.isfinite()
    case.options["head_weights"][0, 2, 1] = bad
    with pytest.raises(ValueError, match=r"head_weights\[0, 2, 1\] is .*finite and >= 0"):
        call()


def test_a_normalizer_keeps_the_dtype():
    case = make_case((1, 5, 2, 30))
    five = torch.tensor(5.0, dtype=torch.float64)
    loss = fused_weighted_mtp_loss(case.logits, case.target_ids, normalizer=five).loss
    assert loss.dtype == torch.float32
    assert loss == fused_weighted_mtp_loss(case.logits, case.target_ids, normalizer=5).loss


def test_public_names():
    assert set(wmtp.__all__) <= set(dir(wmtp))
