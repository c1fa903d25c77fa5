"""Gradients of some heads alone, and an unembedding for each head."""

import pytest
import torch

from support.covering import in_pairs
from wmtp import fused_linear_weighted_mtp_loss
from wmtp.reference import compute_weighted_mtp_loss
from wmtp.weightings import DPace, Excess, KeepTop

B, S, H, V, D = 2, 6, 3, 41, 8
REF = 4 * torch.rand(B, S - 1)
HEADS = {
    "all": (None, None),
    "one": ([0], [0]),
    "weight of one": (None, [0]),
    "overlapping": ([1, 2], [0, 1]),
    "apart": ([2], [0]),
    "hidden alone": (None, []),
    "weight alone": ([], [2, 0]),
}
FORMS = ["shared", "stacked", "listed", "expanded"]
RULES = {"uniform": None, "excess": Excess(REF), "keep": KeepTop(0.5), "pace": DPace()}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def leaves_of(form, dtype):
    """Hidden states, weight(s), bias(es)."""
    g = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=g).to(dtype).requires_grad_()

    hidden = random(B, S, H, D)
    if form in ("shared", "expanded"):
        return hidden, [random(V, D)], [random(V)]
    if form == "stacked":
        return hidden, [random(H, V, D)], [random(H, V)]
    return hidden, [random(V, D) for _ in range(H)], [random(V) for _ in range(H)]


def given(form, tensors):
    if form == "listed":
        return tensors
    return tensors[0].expand(H, *tensors[0].shape) if form == "expanded" else tensors[0]


def logits_by_hand(hidden, form, weights, biases, of_hidden, of_weight):
    """The gradient of a head that is not asked for meets a constant."""
    found = []
    for k in range(H):
        weight, bias = (
            tensors[k] if form == "listed" else tensors[0][k] if form == "stacked" else tensors[0]
            for tensors in (weights, biases)
        )
        x = hidden[:, :, k]
        x = x if of_hidden is None or k in of_hidden else x.detach()
        if of_weight is not None and k not in of_weight:
            weight, bias = weight.detach(), bias.detach()
        found.append(x @ weight.T + bias)
    return torch.stack(found, 2)


def gradients(loss, leaves):
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    pairs = zip(found, leaves, strict=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in pairs]


@in_pairs(
    form=FORMS,
    heads=HEADS,
    rule=RULES,
    dtype=list(TOLERANCE),
    chunk_bytes=[None, 4000],
)
def test_against_constants(form, heads, rule, dtype, chunk_bytes):
    (of_hidden, of_weight), rule = HEADS[heads], RULES[rule]
    hidden, weights, biases = leaves_of(form, dtype)
    ids = torch.randint(V, (B, S)).index_fill_(1, torch.tensor([2]), -100)
    how = {"weighting": rule, "reduction": "pair_mean"}
    ours = fused_linear_weighted_mtp_loss(
        hidden,
        given(form, weights),
        ids,
        lm_head_bias=given(form, biases),
        hidden_grad_heads=of_hidden,
        weight_grad_heads=of_weight,
        chunk_bytes=chunk_bytes,
        **how,
    )
    exact = [
        [tensor.detach().double().requires_grad_() for tensor in tensors]
        for tensors in ([hidden], weights, biases)
    ]
    logits = logits_by_hand(exact[0][0], form, exact[1], exact[2], of_hidden, of_weight)
    truth = compute_weighted_mtp_loss(logits, ids, horizon=H, **how)
    tolerance = TOLERANCE[dtype]
    if isinstance(rule, KeepTop) and dtype in (torch.bfloat16, torch.float16):
        return  # rounding may rank pairs otherwise
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(B, S, H)
    for of_ce in (0.0, 1.0):
        found, wanted = (
            gradients(3 * result.loss + (of_ce * upstream * result.ce_per_head).sum(), [*each])
            for result, each in (
                (ours, (hidden, *weights, *biases)),
                (truth, (*exact[0], *exact[1], *exact[2])),
            )
        )
        for a, b in zip(found, wanted, strict=True):
            assert (a.double() - b).norm() <= tolerance * b.norm() + 1e-12
    if of_hidden is not None:
        others = [k for k in range(H) if k not in of_hidden]
        assert not torch.autograd.grad(ours.loss, hidden)[0][:, :, others].any()


