"""The C++ kernel against the fp64 truth, on every instruction set of this machine."""

import math
from functools import partial

import pytest
import torch

from agreement import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    WEIGHTINGS,
    assert_agrees,
    assert_identical,
    largest,
    loss_and_gradient,
    make_case,
)
from wmtp import cpu, fused_weighted_mtp_loss, mtp_cross_entropy, next_token_cross_entropy
from wmtp.checks import FLOAT_DTYPES, REDUCTIONS
from wmtp.labels import IGNORE_INDEX, has_target
from wmtp.reference import compute_weighted_mtp_loss, cross_entropy_per_head, next_token_ce

pytestmark = pytest.mark.usefixtures("instruction_set", "unwritten_is_nan")

fused = partial(fused_weighted_mtp_loss, backend="cpu")


def token_loss(case, weights=None, ref_ce=None, signed=False):
    how = (weights, ref_ce, 0.7, signed, True, IGNORE_INDEX)
    return cpu.token_loss(case.logits, case.target_ids, *how)


def row_gradient(case, lse, row_scalar, **more):
    return cpu.row_gradient(case.logits, case.target_ids, lse, row_scalar, IGNORE_INDEX, **more)


@pytest.mark.parametrize("V", [1, 2, 3, 7, 17, 100, 1000, 4096, 4097, 50257])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_any_vocabulary(V, dtype):
    assert_agrees(fused, make_case((1, 3 if V > 9999 else 8, 4, V), dtype, "given"))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_vocabulary_of_one_has_nothing_to_learn(dtype):
    result, gradient = loss_and_gradient(fused, make_case((1, 8, 4, 1), dtype, "given"))
    assert result.loss == 0
    assert torch.count_nonzero(result.ce_per_head) == torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_weightings_and_reductions(dtype, weighting, reduction):
    case = make_case((2, 9, 4, 101), dtype, weighting, ignored=0.3, reduction=reduction)
    assert_agrees(fused, case)


@pytest.mark.parametrize("spread", [0.1, 8.0])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_flat_and_confident_logits(dtype, spread):
    case = make_case((2, 9, 4, 1500), dtype, ignored=0.3)
    case.logits *= spread / 3
    assert_agrees(fused, case)


@pytest.mark.parametrize("H", [1, 2, 8, 12])
def test_horizons_beyond_the_sequence(H):
    assert_agrees(fused, make_case((2, 7, H, 33), weighting="ref_ce", ignored=0.3))


@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_first_block_and_late_maximum(dtype, position):
    """-inf for the whole first block (4096), or a maximum that is met last."""
    case = make_case((1, 3, 4, 9001), dtype, ignored=0)
    if position == "first":
        case.logits[..., :4200] = -math.inf
        case.target_ids = 4200 + case.target_ids % (9001 - 4200)
    else:
        case.logits[..., -1] = 30.0
    assert_agrees(fused, case)


def test_confident_token_keeps_precision_at_a_large_offset():
    logits = torch.full((1, 2, 1, 5), 1e4)
    logits[..., 2] += 4.0
    ce = mtp_cross_entropy(logits, torch.tensor([[0, 2]]), backend="cpu")
    assert ce[0, 0, 0].item() == pytest.approx(math.log1p(4 * math.exp(-4.0)), rel=2e-6)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_strides(dtype):
    """Heads outermost, a slice of a wider vocabulary, reversed sizes: only the last stride is 1."""
    case = make_case((2, 9, 4, 50), dtype, "given", ignored=0.3)
    expected = loss_and_gradient(fused, case)
    wide = torch.full((4, 2, 9, 77), math.nan, dtype=dtype)[..., 3:53].permute(1, 2, 0, 3)
    case.logits = wide.copy_(case.logits)
    result, gradient = loss_and_gradient(fused, case)
    assert_identical((result, gradient), expected)
    assert not case.logits.is_contiguous()
    assert all(tensor.is_contiguous() for tensor in (*result, gradient))


