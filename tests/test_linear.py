"""The linear losses: against the eager truth on logits that they never make."""

import pytest
import torch
import torch.nn.functional as F

from support.covering import in_pairs
from support.linear_cases import (
    LOW,
    SOME,
    WEIGHTINGS,
    assert_agrees,
    assert_close_by_norm,
    cast,
    gradients,
    make_case,
    truth,
)
from wmtp import (
    fused_linear_weighted_mtp_loss,
    linear_next_token_cross_entropy,
    next_token_cross_entropy,
)
from wmtp.checks import FLOAT_DTYPES, REDUCTIONS

pytestmark = pytest.mark.usefixtures("one_thread")


# The default chunk holds all tokens.
CHUNKS = {torch.float64: 1, torch.float32: SOME, torch.bfloat16: SOME, torch.float16: None}


@in_pairs(dtype=FLOAT_DTYPES, weighting=WEIGHTINGS, reduction=REDUCTIONS)
def test_agrees_with_eager(dtype, weighting, reduction):
    chunk_bytes = CHUNKS[dtype]
    leaves, options = make_case(dtype, weighting, bias=reduction != "sum", reduction=reduction)
    upstream = torch.randn(()).item(), torch.randn(2, 11, 3) / 9
    assert_agrees(leaves, options, chunk_bytes=chunk_bytes)
    assert_agrees(leaves, options, upstream, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(weighting, bias):
    leaves, options = make_case(torch.float64, weighting, bias, (1, 5, 2, 2, 5))
    weights = options.pop("head_weights", None)
    inputs = [leaf for leaf in leaves if leaf is not None]
    if weighting == "given":
        weights = weights.clamp(min=0.1)  # finite differences must not make one negative
        inputs.append(weights.requires_grad_())
    constant = "ref_ce" in options  # the excess weights are, and finite differences see them move

    def both(hidden, weight, *rest):
        rest = list(rest)
        more = {"lm_head_bias": rest.pop(0)} if bias else {}
        result = fused_linear_weighted_mtp_loss(
            hidden, weight, head_weights=rest[0] if rest else weights, chunk_bytes=300,
            **more, **options,
        )  # fmt: skip
        return result.ce_per_head if constant else (result.loss, result.ce_per_head)

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("weighting", ["uniform", "given", "ref_ce"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_every_backend(target, dtype, weighting):
    backend, device = target
    leaves, options = make_case(dtype, weighting, True, (1, 8, 2, 8, 61))
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    upstream = -2.5, torch.randn(1, 8, 2, device=device) / 9
    assert_agrees(leaves, options, chunk_bytes=SOME // 3, backend=backend)
    assert_agrees(leaves, options, upstream, chunk_bytes=SOME // 3, backend=backend)


def test_eager_is_the_truth_itself():
    leaves, options = make_case(torch.float32, "given", bias=True)
    found = gradients(fused_linear_weighted_mtp_loss, leaves, options, backend="eager")
    wanted = gradients(truth, leaves, options)
    for ours, theirs in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("weighting", ["uniform", "given", "ref_ce"])
@pytest.mark.parametrize("chunk_bytes", [200_000, None])
def test_bf16_gradients_are_as_good_as_eager_ones(weighting, chunk_bytes):
    """By the norm. Each chunk's part of the weight's is rounded, and so is what excess weights are
    multiplied with; otherwise there is no rounding that eager torch does not have."""
    leaves, options = make_case(torch.bfloat16, weighting, shape=(1, 128, 4, 64, 1000))
    _, found = gradients(fused_linear_weighted_mtp_loss, leaves, options, chunk_bytes=chunk_bytes)
    _, true = gradients(truth, *cast(leaves, options))
    _, eager = gradients(truth, leaves, options)
    for k, (ours, theirs, wanted) in enumerate(zip(found, eager, true, strict=True)):
        rounded = weighting == "ref_ce" or (k == 1 and chunk_bytes)
        allowed = (1.1 if rounded else 1.001) * (theirs.double() - wanted).norm()
        assert (ours.double() - wanted).norm() <= allowed


def test_float16_keeps_gradients_for_the_loss_scale():
    leaves, options = make_case(torch.float16, "given", True, (1, 64, 4, 32, 5000))
    options["normalizer"] = 1e5
    assert_close_by_norm(leaves, options, (65536.0, None), 5e-3)


@pytest.mark.parametrize("weighting", ["uniform", "ref_ce"])
@pytest.mark.parametrize("chunk_bytes", [20_000_000, 1_000_000])
def test_float16_sums_of_many_rows_do_not_overflow(weighting, chunk_bytes):
    """One word in seven, a channel that is always 10, weights of 100."""
    leaves, options = make_case(torch.float16, weighting, True, (1, 1024, 2, 16, 500))
    with torch.no_grad():
        leaves[0][..., 0] = 10.0
        leaves[1][:, 1] *= 100.0
    options["target_ids"][torch.rand(1, 1024) < 0.15] = 5
    assert_close_by_norm(leaves, options, (1.0, None), 1e-2, chunk_bytes=chunk_bytes)


def strided(hidden):
    """The same values in every layout that a model may hand out."""
    batch, length, heads, dim = hidden.shape
    padded = torch.zeros(batch, length, heads, dim + 3, dtype=hidden.dtype)
    padded[..., :dim] = hidden
    yield padded[..., :dim]
    yield hidden.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)  # heads first
    yield hidden.transpose(2, 3).contiguous().transpose(2, 3)


def test_hidden_states_of_any_strides():
    leaves, options = make_case(torch.float32, "given")
    _, wanted = gradients(fused_linear_weighted_mtp_loss, leaves, options)
    for hidden in strided(leaves[0].detach()):
        other = [hidden.requires_grad_(), *leaves[1:]]
        assert not hidden.is_contiguous()
        _, found = gradients(fused_linear_weighted_mtp_loss, other, options, chunk_bytes=SOME)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    weight = leaves[1].detach().T.contiguous().T.requires_grad_()
    _, found = gradients(
        fused_linear_weighted_mtp_loss, [leaves[0], weight, None], options, chunk_bytes=SOME
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_one_hidden_state_for_all_heads():
    (_, weight, _), options = make_case(torch.float64, "ref_ce")
    trunk = torch.randn(2, 11, 16, dtype=torch.float64, requires_grad=True)
    hidden = trunk[:, :, None].expand(-1, -1, 3, -1)
    found = fused_linear_weighted_mtp_loss(hidden, weight, **options, chunk_bytes=SOME).loss
    wanted = truth(hidden, weight, **options).loss
    torch.testing.assert_close(
        torch.autograd.grad(found, [trunk, weight]), torch.autograd.grad(wanted, [trunk, weight])
    )


@in_pairs(
    dtype=[torch.float32, torch.float16],
    weighting=["uniform", "ref_ce"],
    shape=[(0, 5), (2, 0), (2, 1), (1, 2)],
)
def test_no_target_is_a_loss_of_zero(dtype, weighting, shape):
    batch, length = shape
    hidden = torch.randn(batch, length, 3, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(7, 4, dtype=dtype, requires_grad=True)
    bias = torch.randn(7, dtype=dtype, requires_grad=True)
    target_ids = torch.full(shape, -100)
    options = {"ref_ce": torch.zeros(batch, max(length - 1, 0))} if weighting == "ref_ce" else {}
    result = fused_linear_weighted_mtp_loss(
        hidden, weight, target_ids, lm_head_bias=bias, **options
    )
    result.loss.backward()
    assert result.loss == 0
    assert not result.valid_mask.any()
    assert not result.ce_per_head.any()
    for leaf in (hidden, weight, bias):
        assert not leaf.grad.any()


def test_nan_comes_out_of_nan():
    (hidden, weight, _), options = make_case(torch.float32, "given")
    with torch.no_grad():
        hidden[0, 0, 0, 0] = float("nan")
    result = fused_linear_weighted_mtp_loss(hidden, weight, **options, chunk_bytes=SOME)
    wanted = truth(hidden, weight, **options)
    assert result.loss.isnan()
    assert torch.equal(result.ce_per_head.isnan(), wanted.ce_per_head.isnan())
    ours = torch.autograd.grad(result.loss, [hidden, weight])
    theirs = torch.autograd.grad(wanted.loss, [hidden, weight])
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


def test_a_bias_of_minus_infinity_leaves_words_out():
    (hidden, weight, bias), options = make_case(torch.float64, "ref_ce", bias=True)
    with torch.no_grad():
        bias[:40] = -float("inf")
    options["target_ids"] = options["target_ids"].clamp(min=40)
    torch.testing.assert_close(
        gradients(fused_linear_weighted_mtp_loss, [hidden, weight, bias], options),
        gradients(truth, [hidden, weight, bias], options),
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_the_reference_models_cross_entropy(target, dtype, bias):
    next_token_as_of_logits(*target, dtype, bias)


@pytest.mark.parametrize("bias", [False, True])
def test_the_reference_models_cross_entropy_in_float64(bias):
    """Which Triton's kernels do not take."""
    next_token_as_of_logits("cpu", "cpu", torch.float64, bias)


def next_token_as_of_logits(backend, device, dtype, bias):
    hidden = torch.randn(2, 9, 16, device=device).to(dtype).requires_grad_()
    weight = torch.randn(61, 16, device=device).to(dtype)
    head = torch.randn(61, device=device).to(dtype) if bias else None
    target_ids = torch.randint(61, (2, 9), device=device)
    target_ids[0, 4] = -7
    options = {"ignore_index": -7, "backend": backend}
    found = linear_next_token_cross_entropy(
        hidden, weight, target_ids, lm_head_bias=head, chunk_bytes=SOME, **options
    )
    wanted = next_token_cross_entropy(F.linear(hidden, weight, head), target_ids, **options)
    assert not found.requires_grad
    assert found[0, 3] == 0
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [0, 1])
def test_no_next_token(length):
    hidden, target_ids = torch.randn(2, length, 4), torch.zeros(2, length, dtype=torch.long)
    assert linear_next_token_cross_entropy(hidden, torch.randn(5, 4), target_ids).shape == (2, 0)
