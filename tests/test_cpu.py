"""The C++ kernel against the fp64 truth, on every instruction set of this machine."""

import math
from functools import partial

import pytest
import torch

from support.agreement import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    WEIGHTINGS,
    assert_agrees,
    assert_identical,
    cpu_gradient,
    cpu_loss,
    largest,
    loss_and_gradients,
    make_case,
)
from support.backends import row_settings
from support.covering import in_pairs
from support.instruction_sets import HERE
from wmtp import fused_weighted_mtp_loss, next_token_cross_entropy
from wmtp.backends import cpu
from wmtp.checks import FLOAT_DTYPES, REDUCTIONS
from wmtp.labels import has_target
from wmtp.reference import compute_weighted_mtp_loss, cross_entropy_per_head, next_token_ce

pytestmark = pytest.mark.usefixtures("instruction_set", "unwritten_is_nan")

fused = partial(fused_weighted_mtp_loss, backend="cpu")


@in_pairs(
    instruction_set=HERE,
    dtype=FLOAT_DTYPES,
    V=[1, 2, 3, 7, 17, 100, 1000, 4096, 4097, 50257],
)
def test_any_vocabulary(dtype, V):
    assert_agrees(fused, make_case((1, 3 if V > 9999 else 8, 4, V), dtype, "given"))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_vocabulary_of_one_has_nothing_to_learn(dtype):
    result, gradient = loss_and_gradients(fused, make_case((1, 8, 4, 1), dtype, "given"))
    assert result.loss == 0
    assert torch.count_nonzero(result.ce_per_head) == torch.count_nonzero(gradient) == 0


@in_pairs(instruction_set=HERE, dtype=FLOAT_DTYPES, weighting=WEIGHTINGS, reduction=REDUCTIONS)
def test_weightings_and_reductions(dtype, weighting, reduction):
    case = make_case((2, 9, 4, 101), dtype, weighting, ignored=0.3, reduction=reduction)
    assert_agrees(fused, case)


@in_pairs(instruction_set=HERE, dtype=FLOAT_DTYPES, spread=[0.1, 8.0])
def test_flat_and_confident_logits(dtype, spread):
    case = make_case((2, 9, 4, 1500), dtype, ignored=0.3)
    case.logits *= spread / 3
    assert_agrees(fused, case)


@pytest.mark.parametrize("H", [1, 2, 8, 12])
def test_horizons_beyond_the_sequence(H):
    assert_agrees(fused, make_case((2, 7, H, 33), weighting="ref_ce", ignored=0.3))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_strides(dtype):
    """Heads outermost, a slice of a wider vocabulary, reversed sizes: only the last stride is 1."""
    case = make_case((2, 9, 4, 50), dtype, "given", ignored=0.3)
    expected = loss_and_gradients(fused, case)
    wide = torch.full((4, 2, 9, 77), math.nan, dtype=dtype)[..., 3:53].permute(1, 2, 0, 3)
    case.logits = wide.copy_(case.logits)
    assert_identical(loss_and_gradients(fused, case), expected)
    assert not case.logits.is_contiguous()
    outputs = cpu_loss(case.logits, case.target_ids, gradient="new")
    assert all(tensor.is_contiguous() for tensor in outputs)


@in_pairs(instruction_set=HERE, dtype=FLOAT_DTYPES, V=[1, 3, 100, 5001])
def test_shared_heads(dtype, V):
    """One row of logits for all heads: equal to the same row copied, the gradients summed."""
    case = make_case((2, 9, 4, V), dtype, "given", ignored=0.3)
    case.logits = case.logits[:, :, :1]

    def on_four_heads(function, copy=False, **options):
        def call(rows, *rest, **more):
            heads = rows.expand(-1, -1, 4, -1)
            return function(heads.contiguous() if copy else heads, *rest, **more, **options)

        return call

    result, gradient = loss_and_gradients(on_four_heads(fused), case)
    copied, _ = loss_and_gradients(on_four_heads(fused, copy=True), case)
    assert torch.equal(result.loss, copied.loss)
    assert torch.equal(result.ce_per_head, copied.ce_per_head)
    true_loss = on_four_heads(compute_weighted_mtp_loss, horizon=4)
    _, wanted = loss_and_gradients(true_loss, case.cast(torch.float64))
    tolerance = max(GRADIENT_TOLERANCE[dtype], torch.finfo(dtype).eps)
    error = largest(gradient.double() - wanted)
    assert error <= tolerance * max(largest(wanted), 1 / 18)  # V = 1: nothing but rounding


def shared_rows(logits):
    return logits[:, :, :1].contiguous().expand(logits.shape)


