"""Cases of the linear loss, and how close it has to come to the fp64 truth on them."""

import torch
import torch.nn.functional as F

from support.agreement import GRADIENT_TOLERANCE, assert_no_worse, largest
from wmtp import fused_linear_weighted_mtp_loss, td_head_weights
from wmtp.reduction import accumulation_dtype
from wmtp.reference import compute_weighted_mtp_loss

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
        assert_no_worse(ours, theirs, wanted, GRADIENT_TOLERANCE[dtype] * largest(wanted))


def assert_close_by_norm(leaves, options, upstream, allowed, **more):
    _, found = gradients(fused_linear_weighted_mtp_loss, leaves, options, upstream, **more)
    _, true = gradients(truth, *cast(leaves, options), upstream)
    for ours, wanted in zip(found, true, strict=True):
        assert (ours.double() - wanted).norm() <= allowed * wanted.norm()
