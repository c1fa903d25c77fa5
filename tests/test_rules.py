"""The library's rules: by hand, everywhere against the fp64 truth, and what they promise."""

import math
import warnings
from functools import partial

import pytest
import torch

from support.agreement import assert_agrees, loss_and_gradients, make_case
from support.covering import in_pairs
from wmtp import (
    backends,
    fused_linear_weighted_mtp_loss,
    fused_weighted_mtp_loss,
    kernels,
    loss_denominator,
    once,
)
from wmtp.reference import compute_weighted_mtp_loss
from wmtp.weightings import (
    DFT,
    Critic,
    Decay,
    DPace,
    EntropyGate,
    Excess,
    Focal,
    Given,
    Uniform,
)

SHAPE = (2, 5, 3, 33)
B, S, H, V = SHAPE
INF, NAN = float("inf"), float("nan")


def some(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(5))


REF = 6 * some(B, S - 1)
ALONE = {
    "dft": DFT(),
    "focal": Focal(),
    "focal, a root": Focal(torch.tensor(0.5)),
    "focal, 0": Focal(0.0),
    "gate": EntropyGate(),
    "gate, a root": EntropyGate(0.5),
    "pace": DPace(),
    "pace, from 1": DPace(0.25, first=1),
    "pace, of none": DPace(first=H),
}
SUMS_TO_ONE = {
    "centered": Excess(REF, center=some(H)),
    "centered, signed": Excess(REF, excess="signed", center=-some(H)),
    "standardized": Critic(some(B, S), standardize=True),
}
KNOWN = {
    "decay": Decay(0.5),
    "decay x given": Decay(0.5) * Given(some(B, S, H)),
    "critic x given": Critic(some(B, S)) * Given(some(H)),
}
PRODUCTS = {
    "dft x focal": DFT() * Focal(),
    "pace x decay": DPace() * Decay(0.7),
    "gate x pace x decay": EntropyGate() * DPace(0.3) * Decay(1.5),
    "three": DFT() * Focal(0.3) * DPace(),
    "excess x dft": Excess(REF) * DFT(),
    "given x dft": Given(some(B, S, H)) * DFT(),
}
RULES = {**ALONE, **SUMS_TO_ONE, **KNOWN, **PRODUCTS}
FOLLOWING = {name: rule for name, rule in RULES.items() if not rule.known}
# Of each kind one: what a twin computes in every tier is in test_kernels_rules.py.
INTERPRETED = ("dft", "gate", "pace", "centered", "excess x dft", "decay x given")
REDUCTIONS = ("token_mean", "weight_mean", "pair_mean", "head_mean", "sum")


@pytest.fixture(autouse=True)
def _said_before(monkeypatch):
    monkeypatch.setattr(once, "_said", set())


# ---- by hand ----


def weights_by_hand(rule, p, valid, entropy):
    """Of one token: lists by head."""
    heads = range(len(p))
    if isinstance(rule, DFT):
        found = list(p)
    elif isinstance(rule, Focal):
        found = [(1 - q) ** float(rule.gamma) for q in p]
    elif isinstance(rule, EntropyGate):
        found = [min(e / math.log(20), 1) ** float(rule.alpha) for e in entropy]
    else:
        drafts = [valid[k] and k >= rule.first for k in heads]
        steps = [(1 - rule.alpha) * p[k] + rule.alpha if drafts[k] else 1 for k in heads]
        reached = [math.prod(steps[: k + 1]) for k in heads]
        found = [
            sum(reached[j] for j in heads if drafts[j] and j >= k) if drafts[k] else 1
            for k in heads
        ]
    return [w if v else 0.0 for w, v in zip(found, valid, strict=True)]


@pytest.mark.parametrize("name", ALONE)
def test_weights_by_hand(name):
    rule = ALONE[name]
    ce, valid = 4 * some(7, 1, 4).double(), some(7, 1, 4) < 0.7
    ce[0], entropy = 0.0, 4 * some(7, 1, 4).double().flip(0)
    needs = {"entropy": entropy} if rule.needs else {}
    found = rule.weights(torch.where(valid, ce, 0.0), valid, **needs)
    for token in range(7):
        of_token = (ce[token, 0].neg().exp(), valid[token, 0], entropy[token, 0])
        wanted = weights_by_hand(rule, *(values.tolist() for values in of_token))
        assert found[token, 0].tolist() == pytest.approx(wanted, rel=1e-12)


