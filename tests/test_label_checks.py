"""What is said of labels, masks and divisors that cancel, or that are none."""

from dataclasses import replace

import pytest
import torch

from support.batches import draw
from wmtp import (
    fused_weighted_mtp_loss,
    next_token_cross_entropy,
    once,
)
from wmtp.reference import compute_weighted_mtp_loss
from wmtp.weightings import Critic, Uniform

V, D = 17, 5
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:token_mean divides"),
]
FLOATS, ONES = torch.rand(1, 6), torch.tensor([[1.0, 1, 0, 1, 1, 0]])
SAID = "what a float mask says of a position cancels"


@pytest.mark.parametrize(
    ("heads", "how", "message"),
    [
        (2, {"position_mask": FLOATS}, SAID),
        (2, {"target_mask": FLOATS, "reduction": "token_mean"}, SAID),
        (1, {"target_mask": FLOATS}, SAID),
        (1, {"position_mask": FLOATS[..., None]}, SAID),
        (1, {"head_weights": FLOATS[..., None]}, "with one head Given cancels"),
        (1, {"weighting": Critic(FLOATS)}, "with one head Critic cancels"),
        (2, {"target_mask": FLOATS}, None),
        (2, {"position_mask": FLOATS[..., None].expand(1, 6, 2)}, None),
        (2, {"position_mask": FLOATS, "reduction": "pair_mean"}, None),
        (2, {"position_mask": ONES, "reduction": "token_mean"}, None),
        (1, {"position_mask": ONES > 0, "target_mask": ONES}, None),
        (1, {"head_weights": ONES[..., None]}, None),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_cancels_is_said(monkeypatch, heads, how, message):
    monkeypatch.setattr(once, "_said", set())
    logits, ids = torch.randn(1, 6, heads, V), torch.randint(V, (1, 6))
    if message is None:
        fused_weighted_mtp_loss(logits, ids, **how)
        return
    with pytest.warns(RuntimeWarning, match=message) as said:
        fused_weighted_mtp_loss(logits, ids, **how)
    assert said[0].filename == __file__


@pytest.mark.filterwarnings("error:token_mean divides")
def test_compiled_code_says_nothing_of_it(monkeypatch):
    monkeypatch.setattr(once, "_said", set())
    logits, ids = torch.randn(1, 6, 2, V), torch.randint(V, (1, 6))

    def loss(logits):
        return fused_weighted_mtp_loss(logits, ids, position_mask=FLOATS).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(logits)
    assert not once._said
    plain = fused_weighted_mtp_loss(logits, ids, position_mask=FLOATS > 0).loss
    torch.testing.assert_close(compiled, plain)


def test_negative_weights_where_nothing_divides(target):
    backend, device = target
    case = replace(draw(3), rule=Uniform())
    weights = torch.randn(2, 6, 3)
    logits, ids = torch.randn(2, 6, 3, V), torch.randint(V, (2, 6))
    assert case.rule.known
    for how in (
        {"reduction": "sum"},
        {"reduction": "pair_mean"},
        {"reduction": "head_mean"},
        {"reduction": "weight_mean", "normalizer": 4.0},
    ):
        leaf = logits.to(device).requires_grad_()
        found = fused_weighted_mtp_loss(
            leaf, ids.to(device), weights.to(device), backend=backend, **how
        )
        exact = logits.double().requires_grad_()
        truth = compute_weighted_mtp_loss(exact, ids, weights, 3, **how)
        torch.testing.assert_close(found.loss.double().cpu(), truth.loss, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.valid_mask.cpu(), truth.valid_mask)
        (wanted,) = torch.autograd.grad(truth.loss, exact)
        (gradient,) = torch.autograd.grad(found.loss, leaf)
        torch.testing.assert_close(gradient.double().cpu(), wanted, rtol=1e-5, atol=1e-6)
    for how in ({"reduction": "token_mean"}, {"reduction": "weight_mean"}):
        with pytest.raises(ValueError, match=r"finite and >= 0, for their sum divides the loss"):
            fused_weighted_mtp_loss(logits, ids, weights, backend="eager", **how)


BAD = {
    "shifted with own": (
        dict(target_ids=torch.zeros(2, 6, 3).long(), shifted=True),
        "shifted goes",
    ),
    "too few offsets": (
        dict(offsets=[1, 2]),
        r"offsets must be H = 3 whole numbers >= 1 .*, got \(1, 2",
    ),
    "an offset of 0": (dict(offsets=[0, 1, 2]), "offsets must be H = 3"),
    "a mask's shape": (
        dict(target_mask=torch.ones(2, 5)),
        r"target_mask must be \[B, T\] = \(2, 6\)",
    ),
    "a position's": (dict(position_mask=torch.ones(2, 6, 2)), r"position_mask must be \[B, S, H\]"),
    "a negative mask": (dict(position_mask=-torch.ones(2, 6)), r"position_mask\[0, 0\] is -1.0"),
    "documents": (dict(document_ids=torch.zeros(2, 7).long()), r"document_ids must be \[B, T\]"),
    "normalizer [H]": (
        dict(normalizer=torch.ones(3), reduction="sum"),
        "goes with reduction='head_",
    ),
    "T < S": (dict(target_ids=torch.zeros(2, 5).long()), r"target_ids must be \[B, T >= S\]"),
    "[:, 1:]": (
        dict(target_ids=torch.zeros(2, 5).long()),
        r"labels ids\[:, 1:\] with shifted=True",
    ),
    "a negative integer": (
        dict(position_mask=torch.tensor([1, 1, 1, 1, 1, -1]).expand(2, 6)),
        r"position_mask\[0, 5\] is -1: entries must be finite and >= 0",
    ),
    "a mask that learns": (
        dict(target_mask=torch.ones(2, 6, requires_grad=True)),
        "target_mask must be a constant",
    ),
    "a negative normalizer": (
        dict(normalizer=torch.tensor([1, -1, 1]), reduction="head_mean"),
        r"normalizer must be finite and >= 0, got \[1, -1, 1\]",
    ),
    "no normalizer": (
        dict(normalizer=torch.tensor([1.0, float("nan"), 1]), reduction="head_mean"),
        "normalizer must be finite and >= 0",
    ),
    "far offsets": (dict(offsets=[1, 2, 2**63]), "offsets must be H = 3 whole numbers >= 1"),
    "documents of the inputs": (
        dict(target_ids=torch.zeros(2, 7).long(), document_ids=torch.zeros(2, 6).long()),
        r"append those of the 1 tokens beyond the input, e.g. torch.cat\(\(document_ids",
    ),
    "labels of one row": (dict(target_ids=[torch.zeros(6).long()] * 3), r"3 tensors \[B, S\]"),
    "a prior that learns": (
        dict(head_prior=torch.ones(3, requires_grad=True)),
        "must be a constant",
    ),
    "a negative prior": (dict(head_prior=-torch.ones(3)), "head_prior must be finite and >= 0"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("function", [fused_weighted_mtp_loss, compute_weighted_mtp_loss])
def test_bad_targets(bad, message, function):
    arguments = {"logits": torch.randn(2, 6, 3, V), "target_ids": torch.zeros(2, 6).long(), **bad}
    if function is compute_weighted_mtp_loss:
        arguments["horizon"] = 3
    with pytest.raises(ValueError, match=message):
        function(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_documents_are_integers(dtype):
    logits, ids = torch.randn(1, 6, 2, V), torch.randint(V, (1, 6))
    with pytest.raises(TypeError, match=r"document_ids must hold .*: pass document_ids.long\(\)"):
        fused_weighted_mtp_loss(logits, ids, document_ids=ids.to(dtype))


def test_logits_that_lack_an_axis():
    ids = torch.randint(V, (6,))
    with pytest.raises(ValueError, match=r"if they are \[N, H, V\], with logits\[None\]"):
        fused_weighted_mtp_loss(torch.randn(6, 2, V), ids)
    with pytest.raises(ValueError, match=r"pass logits\[None, :, None\] and target_ids\[None\]"):
        fused_weighted_mtp_loss(torch.randn(6, V), ids)
    with pytest.raises(ValueError, match=r"or logits\[None\], if they are \[T, V\]"):
        next_token_cross_entropy(torch.randn(6, V), ids)