@pytest.mark.parametrize("V", [1, 3, 100, 5001])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_shared_heads(dtype, V):
    """One row of logits for all heads: equal to the same row copied, the gradients summed."""
    case = make_case((2, 9, 4, V), dtype, "given", ignored=0.3)
    case.logits = case.logits[:, :, :1]

    def on_four_heads(function, copy=False, **options):
        def call(rows, *rest, **more):
            heads = rows.expand(-1, -1, 4, -1)
            return function(heads.contiguous() if copy else heads, *rest, **more, **options)

        return call

    result, gradient = loss_and_gradient(on_four_heads(fused), case)
    copied, _ = loss_and_gradient(on_four_heads(fused, copy=True), case)
    assert torch.equal(result.loss, copied.loss)
    assert torch.equal(result.ce_per_head, copied.ce_per_head)
    true_loss = on_four_heads(compute_weighted_mtp_loss, horizon=4)
    _, wanted = loss_and_gradient(true_loss, case.cast(torch.float64))
    tolerance = max(GRADIENT_TOLERANCE[dtype], torch.finfo(dtype).eps)
    error = largest(gradient.double() - wanted)
    assert error <= tolerance * max(largest(wanted), 1 / 18)  # V = 1: nothing but rounding


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_inplace_gradient(dtype, shared):
    case = make_case((2, 9, 4, 301), dtype, ignored=0.3)
    if shared:
        case.logits = case.logits[:, :, :1].contiguous().expand(-1, -1, 4, -1)
    _, row_scalar, _, _, lse = token_loss(case)
    expected = row_gradient(case, lse, row_scalar)
    assert expected.shape == (2, 9, 1 if shared else 4, 301)
    result = row_gradient(case, lse, row_scalar, inplace=True)
    assert result.data_ptr() == case.logits.data_ptr()
    assert torch.equal(case.logits, expected.expand_as(case.logits))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_nan_scalar_and_nan_row_of_weight_zero_give_nan(dtype):
    case = make_case((1, 3, 1, 77), dtype, ignored=0)
    case.logits[0, 1, 0, 9] = math.nan
    _, row_scalar, _, _, lse = token_loss(case)
    row_scalar[0, 0] = math.nan
    if dtype != torch.float64:  # all ones: rounding must not carry it away
        row_scalar.view(torch.int32)[0, 0] = 0x7FFFFFFF
    row_scalar[0, 1] = 0.0
    grad = row_gradient(case, lse, row_scalar)
    assert grad[0, :2].isnan().all()
    assert (grad[0, 2] == 0).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_next_token_ce(dtype):
    case = make_case((2, 9, 2, 1001), dtype, ignored=0.3)
    rows = case.logits[:, :, 1]
    ref_ce = next_token_cross_entropy(rows, case.target_ids, backend="cpu")
    expected = next_token_ce(rows.double(), case.target_ids)
    rtol = LOSS_TOLERANCE.get(dtype, 2e-5)
    torch.testing.assert_close(ref_ce.double(), expected, rtol=rtol, atol=rtol * 1e-2)


