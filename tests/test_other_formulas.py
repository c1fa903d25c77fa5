"""Other libraries' multi-token losses, by their formulas written out here, and the one call of ours
that is the same number and gradient: "theirs -> our call". `pytest -rP` of this file prints by how
much they differ.

B batch, S sequence, H heads or depths, V vocabulary. Each formula is of what that library's trainer
hands over: labels shifted or not, masks, positions.
"""

import pytest
import torch
import torch.nn.functional as F

from support.agreement import relative_error
from wmtp import fused_weighted_mtp_loss, loss_denominator
from wmtp.benchmarks.memory import peak_bytes

B, S, H, V = 2, 7, 3, 19
IGNORED = -100
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def logits():
    return torch.randn(B, S, H, V, requires_grad=True)


@pytest.fixture
def ids():
    """[B, S + 1]: what inputs and labels are cut from."""
    return torch.randint(V, (B, S + 1))


def ce_of(logits, labels, reduction="sum"):
    flat = logits.flatten(0, -2).float(), labels.flatten()
    return F.cross_entropy(*flat, reduction=reduction, ignore_index=IGNORED)


def assert_same(ours, theirs, leaf):
    (found,), (wanted,) = torch.autograd.grad(ours, leaf), torch.autograd.grad(theirs, leaf)
    of_loss, of_gradient = relative_error(ours, theirs), relative_error(found, wanted)
    print(f"largest difference / largest entry: loss {of_loss:.0e}, gradient {of_gradient:.0e}")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def rolled(labels, depth, fill=IGNORED):
    """Labels of a depth further on: left by one for each, the end filled."""
    return F.pad(labels[:, depth:], (0, depth), value=fill)


# torchtitan: labels are shifted already; depth k's are rolled k further; the loss is
# main / N + scale * sum_k depth_k / (N * depths), N the valid tokens of the whole step.


def torchtitan(preds, labels, scale, tokens):
    main = ce_of(preds[0], labels) / tokens
    depths = sum(ce_of(pred, rolled(labels, k)) for k, pred in enumerate(preds[1:], 1))
    return main + scale * depths / (tokens * (len(preds) - 1))


@pytest.mark.parametrize("listed", [False, True])
def test_torchtitan(listed, logits, ids):
    labels, scale = ids[:, 1:].clone(), 0.3
    labels[0, 2] = IGNORED
    tokens = float((labels != IGNORED).sum()) * 4  # of all ranks
    theirs = torchtitan(list(logits.unbind(2)), labels, scale, tokens)
    prior = torch.tensor([1.0, scale / (H - 1), scale / (H - 1)])
    ours = fused_weighted_mtp_loss(
        list(logits.unbind(2)) if listed else logits,
        labels,
        shifted=True,
        head_prior=prior,
        reduction="sum",
        normalizer=tokens,
    ).loss
    assert_same(ours, theirs, logits)


def test_torchtitan_of_flat_tokens(logits, ids):
    """[T, V] a depth, and labels [T] rolled by the trainer: one row, each head its own labels."""
    labels = ids[:1, 1:]
    per_depth = [rolled(labels, k) for k in range(H)]
    preds = [logits[0, :, k] for k in range(H)]
    tokens = float(S)
    theirs = ce_of(preds[0], per_depth[0]) / tokens
    theirs = theirs + 0.1 * sum(
        ce_of(pred, own) for pred, own in zip(preds[1:], per_depth[1:], strict=True)
    ) / (tokens * (H - 1))
    ours = fused_weighted_mtp_loss(
        [pred[None] for pred in preds],
        per_depth,
        head_prior=torch.tensor([1.0, 0.05, 0.05]),
        reduction="sum",
        normalizer=tokens,
    ).loss
    assert_same(ours, theirs, logits)


# Megatron: labels shifted, a float loss_mask that is rolled with them; per depth
# scale / depths * sum(mask ce) / max(sum mask, 1), beside the main loss sum(mask ce) / sum mask.


def megatron(logits, labels, mask, scale, *, per_token):
    losses = []
    for k in range(logits.shape[2]):
        own, kept = rolled(labels, k, 0), rolled(mask, k, 0.0)
        ce = ce_of(logits[:, :, k], own, "none").view(own.shape)
        weight = 1.0 if k == 0 else scale / (logits.shape[2] - 1)
        divisor = 1.0 if per_token else kept.sum().clamp(min=1)
        losses.append(weight * (kept * ce).sum() / divisor)
    return sum(losses)


MASKS = {
    "none": torch.ones(B, S),
    "binary": (torch.arange(B * S).view(B, S) % 3 > 0).float(),
    "fractional": torch.linspace(0, 2, B * S).view(B, S),
    "zero": torch.zeros(B, S),
}


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_megatron(mask, per_token, logits, ids):
    labels, scale = ids[:, 1:], 0.1
    theirs = megatron(logits, labels, mask, scale, per_token=per_token)
    prior = torch.tensor([1.0, scale / 2, scale / 2])
    how = {"shifted": True, "target_mask": mask, "head_prior": prior}
    counts = loss_denominator(labels, H, reduction="head_mean", shifted=True, target_mask=mask)
    divisor = {"reduction": "head_mean", "normalizer": counts.clamp(min=1)}
    ours = fused_weighted_mtp_loss(
        logits, labels, **how, **({"reduction": "sum"} if per_token else divisor)
    ).loss
    assert_same(ours, theirs, logits)


