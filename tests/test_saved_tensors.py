"""Whoever packs what is saved for backward: checkpointing of both kinds, and offloading.

Every form of the loss, learning weights included, has the gradients that it has without.
"""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from support.agreement import make_case
from support.covering import in_pairs
from wmtp import fused_linear_weighted_mtp_loss, fused_weighted_mtp_loss
from wmtp.benchmarks.memory import peak_bytes
from wmtp.reference import compute_weighted_mtp_loss

pytestmark = pytest.mark.usefixtures("one_thread")
B, S, H, D, V = 2, 7, 3, 8, 41
NOT_TWICE = r"inplace=True .* pass inplace=False to go backward twice"


def offloaded(function, *inputs):
    with torch.autograd.graph.save_on_cpu():
        return function(*inputs)


PACKERS = {
    "no": lambda function, *inputs: function(*inputs),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "offload": offloaded,
}
LOGITS = {
    "tensor": lambda rows: rows,
    "list": lambda rows: [rows[:, :, k] * 1 for k in range(H)],
    "shared": lambda rows: rows[:, :, :1].expand(-1, -1, H, -1),
}


def logits_loss(form, case, leaves, **more):
    rows, *weights = leaves
    logits = LOGITS[form](rows * 1)
    options = {**case.options, **more, **dict(zip(["head_weights"], weights, strict=False))}
    return fused_weighted_mtp_loss(logits, case.target_ids, **options).loss


def linear_loss(form, case, leaves, **more):
    hidden, lm_head, *weights = leaves
    options = {**case.options, **more, **dict(zip(["head_weights"], weights, strict=False))}
    del options["inplace"]
    return fused_linear_weighted_mtp_loss(hidden * 1, lm_head, case.target_ids, **options).loss


def true_gradients(form, case, leaves):
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    if form == "linear":
        logits, weights = exact[0] @ exact[1].T, exact[2:]
    else:
        logits, weights = LOGITS[form](exact[0]), exact[1:]
    logits = torch.stack(logits, 2) if form == "list" else logits
    options = {**case.cast(torch.float64).options}
    options.update(zip(["head_weights"], weights, strict=False))
    loss = compute_weighted_mtp_loss(logits, case.target_ids, horizon=H, **options).loss
    return torch.autograd.grad(-1.5 * loss, exact)


def make_problem(form, weighting):
    case = make_case((B, S, H, V), weighting="ref_ce" if weighting == "ref_ce" else "given")
    leaves = [case.logits]
    if form == "linear":
        leaves = [torch.randn(B, S, H, D), torch.randn(V, D)]
    if weighting == "learning":
        leaves.append(case.options.pop("head_weights"))
    return case, [leaf.requires_grad_() for leaf in leaves]


@in_pairs(
    packer=PACKERS,
    weighting=["constant", "learning", "ref_ce"],
    form=[*LOGITS, "linear"],
    inplace=[False, True],
    # The linear op has no logits to overwrite.
    where=lambda packer, weighting, form, inplace: not (form == "linear" and inplace),
)
def test_gradients_are_those_without(packer, weighting, form, inplace):
    case, leaves = make_problem(form, weighting)
    loss_of = linear_loss if form == "linear" else logits_loss
    wanted = true_gradients(form, case, leaves)
    loss = PACKERS[packer](lambda *some: loss_of(form, case, some, inplace=inplace), *leaves)
    (-1.5 * loss).backward(retain_graph=True)
    for leaf, truth in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad.double(), truth, rtol=1e-5, atol=1e-6)

    if packer in ("reentrant", "non-reentrant"):
        return  # a second backward computes all of it again, the logits too
    if inplace:
        with pytest.raises(RuntimeError, match=NOT_TWICE):
            (-1.5 * loss).backward()
        return
    (-1.5 * loss).backward()
    for leaf, truth in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad.double(), 2 * truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["tensor", "list"])
def test_checkpointed_chunks_take_a_chunk_and_its_gradient(form):
    """Of unembedding and loss: neither the logits nor the gradients of the others are held."""
    chunks, length, vocabulary = 8, 128, 4000
    hidden = torch.randn(1, chunks * length, 2, 16, requires_grad=True)
    lm_head = torch.randn(vocabulary, 16, requires_grad=True)
    target_ids = torch.randint(vocabulary, (1, chunks * length))
    all_logits = chunks * length * 2 * vocabulary * 4

    def loss_of(hidden, target_ids):
        logits = hidden @ lm_head.T
        logits = logits.unbind(2) if form == "list" else logits
        return fused_weighted_mtp_loss(logits, target_ids, reduction="sum").loss

    def step():
        parts = zip(hidden.split(length, 1), target_ids.split(length, 1), strict=True)
        losses = [checkpoint(loss_of, *part, use_reentrant=False) for part in parts]
        torch.autograd.grad(sum(losses), (hidden, lm_head))

    step()
    assert peak_bytes(step) <= 0.40 * all_logits
