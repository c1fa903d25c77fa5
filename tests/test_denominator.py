"""What a loss divides by, and that the parts of a batch add up to the batch."""

import pytest
import torch
import torch.distributed as dist

from support.covering import in_pairs
from support.tiny_runs import in_processes
from wmtp import fused_linear_weighted_mtp_loss, fused_weighted_mtp_loss, loss_denominator
from wmtp.weightings import Critic, Excess, Uniform

V = 13
DIVIDED = ("token_mean", "weight_mean", "pair_mean", "head_mean")
pytestmark = pytest.mark.usefixtures("one_thread")


def batch(rows=8, seed=0):
    """Four micro-batches of two rows: of all targets, few, none, and half of them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 6, 3, V, generator=generator, dtype=torch.float64)
    ids = torch.randint(V, (rows, 6), generator=generator)
    ids[2:4, 2:] = -100
    ids[4:6] = -100
    ids[6:, ::2] = -100
    return logits, ids


def rules(rows):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    ref_ce = torch.rand(8, 5, generator=generator, dtype=torch.float64)
    weights = torch.rand(8, 6, 3, generator=generator, dtype=torch.float64)
    return {
        "uniform": {},
        "given": {"head_weights": weights[rows]},
        "excess": {"weighting": Excess(ref_ce[rows])},
        "critic": {"weighting": Critic(values[rows])},
    }


def masks(rows):
    generator = torch.Generator().manual_seed(2)
    return {"position_mask": torch.rand(8, 6, generator=generator)[rows]}


WHOLE = slice(None)
PARTS = [slice(first, first + 2) for first in range(0, 8, 2)]


@in_pairs(op=["logits", "linear"], masked=[False, True], name=rules(WHOLE), reduction=DIVIDED)
def test_four_unequal_micro_batches_are_the_batch(op, masked, name, reduction):
    logits, ids = batch()
    states = logits if op == "logits" else torch.randn(8, 6, 3, 5, dtype=torch.float64)
    weight = torch.randn(V, 5, dtype=torch.float64, requires_grad=True)

    def of(rows):
        return {**rules(rows)[name], **(masks(rows) if masked else {}), "reduction": reduction}

    def loss(rows, leaf, **how):
        if op == "logits":
            return fused_weighted_mtp_loss(leaf[rows], ids[rows], **how).loss
        return fused_linear_weighted_mtp_loss(leaf[rows], weight, ids[rows], **how).loss

    needs_ce = name == "excess" and masked and reduction in ("token_mean", "weight_mean")
    if needs_ce:
        with pytest.raises(ValueError, match="which follow from the cross entropies: name pair_m"):
            loss_denominator(ids, 3, **of(WHOLE))
        return
    leaf = states.clone().requires_grad_()
    leaves = (leaf,) if op == "logits" else (leaf, weight)
    whole = loss(WHOLE, leaf, **of(WHOLE))
    wanted = torch.autograd.grad(whole, leaves)
    divisor = sum(loss_denominator(ids[rows], 3, **of(rows)) for rows in PARTS)
    torch.testing.assert_close(divisor, loss_denominator(ids, 3, **of(WHOLE)))
    parts = sum(loss(rows, leaf, normalizer=divisor, **of(rows)) for rows in PARTS)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)
    for found, expected in zip(torch.autograd.grad(parts, leaves), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def _rank(folder, reduction):
    rank = dist.get_rank()
    logits, ids = batch()
    rows = PARTS[3] if rank == 0 else PARTS[2]  # of which one has no target
    divisor = loss_denominator(ids[rows], 3, reduction=reduction)
    dist.all_reduce(divisor)
    leaf = logits[rows].clone().requires_grad_()
    loss = fused_weighted_mtp_loss(leaf, ids[rows], reduction=reduction, normalizer=divisor).loss
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.save((total, leaf.grad), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("reduction", ["token_mean", "head_mean"])
def test_two_processes_are_the_batch(reduction, tmp_path):
    assert in_processes(2, _rank, tmp_path, reduction) == [0, 0]
    logits, ids = batch()
    leaf = logits[4:].clone().requires_grad_()
    loss = fused_weighted_mtp_loss(leaf, ids[4:], reduction=reduction).loss
    loss.backward()
    of_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(of_rank[0][0], loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat((of_rank[1][1], of_rank[0][1])), leaf.grad)


def test_numbers_by_hand():
    ids = torch.tensor([[1, 2, 3, -100]])  # head 0 has two targets, head 1 one
    assert loss_denominator(ids, 2).item() == 2
    assert loss_denominator(ids, 2, reduction="weight_mean").item() == 3
    assert loss_denominator(ids, 2, reduction="head_mean").tolist() == [2, 1]
    mask = torch.tensor([[1.0, 0.5, 0.25, 1.0]])  # of the targets
    how = {"target_mask": mask, "reduction": "pair_mean"}
    assert loss_denominator(ids, 2, **how).item() == 0.5 + 0.25 + 0.25
    prior = torch.tensor([1.0, 2.0])
    found = loss_denominator(ids, 2, reduction="weight_mean", head_prior=prior)
    assert found.item() == 2 + 2 * 1
    assert loss_denominator(ids, 2, length=2).item() == 2
    assert loss_denominator(ids, 2, length=1).item() == 1


def test_what_divides_by_nothing():
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="'sum' divides by nothing"):
        loss_denominator(ids, 2, reduction="sum")
    with pytest.raises(ValueError, match="reduction must be one of"):
        loss_denominator(ids, 2, weighting=Uniform(), reduction="mean")


def test_weights_that_the_loss_refuses():
    ids, weights = torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, 2)
    weights[0, 1, 0] = -1.0
    for reduction in ("token_mean", "weight_mean"):
        with pytest.raises(ValueError, match=r"head_weights\[0, 1, 0\] is -1.0"):
            loss_denominator(ids, 2, head_weights=weights, reduction=reduction)
    assert loss_denominator(ids, 2, head_weights=weights, reduction="pair_mean") == 5
    weights[0, 1, 0] = float("nan")
    for reduction in DIVIDED:
        with pytest.raises(ValueError, match=r"head_weights\[0, 1, 0\] is nan"):
            loss_denominator(ids, 2, head_weights=weights, reduction=reduction)


def test_no_labels_at_all():
    with pytest.raises(ValueError, match=r"target_ids must be H = 2 tensors \[B, S\], got \[\]"):
        loss_denominator([], 2)