@pytest.mark.parametrize("V", [5, 9000])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_non_finite_logits_as_in_eager(dtype, V):
    inf, nan = math.inf, math.nan
    case = make_case((1, 9, 1, V), dtype)
    logits, target_ids = case.logits, case.target_ids.fill_(1)
    logits[0, 0, 0, 2] = nan
    logits[0, 1, 0, 2] = inf
    logits[0, 2, 0, 1] = inf  # at the target
    logits[0, 3, 0, 1] = -inf  # at the target
    logits[0, 4, 0, : V // 2 + 1] = -inf  # with the target, a whole block for the larger V
    logits[0, 5, 0] = -inf
    logits[0, 6, 0, 2:] = -inf  # all but two
    logits[0, 7, 0, [0, V - 1]] = torch.tensor([inf, nan], dtype=dtype)
    exact = logits.double().requires_grad_()
    true_ce = cross_entropy_per_head(exact, target_ids)
    (true_gradient,) = torch.autograd.grad(true_ce.sum(), exact)
    of_tokens, row_scalar, _, ce, lse = token_loss(case)
    torch.testing.assert_close(ce.double(), true_ce, equal_nan=True, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(of_tokens, ce[..., 0], equal_nan=True)
    assert lse[0, :, 0].isnan().tolist() == [i in (0, 5, 7) for i in range(9)]
    assert lse[0, 1, 0] == lse[0, 2, 0] == inf
    grad = row_gradient(case, lse, row_scalar)
    difference = (grad.double() - true_gradient)[0, [3, 4, 6, 8]]
    assert largest(difference) <= max(GRADIENT_TOLERANCE[dtype], 1e-12)
    assert grad[0, [0, 5, 7]].isnan().all()
    assert grad[0, 1, 0, 2].isnan()
    assert grad[0, 2, 0, 1].isnan()


@pytest.mark.parametrize("signed", [False, True])
def test_nan_surfaces_through_excess_weights(signed):
    case = make_case((2, 9, 4, 40), weighting="ref_ce", ignored=0)
    case.logits[0, 2, 1, 7] = math.nan
    of_tokens, row_scalar, weight_sum, *_ = token_loss(case, None, case.options["ref_ce"], signed)
    spoiled = torch.zeros(2, 9, dtype=torch.bool)
    spoiled[0, 2] = True
    for tensor in (of_tokens, weight_sum, row_scalar[..., 0]):
        assert torch.equal(tensor.isnan(), spoiled)


def test_rows_without_a_target_are_not_read():
    """NaN there, and weights that would be refused elsewhere, change nothing."""
    case = make_case((2, 9, 4, 64), weighting="given", ignored=0.3)
    expected = loss_and_gradient(fused, case)
    invalid = ~has_target(case.target_ids, 4)
    case.logits[invalid] = math.nan
    case.options["head_weights"][invalid] = -1.0
    assert_identical(loss_and_gradient(fused, case), expected)


def test_zero_weights_give_zero_scalars():
    case = make_case((2, 9, 4, 20), ignored=0.3)
    of_tokens, row_scalar, weight_sum, _, lse = token_loss(case, torch.zeros(2, 9, 4))
    for tensor in (of_tokens, row_scalar, weight_sum, row_gradient(case, lse, row_scalar)):
        assert (tensor == 0).all()


@pytest.mark.parametrize("bad", [100, -1, 2**40])
def test_target_outside_the_vocabulary(bad):
    case = make_case((2, 9, 4, 100), ignored=0.3)
    case.target_ids[0, 0] = bad  # nobody predicts it
    _, row_scalar, _, _, lse = token_loss(case)
    case.target_ids[1, 3] = case.target_ids[1, 5] = bad
    message = rf"target_ids\[1, 3\] is {bad}, outside \[0, 100\)"
    for call in (
        partial(token_loss, case),
        partial(row_gradient, case, lse, row_scalar),
        partial(cpu.next_token_ce, case.logits[:, :, 0], case.target_ids, IGNORE_INDEX),
    ):
        with pytest.raises(IndexError, match=message):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
def test_bad_weight(bad, dtype):
    case = make_case((2, 9, 4, 10), dtype, ignored=0)
    weights = torch.ones(2, 9, 4, dtype=dtype)
    weights[0, 8, 0] = bad  # no target: nobody asks
    weights[1, 2, 3] = weights[1, 4, 0] = bad
    with pytest.raises(ValueError, match=rf"head_weights\[1, 2, 3\] is {bad}"):
        fused(case.logits, case.target_ids, weights)


@pytest.mark.parametrize(("B", "S"), [(0, 5), (2, 1), (2, 0), (1, 2)])
def test_empty_and_short(B, S):
    case = make_case((B, S, 4, 11), ignored=0)
    outputs = token_loss(case)
    assert [tuple(o.shape) for o in outputs] == [(B, S), (B, S, 4), (B, S), (B, S, 4), (B, S, 4)]
    grad = row_gradient(case, outputs[4], outputs[1])
    assert grad.shape == case.logits.shape
    if S < 2:
        assert all((tensor == 0).all() for tensor in (*outputs, grad))
    ref_ce = cpu.next_token_ce(case.logits[:, :, 0], case.target_ids, IGNORE_INDEX)
    assert ref_ce.shape == (B, max(S - 1, 0))