def test_standardized_rises_by_hand():
    """Each position that a pair asks for once: 1, 3 and 4; nobody asks for 0, of 2 there is no
    label."""
    values, ids = torch.tensor([[5.0, 1.0, 2.0, 7.0, 4.0]]), torch.tensor([[1, 2, -100, 3, 4]])
    rise = [5.0, 1 - 5.0, 2 - 1.0, 7 - 2.0, 4 - 7.0]
    asked = [rise[1], rise[3], rise[4]]
    mean = sum(asked) / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in asked) / 3)
    score = [(x - mean) / (deviation + 1e-8) for x in rise]
    rule = Critic(values, discount=1.0, temperature=1.0, standardize=True)
    result = fused_weighted_mtp_loss(torch.zeros(1, 5, 2, 6), ids, weighting=rule, metrics=True)
    both = [math.exp(score[3]), math.exp(score[4])]
    wanted = [[1, 0], [0, 1], [both[0] / sum(both), both[1] / sum(both)], [1, 0], [0, 0]]
    torch.testing.assert_close(result.metrics.weights[0], torch.tensor(wanted))


def test_a_center_is_what_a_head_is_above_its_reference():
    ce, valid = some(1, 4, 3), torch.ones(1, 4, 3, dtype=torch.bool)
    center = torch.tensor([0.0, 0.5, 1.0])
    shifted = Excess(REF).weights(ce - center, valid, ce / 2)
    found = Excess(REF, center=center).weights(ce, valid, ce / 2)
    torch.testing.assert_close(found, shifted)


def test_decay_is_a_head_prior():
    case = make_case(SHAPE)
    prior = torch.tensor([0.25, 0.5, 1.0]) / 1.75
    for reduction in REDUCTIONS:
        how = {"reduction": reduction, "metrics": True}
        found = fused_weighted_mtp_loss(case.logits, case.target_ids, weighting=Decay(2.0), **how)
        wanted = fused_weighted_mtp_loss(case.logits, case.target_ids, head_prior=prior, **how)
        torch.testing.assert_close(found.loss, wanted.loss)
        torch.testing.assert_close(found.metrics.weights, wanted.metrics.weights)


def test_a_product_multiplies_finished_weights():
    ce, valid = some(2, 4, 3), some(2, 4, 3) < 0.8
    rule = DPace() * DFT() * Decay(0.5)
    found = rule.weights(ce, valid)
    wanted = torch.stack([part.weights(ce, valid) for part in rule.parts()]).prod(0)
    torch.testing.assert_close(found, wanted)


# ---- against the truth ----


@in_pairs(
    name=RULES,
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    reduction=REDUCTIONS,
    backend=["cpu", "triton"],
    where=lambda name, dtype, reduction, backend: backend == "cpu" or name in INTERPRETED,
)
@pytest.mark.filterwarnings("ignore:.*has no twin", "ignore:.*cancel")
def test_every_rule_is_right_everywhere(name, dtype, reduction, backend):
    if backend == "triton" and not kernels.interpreted():
        pytest.skip("Triton runs on the CPU in its interpreter alone")
    case = make_case(SHAPE, dtype, reduction=reduction, weighting=RULES[name])
    assert_agrees(partial(fused_weighted_mtp_loss, backend=backend), case)