@in_pairs(
    instruction_set=HERE,
    dtype=FLOAT_DTYPES,
    weighting=["given", "ref_ce"],
    shared=[False, True],
)
def test_inplace_gradient(dtype, weighting, shared):
    """Over the logits goes what otherwise goes to new memory; the other outputs are the same."""
    case = make_case((2, 9, 4, 301), dtype, weighting, ignored=0.3).cast(dtype)
    logits = shared_rows(case.logits) if shared else case.logits
    how = [accumulating(case.options.get(name)) for name in ("head_weights", "ref_ce")]
    expected = cpu_loss(logits, case.target_ids, *how, normalizer=None, gradient="new")
    assert expected.grad.shape == (2, 9, 1 if shared else 4, 301)
    found = cpu_loss(logits, case.target_ids, *how, normalizer=None, gradient="inplace")
    assert found.grad.data_ptr() == logits.data_ptr()
    assert torch.equal(logits, expected.grad.expand_as(logits))
    assert all(map(torch.equal, found[:-1], expected[:-1]))


def accumulating(values):
    """float32, or float64 where it is that: what the kernel takes beside the logits."""
    return values if values is None or values.dtype == torch.float64 else values.float()


@in_pairs(instruction_set=HERE, dtype=FLOAT_DTYPES, shared=[False, True], reduction=REDUCTIONS)
def test_gradient_written_with_the_loss_is_that_of_its_row_scalars(dtype, shared, reduction):
    """row_scalar is dloss/dce, with the denominator, and so is the gradient times factors[1]."""
    case = make_case((2, 9, 4, 301), dtype, "given", ignored=0.3)
    logits = shared_rows(case.logits) if shared else case.logits
    weights = case.options["head_weights"].to(torch.promote_types(dtype, torch.float32))
    out = cpu_loss(
        logits, case.target_ids, weights, reduction=reduction, normalizer=None, gradient="new"
    )
    torch.testing.assert_close((out.row_scalar * out.ce).sum(), out.loss)
    of_scalars = cpu_gradient(logits, case.target_ids, out.row_scalar).double()
    of_scalars /= 4 if shared else 1  # autograd adds up the heads' equal parts
    written = out.grad.double() * out.factors[1].double()
    error = GRADIENT_TOLERANCE[dtype] * largest(of_scalars)
    torch.testing.assert_close(written, of_scalars, rtol=0, atol=error)
    assert dtype == torch.float16 or out.factors[1] == 1


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_nan_scalar_gives_nan_and_nan_row_of_scalar_zero_gives_zero(dtype):
    case = make_case((1, 3, 1, 77), dtype, ignored=0)
    case.logits[0, 1, 0, 9] = math.nan
    row_scalar = cpu_loss(case.logits, case.target_ids).row_scalar
    row_scalar[0, 0] = math.nan
    if dtype != torch.float64:  # all ones: rounding must not carry it away
        row_scalar.view(torch.int32)[0, 0] = 0x7FFFFFFF
    row_scalar[0, 1] = 0.0
    grad = cpu_gradient(case.logits, case.target_ids, row_scalar)
    assert grad[0, 0].isnan().all()
    assert (grad[0, 1:] == 0).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_next_token_ce(dtype):
    case = make_case((2, 9, 2, 1001), dtype, ignored=0.3)
    rows = case.logits[:, :, 1]
    ref_ce = next_token_cross_entropy(rows, case.target_ids, backend="cpu")
    expected = next_token_ce(rows.double(), case.target_ids)
    rtol = LOSS_TOLERANCE.get(dtype, 2e-5)
    torch.testing.assert_close(ref_ce.double(), expected, rtol=rtol, atol=rtol * 1e-2)


