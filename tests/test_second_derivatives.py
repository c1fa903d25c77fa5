"""Differentiating twice is right or raises, for every pair of differentiable inputs."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from support.agreement import make_case
from support.backends import FUSED_ON_CPU
from support.covering import in_pairs
from wmtp import fused_linear_weighted_mtp_loss, fused_weighted_mtp_loss
from wmtp.checks import REDUCTIONS
from wmtp.reference import compute_weighted_mtp_loss

pytestmark = pytest.mark.usefixtures("one_thread")
B, S, H, D, V = 2, 5, 3, 4, 11
NO_SECOND = "no second derivative: use backend='eager'"
SCALARS = {
    "loss": lambda result: result.loss,
    "of the loss": lambda result: result.loss.square() + result.loss.exp(),
    "of both": lambda result: result.loss * (1 + result.ce_per_head.square().mean()),
}


def of_tensor(call, leaves, target_ids, **options):
    return call(leaves["logits"] * 1, target_ids, leaves["head_weights"].softmax(-1), **options)


def of_list(call, leaves, target_ids, **options):
    heads = [leaves["logits"][:, :, k] for k in range(H)]
    if call is compute_weighted_mtp_loss:
        heads = torch.stack(heads, 2)
    return call(heads, target_ids, leaves["head_weights"].softmax(-1), **options)


def of_shared_heads(call, leaves, target_ids, **options):
    rows = leaves["logits"][:, :, :1].expand(-1, -1, H, -1)
    return call(rows, target_ids, leaves["head_weights"].softmax(-1), **options)


def of_hidden(call, leaves, target_ids, **options):
    weights = leaves["head_weights"].softmax(-1)
    product = (leaves["hidden"] * 1, leaves["lm_head"])
    if call is compute_weighted_mtp_loss:
        return call(F.linear(*product, leaves["bias"]), target_ids, weights, **options)
    how = {"lm_head_bias": leaves["bias"], "chunk_bytes": 200}
    return fused_linear_weighted_mtp_loss(*product, target_ids, weights, **how, **options)


FORMS = {of_tensor: ("logits",), of_list: ("logits",), of_shared_heads: ("logits",)}
FORMS[of_hidden] = ("hidden", "lm_head", "bias")
PAIRS = [
    (form, *pair)
    for form, inputs in FORMS.items()
    for pair in product((*inputs, "head_weights"), repeat=2)
]


def make_leaves(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = {"logits": (B, S, H, V), "hidden": (B, S, H, D), "lm_head": (V, D), "bias": (V,)}
    shapes["head_weights"] = (B, S, H)
    return {
        name: torch.randn(shape, generator=g).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def twice(form, scalar, first, second, call=compute_weighted_mtp_loss, **options):
    """d/d second of |d scalar/d first|^2; None where they have nothing to do with each other."""
    leaves, case = make_leaves(), make_case((B, S, H, V))
    if call is compute_weighted_mtp_loss:
        options = {**options, "horizon": H}
    result = form(call, leaves, case.target_ids, **options)
    how = {"create_graph": True, "allow_unused": True}
    (once,) = torch.autograd.grad(SCALARS[scalar](result), leaves[first], **how)
    if not once.requires_grad:
        return None
    (found,) = torch.autograd.grad(once.square().sum(), leaves[second], allow_unused=True)
    return found


@in_pairs(inputs=PAIRS, scalar=SCALARS, reduction=REDUCTIONS)
def test_every_pair_is_right_or_raises(inputs, scalar, reduction):
    form, first, second = inputs
    wanted = twice(form, scalar, first, second, reduction=reduction)
    fused = (form, scalar, first, second, fused_weighted_mtp_loss)
    if first != "head_weights" and wanted is not None:
        with pytest.raises(NotImplementedError, match=NO_SECOND):
            twice(*fused, reduction=reduction)
        return
    found = twice(*fused, reduction=reduction)
    assert (found is None) == (wanted is None or not wanted.any())
    if found is not None:
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", FUSED_ON_CPU)
def test_weights_that_are_pushed_by_their_own_gradient(backend):
    """(loss + 10 |dloss/da|^2).backward(), with its part through the weights' gradient."""
    case = make_case((B, S, H, V))

    def gradients(dtype, **options):
        leaves = make_leaves(dtype)
        x, a = leaves["logits"], leaves["head_weights"]
        loss = fused_weighted_mtp_loss(x, case.target_ids, a.softmax(-1), **options).loss
        (slope,) = torch.autograd.grad(loss, a, create_graph=True)
        (loss + 10 * slope.square().sum()).backward()
        return x.grad, a.grad

    wanted = gradients(torch.float64, backend="eager")
    for ours, truth in zip(gradients(torch.float32, backend=backend), wanted, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-6)


def test_the_logits_are_gone_in_place():
    leaves, case = make_leaves(), make_case((B, S, H, V))
    loss = of_tensor(fused_weighted_mtp_loss, leaves, case.target_ids, inplace=True).loss
    with pytest.raises(RuntimeError, match=r"inplace=True .* pass inplace=False"):
        torch.autograd.grad(loss, leaves["head_weights"], create_graph=True)