@in_pairs(
    name=RULES,
    form=["documents", "offsets", "shifted", "own", "float mask", "shared", "list", "numerics"],
    backend=["cpu", "triton"],
    where=lambda name, form, backend: backend == "cpu" or name in INTERPRETED,
)
@pytest.mark.filterwarnings("ignore:.*has no twin", "ignore:.*cancel")
def test_every_form_of_labels_and_heads(name, form, backend):
    if backend == "triton" and not kernels.interpreted():
        pytest.skip("Triton runs on the CPU in its interpreter alone")
    rule, ids = RULES[name], torch.randint(V, (B, S))
    compares = any(part.compares for part in rule.parts())
    logits = torch.randn(B, S, 1 if form == "shared" else H, V).expand(B, S, H, V)
    how = {"weighting": rule, "reduction": "pair_mean"}
    if form == "documents":
        how["document_ids"] = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, 2, 2]])
    elif form == "offsets":
        how["offsets"] = (3, 1, 2)
    elif form == "shifted" and not compares:
        how["shifted"] = True
    elif form == "own" and not compares:
        ids = torch.randint(V, (B, S, H))
    elif form == "float mask":
        how["target_mask"] = some(B, S)
    elif form == "numerics":
        how |= {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01}
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    given = leaf
    if form == "shared":
        leaf = logits[:, :, :1].clone().requires_grad_()
        exact = logits[:, :, :1].double().requires_grad_()
        given = leaf.expand(B, S, H, V)
    elif form == "list":
        given = list(leaf.unbind(2))
    ours = fused_weighted_mtp_loss(given, ids, backend=backend, metrics=True, **how)
    wide = exact.expand(B, S, H, V)
    truth = compute_weighted_mtp_loss(wide, ids, horizon=H, metrics=True, **how)
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(
        ours.metrics.weights.double(), truth.metrics.weights.double(), rtol=1e-4, atol=1e-6
    )
    (found,), (wanted,) = (
        torch.autograd.grad(3 * result.loss, tensor)
        for result, tensor in ((ours, leaf), (truth, exact))
    )
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.filterwarnings("ignore:.*cancel")
def test_every_rule_in_the_linear_loss(name, reduction):
    hidden = torch.randn(B, S, H, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(V, (B, S)).index_fill_(1, torch.tensor([3]), -100)
    how = {"weighting": RULES[name], "reduction": reduction, "metrics": True}
    ours = fused_linear_weighted_mtp_loss(hidden, weight, ids, **how, chunk_bytes=4000)
    truth = compute_weighted_mtp_loss(hidden @ weight.T, ids, horizon=H, **how)
    torch.testing.assert_close(ours.loss, truth.loss)
    torch.testing.assert_close(ours.metrics.weights, truth.metrics.weights)
    for found, wanted in zip(
        torch.autograd.grad(3 * ours.loss, (hidden, weight)),
        torch.autograd.grad(3 * truth.loss, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.filterwarnings("ignore:.*has no twin")
def test_gradcheck(name):
    """The weights are constants: the gradient is that of the loss with its weights given."""
    logits = torch.randn(B, S, H, 9, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(9, (B, S))
    how = {"reduction": "pair_mean", "metrics": True}
    ours = fused_weighted_mtp_loss(logits, ids, weighting=RULES[name], **how)
    given = fused_weighted_mtp_loss(logits, ids, ours.metrics.weights, **how)
    torch.testing.assert_close(
        *(torch.autograd.grad(each.loss, logits)[0] for each in (ours, given))
    )
    assert not ours.metrics.weights.requires_grad


# ---- promises ----


@pytest.mark.parametrize("name", RULES)
@pytest.mark.filterwarnings("ignore:.*has no twin", "ignore:.*cancel")
def test_weights_are_not_negative_and_0_without_a_target(name):
    case = make_case(SHAPE, weighting=RULES[name], reduction="pair_mean", metrics=True)
    metrics = fused_weighted_mtp_loss(case.logits, case.target_ids, **case.options).metrics
    assert (metrics.weights >= 0).all()
    assert (metrics.weights[~metrics.valid] == 0).all()
    if name in SUMS_TO_ONE:
        sums = metrics.weights.sum(-1)
        torch.testing.assert_close(sums, metrics.valid.any(-1).to(sums))
    if RULES[name].at_most_one:
        assert metrics.weights.max() <= 1


@pytest.mark.parametrize("name", ["dft", "focal", "gate"])
def test_rules_of_rows_do_not_know_the_order_of_the_heads(name):
    case, order = make_case(SHAPE), [2, 0, 1]
    how = {"weighting": RULES[name], "metrics": True}
    found = fused_weighted_mtp_loss(case.logits, case.target_ids, **how)
    turned = fused_weighted_mtp_loss(
        case.logits[:, :, order], case.target_ids, offsets=(3, 1, 2), **how
    )
    torch.testing.assert_close(turned.metrics.weights, found.metrics.weights[..., order])


@pytest.mark.parametrize("name", ["pace", "excess x dft", *ALONE])
@pytest.mark.parametrize("backend", ["cpu", "triton", "eager"])
@pytest.mark.filterwarnings("ignore:.*has no twin")
def test_nan_surfaces(name, backend):
    if backend == "triton" and not kernels.interpreted():
        pytest.skip("Triton runs on the CPU in its interpreter alone")
    logits, ids = torch.randn(1, S, H, V), torch.randint(V, (1, S))
    logits[0, 1, 0, 3] = NAN
    rule = RULES[name]
    if any(part.compares for part in rule.parts()):
        rule = Excess(REF[:1]) * DFT()
    how = {"weighting": rule, "reduction": "pair_mean", "backend": backend}
    assert fused_weighted_mtp_loss(logits, ids, **how).loss.isnan()


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("backend", ["cpu", "triton", "eager"])
def test_certain_predictions(name, backend):
    """A cross entropy of 0, which rounding may leave a little below."""
    if backend == "triton" and not kernels.interpreted():
        pytest.skip("Triton runs on the CPU in its interpreter alone")
    ids = torch.randint(V, (1, S))
    logits = 200.0 * torch.nn.functional.one_hot(ids.roll(-1, 1), V)[:, :, None].float()
    rule, how = ALONE[name], {"metrics": True, "backend": backend}
    found = fused_weighted_mtp_loss(logits, ids, weighting=rule, **how).metrics.weights[0, :-1, 0]
    needs = {"entropy": torch.zeros(1, 1, 1)} if rule.needs else {}
    valid = torch.ones(1, 1, 1, dtype=torch.bool)
    wanted = rule.weights(torch.zeros(1, 1, 1), valid, **needs)
    torch.testing.assert_close(found, wanted[0, 0].expand(S - 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", FOLLOWING)
def test_one_pass_where_the_divisor_is_known(monkeypatch, name, backend):
    """One read of the logits; only a product of three rules that follow from them is two."""
    if backend == "triton" and not kernels.interpreted():
        pytest.skip("counts what the interpreter runs")
    module, passes = backends.BACKENDS[backend], []
    weighted_loss = module.weighted_loss

    def watched(inputs, settings):
        passes.append(settings.gradient)
        return weighted_loss(inputs, settings)

    monkeypatch.setattr(module, "weighted_loss", watched)
    case = make_case(SHAPE, weighting=RULES[name], reduction="pair_mean")
    with warnings.catch_warnings():
        action = "ignore" if name == "three" else "error"
        warnings.filterwarnings(action, message=".*has no twin")
        loss_and_gradients(partial(fused_weighted_mtp_loss, backend=backend), case)
    assert passes == (["none", "new"] if name == "three" else ["new"])


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_rule_in_pairs_with_compile_checkpointing_and_in_place(name):
    """torch.compile and checkpointing change no number, and neither does inplace."""
    if name == "three":
        pytest.skip("two passes, of which nothing is written ahead")
    case = make_case(SHAPE, weighting=RULES[name], reduction="pair_mean")

    def loss_of(x, **more):
        return fused_weighted_mtp_loss(x, case.target_ids, **case.options, **more).loss

    def gradient(function):
        leaf = case.logits.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    wanted = gradient(loss_of)
    checkpoint = partial(torch.utils.checkpoint.checkpoint, loss_of, use_reentrant=False)
    for function in (checkpoint, lambda leaf: loss_of(leaf * 1.0, inplace=True)):
        torch.testing.assert_close(gradient(function), wanted)


@pytest.mark.parametrize("name", ["gate", "pace", "centered"])
def test_a_rule_is_compiled_whole(name):
    case = make_case(SHAPE, weighting=RULES[name])

    def loss_of(x):
        return fused_weighted_mtp_loss(x, case.target_ids, **case.options).loss

    logits = case.logits.requires_grad_()
    loss = torch.compile(loss_of, backend="aot_eager", fullgraph=True)(logits)
    torch.testing.assert_close(loss, loss_of(logits))
    torch.testing.assert_close(
        *(torch.autograd.grad(each, logits)[0] for each in (loss, loss_of(logits)))
    )


def test_given_weights_of_a_product_that_labels_tell_have_their_gradient():
    case, weights = make_case(SHAPE), some(B, S, H).requires_grad_()
    of_product = fused_weighted_mtp_loss(
        case.logits, case.target_ids, weighting=Given(weights) * Decay(0.5), reduction="pair_mean"
    )
    prior = Decay(0.5).prior(H)
    by_hand = fused_weighted_mtp_loss(
        case.logits, case.target_ids, weights * prior, reduction="pair_mean"
    )
    found, wanted = (torch.autograd.grad(each.loss, weights)[0] for each in (of_product, by_hand))
    torch.testing.assert_close(found, wanted)
    assert found.any()


def test_the_denominator_of_rules():
    ids, shape = torch.randint(V, (B, S)), (B, S, H)
    pairs = loss_denominator(ids, H)
    assert loss_denominator(ids, H, weighting=DFT()) == loss_denominator(
        ids, H, reduction="pair_mean"
    )
    assert loss_denominator(ids, H, weighting=Decay(0.5)) == pairs
    given = Given(torch.full(shape, 2.0)) * Decay(0.5)
    valid = fused_weighted_mtp_loss(torch.zeros(*shape, V), ids, metrics=True).metrics.valid
    wanted = (2 * valid * Decay(0.5).prior(H)).sum()
    found = loss_denominator(ids, H, weighting=given, reduction="weight_mean")
    torch.testing.assert_close(found.float(), wanted)
    with pytest.raises(ValueError, match="follow from the cross entropies"):
        loss_denominator(ids, H, weighting=DFT(), reduction="weight_mean")


# ---- bad input ----

BAD = {
    "gamma": (Focal(-1.0), {}, "gamma must be >= 0, got -1.0"),
    "gamma, nan": (Focal(NAN), {}, "gamma must be >= 0"),
    "gamma, a tensor": (Focal(torch.tensor(-1.0)), {}, "gamma must be >= 0, got -1.0"),
    "gate": (EntropyGate(-0.5), {}, "alpha must be >= 0"),
    "pace, 0": (DPace(0.0), {}, r"alpha must be in \(0, 1\], got 0.0"),
    "pace, above 1": (DPace(1.5), {}, r"alpha must be in \(0, 1\]"),
    "pace, first": (DPace(first=-1), {}, "first must be"),
    "beta": (Decay(0.0), {}, "beta must be > 0, got 0.0"),
    "beta, inf": (Decay(INF), {}, "beta must be > 0"),
    "decay twice": (Decay(), {"head_prior": torch.ones(H)}, "Decay is a head_prior itself"),
    "no reference": (Excess(), {}, "Excess has nothing to compare with"),
    "center": (Excess(REF, center=torch.ones(2)), {}, "center must be"),
    "two references": (Excess(REF) * Excess(REF), {}, "one rule of a product may compare"),
    "reductions": (DFT() * Excess(REF), {}, "reductions differ, DFT pair_mean, Excess token_mean"),
    "a part's own": (Focal(-1.0) * DFT(), {}, "gamma must be >= 0"),
    "given, negative": (
        Given(-torch.ones(B, S, H)) * DFT(),
        {"reduction": "token_mean"},
        "must be finite and >= 0",
    ),
    "given, learned": (
        Given(torch.ones(B, S, H, requires_grad=True)) * DFT(),
        {"reduction": "sum"},
        "get no gradient: detach them",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_bad_rules(name, backend):
    rule, more, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        fused_weighted_mtp_loss(
            torch.zeros(SHAPE), torch.zeros(B, S).long(), weighting=rule, backend=backend, **more
        )


def test_what_is_no_rule_cannot_be_multiplied():
    with pytest.raises(TypeError, match="unsupported operand"):
        DFT() * 2.0


def test_a_row_rule_with_one_head_under_token_mean_is_told():
    with pytest.warns(RuntimeWarning, match="with one head DFT cancels"):
        fused_weighted_mtp_loss(
            torch.zeros(1, 3, 1, 5),
            torch.zeros(1, 3).long(),
            weighting=DFT(),
            reduction="token_mean",
        )


def test_uniform_in_a_product_is_nothing():
    case = make_case(SHAPE)
    how = {"reduction": "pair_mean"}
    found = fused_weighted_mtp_loss(
        case.logits, case.target_ids, weighting=Uniform() * DFT(), **how
    )
    wanted = fused_weighted_mtp_loss(case.logits, case.target_ids, weighting=DFT(), **how)
    assert torch.equal(found.loss, wanted.loss)
