"""The linear losses: against the eager truth on logits that they never make."""

import pytest
import torch
import torch.nn.functional as F

from support.agreement import GRADIENT_TOLERANCE, largest
from wmtp import (
    fused_linear_weighted_mtp_loss,
    linear_next_token_cross_entropy,
    next_token_cross_entropy,
    td_head_weights,
)
from wmtp.checks import FLOAT_DTYPES, REDUCTIONS
from wmtp.reduction import accumulation_dtype
from wmtp.reference import compute_weighted_mtp_loss

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTINGS = ("uniform", "given", "critic", "ref_ce", "signed")
SOME = 6000  # chunk_bytes of a few tokens, which do not divide all
LOW = (torch.bfloat16, torch.float16)


def make_case(
    dtype=torch.float32, weighting="uniform", bias=False, shape=(2, 11, 3, 16, 61), **more
):
    """Leaves (hidden, weight, bias or None), and the other arguments."""
    batch, length, heads, dim, vocabulary = shape
    hidden = torch.randn(batch, length, heads, dim).to(dtype)
    weight = (3 * torch.randn(vocabulary, dim) / dim**0.5).to(dtype)
    leaves = [hidden, weight, torch.randn(vocabulary).to(dtype) if bias else None]
    target_ids = torch.randint(vocabulary, (batch, length))
    target_ids[torch.rand(batch, length) < 0.2] = -100
    acc = accumulation_dtype(hidden)
    options = dict(more)
    if weighting == "given":
        options["head_weights"] = torch.rand(batch, length, heads, dtype=acc)
        options["head_weights"][0, 3] = 0.0  # a token left out
    elif weighting == "critic":
        values = torch.randn(batch, length, dtype=acc)
        options["head_weights"] = td_head_weights(values, target_ids, heads)
    elif weighting in ("ref_ce", "signed"):
        options["ref_ce"] = 8 * torch.rand(batch, length - 1, dtype=acc)
        options["excess"] = "abs" if weighting == "ref_ce" else "signed"
    for leaf in leaves:
        _ = leaf is None or leaf.requires_grad_()
    return leaves, {"target_ids": target_ids, **options}


def truth(hidden, weight, target_ids, head_weights=None, *, lm_head_bias=None, **options):
    logits = F.linear(hidden, weight, lm_head_bias)
    return compute_weighted_mtp_loss(
        logits, target_ids, head_weights, horizon=hidden.shape[2], **options
    )


def cast(leaves, options, dtype=torch.float64):
    """The same numbers in another dtype, leaves again."""

    def to(value):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.detach().to(dtype) if floating else value

    leaves = [leaf if leaf is None else to(leaf).requires_grad_() for leaf in leaves]
    return leaves, {name: to(value) for name, value in options.items()}


def gradients(function, leaves, options, upstream=(1.0, None), **more):
    """The loss, and the gradients of upstream[0] loss + sum upstream[1] ce in all leaves."""
    hidden, weight, bias = leaves
    result = function(hidden, weight, lm_head_bias=bias, **options, **more)
    objective = result.loss * upstream[0]
    if upstream[1] is not None:
        objective = objective + (result.ce_per_head * upstream[1]).sum()
    of = [leaf for leaf in leaves if leaf is not None]
    if "head_weights" in options and options["head_weights"].requires_grad:
        of.append(options["head_weights"])
    return result, torch.autograd.grad(objective, of)


def assert_agrees(leaves, options, upstream=(1.0, None), **more):
    """With fp64 autograd, the gradients no worse than eager torch's in this dtype."""
    dtype = leaves[0].dtype
    result, found = gradients(fused_linear_weighted_mtp_loss, leaves, options, upstream, **more)
    exact, true = gradients(truth, *cast(leaves, options), upstream)
    _, eager = gradients(truth, leaves, options, upstream)
    rtol = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 3e-2)  # the logits are rounded
    torch.testing.assert_close(result.loss.double(), exact.loss, rtol=rtol, atol=rtol)
    torch.testing.assert_close(result.ce_per_head.double(), exact.ce_per_head, rtol=rtol, atol=rtol)
    assert torch.equal(result.valid_mask, exact.valid_mask)
    for ours, theirs, wanted in zip(found, eager, true, strict=True):
        assert ours.dtype == theirs.dtype
        allowed = GRADIENT_TOLERANCE[dtype] * largest(wanted)
        assert largest(ours.double() - wanted) <= largest(theirs.double() - wanted) + allowed


# The default chunk holds all tokens.
CHUNKS = {torch.float64: 1, torch.float32: SOME, torch.bfloat16: SOME, torch.float16: None}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
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


def assert_close_by_norm(leaves, options, upstream, allowed, **more):
    _, found = gradients(fused_linear_weighted_mtp_loss, leaves, options, upstream, **more)
    _, true = gradients(truth, *cast(leaves, options), upstream)
    for ours, wanted in zip(found, true, strict=True):
        assert (ours.double() - wanted).norm() <= allowed * wanted.norm()


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


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1), (1, 2)])
@pytest.mark.parametrize("weighting", ["uniform", "ref_ce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
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
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_the_reference_models_cross_entropy(target, dtype, bias):
    backend, device = target
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels take no float64")
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