def test_megatron_packed(logits, ids):
    """Rows of several documents: rolling does not cross, head 0 is the caller's to mask."""
    labels = ids[:, 1:]
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 2, 2]])
    theirs = 0.0
    for b in range(B):
        for t in range(S):
            for k in range(H):
                if t + k < S and documents[b, t] == documents[b, t + k]:
                    theirs = theirs + F.cross_entropy(logits[b, t, k], labels[b, t + k])
    ours = fused_weighted_mtp_loss(
        logits, labels, shifted=True, document_ids=documents, reduction="sum"
    ).loss
    assert_same(ours, theirs, logits)


# NeMo-Automodel: a list of labels, one per depth, shifted before; scale / depths * mean of each.


def test_automodel(logits, ids):
    per_depth = [rolled(ids[:, 1:], k) for k in range(H)]
    scale, tokens = 0.1, 11.0
    theirs = (
        scale / H * sum(ce_of(logits[:, :, k], own) / tokens for k, own in enumerate(per_depth))
    )
    ours = fused_weighted_mtp_loss(
        logits,
        per_depth,
        head_prior=torch.full((H,), scale / H),
        reduction="sum",
        normalizer=tokens,
    ).loss
    assert_same(ours, theirs, logits)


# modded-nanogpt: the same logits are asked for several targets, the k-th with a weight that decays;
# the sum over tokens, and a token's prefix may be one of the targets.


def test_modded_nanogpt(ids):
    row = torch.randn(B, S, 1, V, requires_grad=True)
    weights = torch.tensor([1.0, 0.5, 0.25])
    theirs = sum(
        weight * ce_of(row[:, :, 0], rolled(ids[:, 1:], k)) for k, weight in enumerate(weights)
    )
    shared = row.expand(-1, -1, H, -1)
    ours = fused_weighted_mtp_loss(shared, ids[:, 1:], weights, shifted=True, reduction="sum").loss
    assert_same(ours, theirs, row)
    prefix = ids[:, 1:] // 2  # of the next token, say
    theirs = ce_of(row[:, :, 0], ids[:, 1:]) + 0.3 * ce_of(row[:, :, 0], prefix)
    two = row.expand(-1, -1, 2, -1)
    ours = fused_weighted_mtp_loss(
        two, [ids[:, 1:], prefix], torch.tensor([1.0, 0.3]), reduction="sum"
    ).loss
    assert_same(ours, theirs, row)


# DeepSeek-V3 (arXiv 2412.19437, eq. 24 and 25): L = L_main + lambda / D sum_k L_MTP^k, each L^k the
# mean over the positions 2 + k .. T + 1.


def test_deepseek_v3(logits, ids):
    labels, weight = ids[:, 1:], 0.3
    means = [
        F.cross_entropy(logits[:, : S - k, k].flatten(0, 1), labels[:, k:].flatten())
        for k in range(H)
    ]
    theirs = means[0] + weight / (H - 1) * sum(means[1:])
    prior = torch.tensor([1.0, weight / 2, weight / 2])
    ours = fused_weighted_mtp_loss(
        logits, labels, shifted=True, head_prior=prior, reduction="head_mean"
    ).loss
    assert_same(ours, theirs, logits)


# Hugging Face: labels beside the inputs, shifted inside; the sum over num_items_in_batch, which
# covers all micro-batches, or the mean where there is none (evaluation).


@pytest.mark.parametrize("items", [None, torch.tensor(31), 31])
def test_hugging_face(items, logits, ids):
    logits, labels = logits[:, :, :1], ids[:, :S].clone()
    labels[1, :3] = IGNORED
    shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    reduction = "mean" if items is None else "sum"
    theirs = ce_of(logits[:, :, 0], shifted, reduction) / (1 if items is None else items)
    leaf = torch.randn(B, S, 1, V, requires_grad=True)
    theirs = ce_of(leaf[:, :, 0], shifted, reduction) / (1 if items is None else items)
    ours = fused_weighted_mtp_loss(leaf, labels, reduction="pair_mean", normalizer=items).loss
    assert_same(ours, theirs, leaf)


def test_four_micro_batches_of_hugging_face(ids):
    """What gradient accumulation of 4 must be: the one big batch's loss and gradient."""
    leaf = torch.randn(8, S, H, V, requires_grad=True)
    labels = torch.randint(V, (8, S))
    labels[3:, 4:] = IGNORED
    whole = fused_weighted_mtp_loss(leaf, labels, reduction="pair_mean").loss
    parts = labels.split(2)
    items = sum(loss_denominator(part, H, reduction="pair_mean") for part in parts)
    summed = sum(
        fused_weighted_mtp_loss(rows, part, reduction="pair_mean", normalizer=items).loss
        for rows, part in zip(leaf.split(2), parts, strict=True)
    )
    assert_same(summed, whole, leaf)


FORMS = {
    "plain": {},
    "longer": {"ids": (1, 68)},
    "shifted": {"shifted": True},
    "documents": {"document_ids": torch.arange(64)[None] // 9},
    "masks": {"target_mask": torch.rand(1, 64) > 0.2, "position_mask": torch.rand(1, 64) + 0.1},
    "own": {"ids": (1, 64, 4)},
}


def test_no_form_takes_more_memory_than_numbers_of_pairs():
    """Beyond the plain call: what the pairs' labels and weights take, and nothing of V."""
    logits = torch.randn(1, 64, 4, 4000, requires_grad=True)
    pairs = 64 * 4

    def peak(form):
        how = dict(FORMS[form])
        ids = torch.randint(4000, how.pop("ids", (1, 64)))

        def call():
            loss = fused_weighted_mtp_loss(logits, ids, **how, reduction="pair_mean").loss
            return torch.autograd.grad(loss, logits)

        call()
        return peak_bytes(call)

    plain = peak("plain")
    for form in FORMS:
        assert peak(form) - plain <= 64 * pairs, form
    row = logits.nbytes / pairs
    assert 64 * pairs < 2 * row  # that is less than two of 256 rows