@in_pairs(instruction_set=HERE, dtype=FLOAT_DTYPES, V=[5, 9000])
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
    out = cpu_loss(logits, target_ids, gradient="new")
    of_scalars = cpu_gradient(logits, target_ids, out.row_scalar)
    in_place = cpu_loss(logits, target_ids, gradient="inplace")
    torch.testing.assert_close(out.ce.double(), true_ce, equal_nan=True, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(out.token_loss, out.ce[..., 0], equal_nan=True)
    lse = (out.row_max + out.log_sum)[0, :, 0]
    assert lse.isnan().tolist() == [i in (0, 5, 7) for i in range(9)]
    assert lse[1] == lse[2] == inf
    written = [result.grad.double() * result.factors[1] for result in (out, in_place)]
    for grad in (of_scalars, *written):
        difference = (grad.double() - true_gradient)[0, [3, 4, 6, 8]]
        assert largest(difference) <= max(GRADIENT_TOLERANCE[dtype], 1e-12)
        assert grad[0, [0, 5, 7]].isnan().all()
        assert grad[0, 1, 0, 2].isnan()
        assert grad[0, 2, 0, 1].isnan()


@pytest.mark.parametrize("excess", ["abs", "signed"])
def test_nan_surfaces_through_excess_weights(excess):
    case = make_case((2, 9, 4, 40), weighting="ref_ce", ignored=0)
    case.logits[0, 2, 1, 7] = math.nan
    ref_ce = case.options["ref_ce"]
    out = cpu_loss(
        case.logits, case.target_ids, None, ref_ce, excess=excess, gradient="new", normalizer=None
    )
    spoiled = torch.zeros(2, 9, dtype=torch.bool)
    spoiled[0, 2] = True
    for tensor in (out.token_loss, out.weight_sum, out.row_scalar[..., 0]):
        assert torch.equal(tensor.isnan(), spoiled)
    every_head = spoiled[..., None].expand(2, 9, 4)  # of that token, whose weights are NaN
    assert torch.equal(out.grad.isnan().all(-1), every_head)
    assert torch.equal(out.grad.isnan().any(-1), every_head)
    assert out.loss.isnan()


def test_rows_without_a_target_are_not_read():
    """NaN there, and weights that would be refused elsewhere, change nothing."""
    case = make_case((2, 9, 4, 64), weighting="given", ignored=0.3)
    expected = loss_and_gradients(fused, case)
    invalid = ~has_target(case.target_ids, 4)
    case.logits[invalid] = math.nan
    case.options["head_weights"][invalid] = -1.0
    assert_identical(loss_and_gradients(fused, case), expected)


def test_zero_weights_give_zero_scalars():
    case = make_case((2, 9, 4, 20), ignored=0.3)
    for reduction in REDUCTIONS:
        out = cpu_loss(
            *(case.logits, case.target_ids, torch.zeros(2, 9, 4)),
            reduction=reduction, normalizer=None, gradient="new",
        )  # fmt: skip
        for tensor in (out.loss, out.token_loss, out.row_scalar, out.weight_sum, out.grad):
            assert (tensor == 0).all()
        assert not out.valid_mask.any()


@pytest.mark.parametrize("bad", [100, -1, 2**40])
def test_target_outside_the_vocabulary(bad):
    case = make_case((2, 9, 4, 100), ignored=0.3)
    logits, target_ids = case.logits.clone(), case.target_ids
    target_ids[0, 0] = bad  # nobody predicts it
    row_scalar = cpu_loss(logits, target_ids).row_scalar
    target_ids[1, 3] = target_ids[1, 5] = bad
    message = rf"target_ids asks head \d at \[1, \d\] for {bad}, outside \[0, 100\)"
    for call in (
        partial(cpu_loss, logits, target_ids),
        partial(cpu_loss, logits, target_ids, gradient="inplace"),
        partial(cpu_gradient, logits, target_ids, row_scalar),
        partial(cpu.next_token_ce, logits[:, :, 0], target_ids[:, 1:], row_settings()),
    ):
        with pytest.raises(IndexError, match=message):
            call()
    assert torch.equal(logits, case.logits)


@in_pairs(
    instruction_set=HERE,
    dtype=[torch.float32, torch.float64],
    bad=[-0.5, math.nan, math.inf],
)
def test_bad_weight(bad, dtype):
    case = make_case((2, 9, 4, 10), dtype, ignored=0)
    weights = torch.ones(2, 9, 4, dtype=dtype)
    weights[0, 8, 0] = bad  # no target: nobody asks
    weights[1, 2, 3] = weights[1, 4, 0] = bad
    with pytest.raises(ValueError, match=rf"head_weights\[1, 2, 3\] is {bad}"):
        fused(case.logits, case.target_ids, weights)
    logits = case.logits.clone()
    with pytest.raises(ValueError, match="finite and >= 0"):
        cpu_loss(logits, case.target_ids, weights, gradient="inplace")
    assert torch.equal(logits, case.logits)


@pytest.mark.parametrize(("B", "S"), [(0, 5), (2, 1), (2, 0), (1, 2)])
def test_empty_and_short(B, S):
    case = make_case((B, S, 4, 11), ignored=0)
    out = cpu_loss(case.logits, case.target_ids, normalizer=None, gradient="new")
    tokens, rows = (B, S), (B, S, 4)
    none = (0,)
    of_rows = (rows, none, tokens, tokens, rows, rows, rows, none, none)
    shapes = [(), tokens, *of_rows, (2,), (*rows, 11)]
    assert [tuple(tensor.shape) for tensor in out] == shapes
    assert out.grad.dtype == torch.float32
    in_place = cpu_loss(case.logits.clone(), case.target_ids, normalizer=None, gradient="inplace")
    assert all(map(torch.equal, in_place, out))
    if S < 2:
        assert out.factors.tolist() == [1, 1]
        assert not any(map(torch.count_nonzero, (*out[:8], out.grad)))
    grad = cpu_gradient(case.logits, case.target_ids, out.row_scalar)
    torch.testing.assert_close(grad, out.grad)
    ref_ce = cpu.next_token_ce(case.logits[:, :, 0], case.target_ids[:, 1:], row_settings())[:, :-1]
    assert ref_ce.shape == (B, max(S - 1, 0))