def test_eager_says_the_same():
    hidden, weights, biases = leaves_of("stacked", torch.float64)
    ids = torch.randint(V, (B, S))
    how = {"lm_head_bias": biases[0], "hidden_grad_heads": [1], "weight_grad_heads": [0, 2]}
    losses = [
        fused_linear_weighted_mtp_loss(hidden, weights[0], ids, backend=backend, **how).loss
        for backend in ("cpu", "eager")
    ]
    torch.testing.assert_close(*losses)
    found, wanted = (gradients(loss, [hidden, weights[0], biases[0]]) for loss in losses)
    torch.testing.assert_close(found, wanted)


def test_products_of_the_others_are_skipped(monkeypatch):
    """Counted in rows: the logits of all, the gradients of some."""
    rows = []
    mm, addmm = torch.mm, torch.addmm

    def watched(product):
        def counted(*operands, **more):
            rows.append(tuple(operand.shape for operand in operands[-2:]))
            return product(*operands, **more)

        return counted

    monkeypatch.setattr(torch, "mm", watched(mm))
    monkeypatch.setattr(torch, "addmm", watched(addmm))
    hidden, weights, _ = leaves_of("shared", torch.float32)
    ids = torch.randint(V, (B, S))
    how = {"hidden_grad_heads": [0], "weight_grad_heads": [0]}
    fused_linear_weighted_mtp_loss(hidden, weights[0], ids, **how).loss.backward()
    every, of_head = B * (5 + 4 + 3), B * 5
    assert rows == [
        ((every, D), (D, V)),
        ((of_head, V), (V, D)),
        ((V, of_head), (of_head, D)),
    ]


@pytest.mark.parametrize("form", ["shared", "stacked"])
def test_compiled_and_checkpointed(form):
    hidden, weights, _ = leaves_of(form, torch.float32)
    ids = torch.randint(V, (B, S))

    def loss_of(x, weight):
        how = {"hidden_grad_heads": [0, 1], "weight_grad_heads": [0]}
        return fused_linear_weighted_mtp_loss(x, weight, ids, **how).loss

    wanted = gradients(loss_of(hidden, weights[0]), [hidden, weights[0]])
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    checkpoint = torch.utils.checkpoint.checkpoint
    for loss in (
        compiled(hidden, weights[0]),
        checkpoint(loss_of, hidden, weights[0], use_reentrant=False),
    ):
        found = torch.autograd.grad(loss, [hidden, weights[0]])
        torch.testing.assert_close(list(found), wanted)


def test_gradcheck():
    hidden, weights, biases = leaves_of("stacked", torch.float64)
    ids = torch.randint(V, (B, S))

    def loss_of(x, weight, bias):
        return fused_linear_weighted_mtp_loss(x, weight, ids, lm_head_bias=bias).loss

    small = (hidden[:, :4].detach().requires_grad_(), weights[0], biases[0])
    ids = ids[:, :4]
    assert torch.autograd.gradcheck(loss_of, small, fast_mode=True)


BAD = {
    "range": ({"hidden_grad_heads": [3]}, ValueError, "hidden_grad_heads must be in 0 .. 2, got 3"),
    "negative": ({"weight_grad_heads": [-1]}, ValueError, "each of weight_grad_heads must be"),
    "twice": ({"weight_grad_heads": [1, 1]}, ValueError, "must name no head twice"),
    "broken": ({"hidden_grad_heads": [0.5]}, ValueError, "each of hidden_grad_heads must be"),
    "no list": ({"hidden_grad_heads": 0}, TypeError, "must be a list of heads, got 0"),
    "too few": ({"lm_head_weight": [torch.ones(V, D)] * 2}, ValueError, "one for each of H = 3"),
    "unlike": (
        {"lm_head_weight": [torch.ones(V, D)] * 2 + [torch.ones(V + 1, D)]},
        ValueError,
        "must be alike",
    ),
    "shape": ({"lm_head_weight": torch.ones(2, V, D)}, ValueError, "lm_head_weight must be"),
    "bias": (
        {"lm_head_weight": torch.ones(H, V, D), "lm_head_bias": torch.ones(V)},
        ValueError,
        "lm_head_bias must be",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_heads(name):
    changed, error, message = BAD[name]
    arguments = {"lm_head_weight": torch.ones(V, D), **changed}
    with pytest.raises(error, match=message):
        fused_linear_weighted_mtp_loss(
            torch.ones(B, S, H, D), target_ids=torch.zeros(B, S).long(), **arguments
        )
