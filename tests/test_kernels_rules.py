"""The rules' Triton twins in every tier, against the fp64 truth: weights, loss and gradient."""

import pytest
import torch

from support.agreement import correctly_rounded
from support.covering import in_pairs
from wmtp import fused_weighted_mtp_loss
from wmtp.kernels import tiers
from wmtp.reference import compute_weighted_mtp_loss
from wmtp.weightings import DFT, DPace, EntropyGate, Excess, Focal, Given

B, S, H = 1, 4, 3
REF, GIVEN = 6 * torch.rand(B, S - 1), torch.rand(B, S, H)
RULES = {
    "dft": lambda on: DFT(),
    "focal": lambda on: Focal(1.5),
    "focal, 0": lambda on: Focal(0.0),
    "gate": lambda on: EntropyGate(0.7),
    "pace": lambda on: DPace(0.3, first=1),
    "centered": lambda on: Excess(REF.to(on), center=torch.arange(3.0, device=on)),
    "gate x pace": lambda on: EntropyGate() * DPace(),
    "excess x dft": lambda on: Excess(REF.to(on)) * DFT(),
    "given x focal": lambda on: Given(GIVEN.to(on)) * Focal(),
}


@pytest.fixture
def forced(request, monkeypatch):
    """The tier; "split": online, of a device with more processors than rows."""
    tier = request.param
    if tier == "split":
        machine = tiers.machine
        monkeypatch.setattr(tiers, "machine", lambda on: machine(on)._replace(processors=64))
    wanted = {"split": "online", "registers": ""}.get(tier, tier)
    monkeypatch.setenv("WMTP_TRITON_TIER", wanted)
    return tier


@in_pairs(
    name=RULES,
    forced=["registers", "online", "split"],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    layout=["new", "shared", "in place"],
)
def test_twins(device, name, forced, dtype, layout):
    vocabulary = 16_400 if forced == "split" else 1001
    rule, exact_rule = RULES[name](device), RULES[name]("cpu")
    logits = (3 * torch.randn(B, S, 1 if layout == "shared" else H, vocabulary)).to(dtype)
    ids = torch.randint(vocabulary, (B, S))
    ids[0, 2] = -100
    how = {"reduction": "pair_mean", "metrics": True}
    leaf = logits.to(device).requires_grad_()
    heads = leaf.expand(B, S, H, vocabulary) if layout == "shared" else leaf * 1
    ours = fused_weighted_mtp_loss(
        heads, ids.to(device), weighting=rule, backend="triton", inplace=layout == "in place", **how
    )
    exact = logits.double().requires_grad_()
    truth = compute_weighted_mtp_loss(
        exact.expand(B, S, H, vocabulary), ids, weighting=exact_rule, horizon=H, **how
    )
    torch.testing.assert_close(ours.loss.double().cpu(), truth.loss, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(
        ours.metrics.weights.double().cpu(), truth.metrics.weights.double(), rtol=2e-4, atol=2e-6
    )
    (found,) = torch.autograd.grad(ours.loss, leaf)
    (wanted,) = torch.autograd.grad(truth.loss, exact)
    unit = {torch.float32: 2e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    subnormal = 2.0**-24 if dtype == torch.float16 else 0.0  # nothing scales this loss
    allowed = unit * wanted.abs().max() + subnormal
    assert (found.double().cpu() - wanted).abs().max() <= allowed
    if dtype == torch.bfloat16 and layout != "shared" and "excess" not in name:
        assert correctly_rounded(found.cpu(), wanted) >= 0.98


@pytest.mark.parametrize("name", RULES)
def test_certain_and_hopeless_predictions(device, name):
    """Cross entropies of 0 and of 1000, an entropy of 0, and NaN, which surfaces."""
    vocabulary = 200
    logits = torch.zeros(B, S, H, vocabulary)
    ids = torch.tensor([[0, 3, 5, 7]])
    logits[0, 0, :, 3] = 1000.0
    logits[0, 1, 0, 9] = 1000.0
    how = {"reduction": "pair_mean", "metrics": True}
    for spoiled in (False, True):
        if spoiled:
            logits[0, 1, 1, 0] = float("nan")
        ours = fused_weighted_mtp_loss(
            logits.to(device),
            ids.to(device),
            weighting=RULES[name](device),
            backend="triton",
            **how,
        )
        truth = compute_weighted_mtp_loss(
            logits, ids, weighting=RULES[name]("cpu"), horizon=H, **how
        )
        torch.testing.assert_close(
            ours.metrics.weights.cpu(), truth.metrics.weights, rtol=1e-4, atol=1e-6, equal_nan=True
        )
        torch.testing.assert_close(
            ours.loss.cpu(), truth.loss, rtol=2e-5, atol=1e-5, equal_nan=True
        )
        assert ours.loss.isnan() == spoiled
