"""Rules as objects: the library's as the short form has them, others' against the fp64 truth."""

import warnings
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from support.agreement import assert_agrees, assert_identical, loss_and_gradients, make_case
from support.covering import in_pairs
from support.outside_rules import RULES, Likely
from wmtp import backends, fused_linear_weighted_mtp_loss, fused_weighted_mtp_loss, kernels, once
from wmtp.checks import REDUCTIONS
from wmtp.labels import Targets
from wmtp.reference import Pairs, compute_weighted_mtp_loss, weights_of
from wmtp.weightings import Critic, Excess, Given, Uniform, Weighting
from wmtp.weightings.base import rule_of

SHAPE = (2, 7, 3, 33)
FEW_ROWS = (2, 4, 3, 33)  # for the interpreter, which is slow
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _said_before(monkeypatch):
    monkeypatch.setattr(once, "_said", set())


def reads(monkeypatch, backend):
    """Fills with the gradient setting of every pass over the logits."""
    module, passes = backends.BACKENDS[backend], []
    weighted_loss = module.weighted_loss

    def watched(inputs, settings):
        passes.append(settings.gradient)
        return weighted_loss(inputs, settings)

    monkeypatch.setattr(module, "weighted_loss", watched)
    return passes


@in_pairs(name=RULES, dtype=DTYPES, reduction=REDUCTIONS)
@pytest.mark.filterwarnings("ignore:.*has no twin")
def test_somebody_elses_rule_is_right_everywhere(target, name, dtype, reduction):
    backend, device = target
    case = make_case(FEW_ROWS, dtype, device=device, reduction=reduction, weighting=RULES[name])
    assert_agrees(partial(fused_weighted_mtp_loss, backend=backend), case)


SPOILED = (0, 1, 0)  # a pair that counts


@in_pairs(name=RULES, value=[float("nan"), float("inf")], reduction=REDUCTIONS)
@pytest.mark.filterwarnings("ignore:.*has no twin")
def test_a_logit_that_is_not_finite_surfaces_in_the_loss(target, name, value, reduction):
    backend, device = target
    ids = torch.randint(33, FEW_ROWS[:2], device=device)
    logits = torch.randn(FEW_ROWS, device=device)
    logits[SPOILED][(ids[0, 2] + 1) % 33] = value
    how = {"weighting": RULES[name], "reduction": reduction, "backend": backend}
    logits.requires_grad_()
    found = fused_weighted_mtp_loss(logits, ids, **how)
    # "likely" makes the weight of a pair of infinite cross entropy 0, which counts for nothing.
    counts = not (name == "likely" and value == float("inf"))
    assert found.loss.isfinite() != counts
    assert not found.ce_per_head[SPOILED].isfinite()
    (gradient,) = torch.autograd.grad(found.loss, logits)
    assert gradient[SPOILED].isnan().any() == counts


@pytest.mark.parametrize("name", RULES)
def test_and_so_does_one_of_the_hidden_states(name):
    hidden, weight, ids = torch.randn(*SHAPE[:3], 5), torch.randn(11, 5), torch.randint(11, (2, 7))
    hidden[SPOILED][2] = float("nan")
    for reduction in REDUCTIONS:
        how = {"weighting": RULES[name], "reduction": reduction}
        assert fused_linear_weighted_mtp_loss(hidden, weight, ids, **how).loss.isnan()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", RULES)
def test_and_in_the_linear_loss(name, reduction):
    hidden = torch.randn(2, 7, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(11, (2, 7)).index_fill_(1, torch.tensor([3]), -100)
    how = {"weighting": RULES[name], "reduction": reduction}
    ours = fused_linear_weighted_mtp_loss(hidden, weight, ids, **how, chunk_bytes=1000)
    truth = compute_weighted_mtp_loss(hidden @ weight.T, ids, horizon=3, **how)
    torch.testing.assert_close(ours, truth)
    for found, wanted in zip(
        torch.autograd.grad(3 * ours.loss, (hidden, weight)),
        torch.autograd.grad(3 * truth.loss, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("name", "reduction", "passes"),
    [("likely", "sum", 1), ("likely", "token_mean", 2), ("sharp", "token_mean", 2)],
)
@pytest.mark.skipif(not kernels.interpreted(), reason="counts what the interpreter runs")
@pytest.mark.filterwarnings("ignore:.*has no twin")
def test_a_twin_is_one_pass_where_the_divisor_is_known(monkeypatch, name, reduction, passes):
    found = reads(monkeypatch, "triton")
    case = make_case(SHAPE, reduction=reduction, weighting=RULES[name])
    loss_and_gradients(partial(fused_weighted_mtp_loss, backend="triton"), case)
    assert found == ["none", "new"][-passes:]


def test_two_passes_are_said_once():
    case = make_case(SHAPE, reduction="sum", weighting=Likely())
    with pytest.warns(RuntimeWarning, match="Likely has no twin for backend 'cpu': the loss reads"):
        fused_weighted_mtp_loss(case.logits, case.target_ids, **case.options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_weighted_mtp_loss(case.logits, case.target_ids, **case.options)


@pytest.mark.parametrize("weighting", ["uniform", "given", "ref_ce", "signed", "ref_logits"])
def test_objects_are_the_short_form(target, weighting):
    backend, device = target
    case = make_case(FEW_ROWS, weighting=weighting, device=device)
    fused = partial(fused_weighted_mtp_loss, backend=backend)
    wanted = loss_and_gradients(fused, case)
    given = case.options
    case.options = {"weighting": Uniform()}
    if "head_weights" in given:
        case.options["weighting"] = Given(given["head_weights"])
    elif given:
        case.options["weighting"] = Excess(**given)
    assert_identical(loss_and_gradients(fused, case), wanted)


def test_a_critic_weighs_as_its_weights(target):
    backend, device = target
    case = make_case(SHAPE, weighting=Critic(torch.randn(2, 7, device=device)), device=device)
    assert_agrees(partial(fused_weighted_mtp_loss, backend=backend), case)


@pytest.mark.parametrize(
    "rule", [Uniform(), Excess(torch.zeros(1, 2), 0.3, "signed"), *RULES.values()]
)
def test_a_key_finds_the_rule_again(rule):
    again = rule_of(rule.key())
    assert type(again) is type(rule)
    assert again.key() == rule.key()
    assert (again.scope, again.case, again.device) == (rule.scope, rule.case, rule.device)


@pytest.mark.parametrize("name", RULES)
def test_weights_are_constants(name):
    ce = torch.rand(2, 7, 3, requires_grad=True)
    targets = Targets(torch.zeros(*ce.shape[:2], dtype=torch.long), *ce.shape[1:])
    assert not weights_of(RULES[name], Pairs(ce, targets.valid()), targets).requires_grad


def test_a_number_that_changes_compiles_nothing():
    case, graphs = make_case(SHAPE), []

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    ref_ce = torch.rand(2, 6)

    @torch.compile(backend=compiler, fullgraph=True)
    def step(temperature):
        rule = Excess(ref_ce, temperature)
        return fused_weighted_mtp_loss(case.logits, case.target_ids, weighting=rule).loss

    for temperature in (0.7, 0.5, 0.3, 0.2):
        step(torch.tensor(temperature))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["likely", "sharp"])
@pytest.mark.filterwarnings("ignore:.*has no twin")
def test_somebody_elses_rule_is_compiled_whole(name):
    case = make_case(SHAPE, reduction="sum")
    logits = case.logits.requires_grad_()

    def loss_of(x):
        return fused_weighted_mtp_loss(x, case.target_ids, weighting=RULES[name]).loss

    loss = torch.compile(loss_of, backend="aot_eager", fullgraph=True)(logits)
    wanted = loss_of(logits)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(each, logits) for each in (loss, wanted)))


def test_a_class_defined_anew_is_another_rule():
    """As in a notebook: nothing that is kept of the first stands for the second."""
    hidden, weight, ids = torch.ones(2, 7, 3, 4), torch.rand(9, 4), torch.randint(9, (2, 7))
    losses = []
    for times in (1.0, 2.0):

        @dataclass(frozen=True, eq=False)
        class Mine(Weighting):
            def weights(self, ce, valid, times=times):
                return times * valid.to(ce.dtype)

        rule = Mine()
        assert type(rule_of(rule.key())) is Mine
        how = {"weighting": rule, "reduction": "sum"}
        losses.append(fused_linear_weighted_mtp_loss(hidden, weight, ids, **how).loss)
    torch.testing.assert_close(losses[1], 2 * losses[0])


@dataclass(frozen=True, eq=False, slots=True)
class Slotted(Weighting):
    number: float = 1.0

    def weights(self, ce, valid):
        return self.number * valid.to(ce.dtype)


class Bare(Weighting):
    def weights(self, ce, valid):
        return valid.to(ce.dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": torch.ones(2, 7, 3)}, "got Tensor: pass weights .* as head_weights"),
        ({"weighting": Bare()}, "Bare must be a dataclass"),
        ({"weighting": Slotted()}, "Slotted must be a dataclass"),
        ({"weighting": Excess()}, "nothing to compare with: pass ref_ce or ref_logits"),
        ({"weighting": Uniform(), "head_weights": torch.ones(2, 7, 3)}, "exclude each other"),
        ({"weighting": Critic(torch.zeros(2, 6))}, r"values must be \[B, S\] = \(2, 7\)"),
        ({"weighting": Given(torch.ones(2, 7))}, r"head_weights must be \[B, S, H\]"),
    ],
)
def test_what_is_no_rule_is_refused(options, message):
    case = make_case(SHAPE)
    with pytest.raises((TypeError, ValueError), match=message):
        fused_weighted_mtp_loss(case.logits, case.target_ids, **options)


def spoiled(kind):
    """Logits [1, 4, 2, V], ids and a reference, one of them not finite at a pair that counts."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 4, 2, 11, generator=generator)
    ids = torch.randint(11, (1, 4), generator=generator)
    ref_ce = torch.rand(1, 3, generator=generator)
    if kind == "a target of -inf":
        logits[0, 1, 1, ids[0, 3]] = -torch.inf
    elif kind in ("nan", "inf"):
        logits[0, 1, 1, (ids[0, 3] + 1) % 11] = float(kind)
    else:
        ref_ce[0, 2] = float(kind.removeprefix("reference "))
    return logits, ids, ref_ce


@pytest.mark.filterwarnings("ignore:token_mean divides")
@in_pairs(
    kind=["nan", "inf", "a target of -inf", "reference nan", "reference inf"],
    how=["prior", "prior of 0", "mask"],
    excess=["abs", "signed"],
    reduction=REDUCTIONS,
    op=["logits", "linear"],
)
def test_what_is_not_finite_surfaces_where_masks_and_priors_multiply(
    target, kind, how, excess, reduction, op
):
    """As in eager: the loss, and which rows have gradients of what value."""
    backend, device = target
    logits, ids, ref_ce = spoiled(kind)
    more = {
        "prior": {"head_prior": torch.tensor([0.5, 2.0])},
        "prior of 0": {"head_prior": torch.tensor([0.5, 0.0])},
        "mask": {"position_mask": torch.tensor([[1.0, 0.5, 0.25, 1.0]])},
    }[how]
    how = {"ref_ce": ref_ce, "excess": excess, "reduction": reduction, **more}

    def found(backend, device):
        leaf = logits.to(device).requires_grad_()
        there = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in how.items()
        }
        if op == "logits":
            loss = fused_weighted_mtp_loss(leaf, ids.to(device), **there, backend=backend).loss
        else:
            eye = torch.eye(11, device=device)  # the hidden states are the logits
            loss = _linear(leaf, eye, ids.to(device), **there, backend=backend)
        return loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()

    wanted = found("eager", "cpu")
    torch.testing.assert_close(found(backend, device), wanted, equal_nan=True, rtol=1e-4, atol=1e-6)


def _linear(hidden, weight, ids, **how):
    return fused_linear_weighted_mtp_loss(hidden, weight, ids, **how).loss


@pytest.mark.filterwarnings("ignore:token_mean divides")
@pytest.mark.parametrize("how", [{"position_mask": torch.full((2, 7), 0.5)}, {}], ids=["mask", ""])
def test_the_weights_that_are_refused_are_those_that_were_passed(how):
    logits, ids, weights = torch.randn(SHAPE), torch.randint(33, (2, 7)), torch.ones(SHAPE[:3])
    for bad in (float("nan"), -3.0):
        weights[1, 2, 0] = bad
        how = {**how, "head_weights": weights}
        with pytest.raises(ValueError, match=rf"head_weights\[1, 2, 0\] is {bad}: weights"):
            fused_weighted_mtp_loss(logits, ids, **how)
        with pytest.raises(ValueError, match=rf"head_weights\[1, 2, 0\] is {bad}: weights"):
            _linear(logits, torch.randn(33, 33), ids, **how)


@pytest.mark.parametrize(
    "more", [{}, {"head_prior": torch.tensor([0.5, 2.0, 1.0])}], ids=["", "prior"]
)
def test_a_value_that_is_nan_surfaces(target, more):
    """No head_weights were passed that could be refused."""
    backend, device = target
    values = torch.rand(2, 7, device=device)
    values[1, 4] = float("nan")
    logits, ids = torch.randn(FEW_ROWS, device=device), torch.randint(33, (2, 4), device=device)
    more = {name: value.to(device) for name, value in more.items()}
    how = {"weighting": Critic(values[:, 1:5]), "backend": backend, **more}
    leaf = logits.requires_grad_()
    loss = fused_weighted_mtp_loss(leaf, ids, **how).loss
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient[1].isnan().any()
    assert gradient[0].isfinite().all()


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_masks_of_any_size(backend):
    """A product that overflows is infinite as anywhere; of tiny masks a mean is what it is."""
    logits, ids = torch.randn(SHAPE), torch.randint(33, (2, 7))
    huge = {"position_mask": torch.full((2, 7), 1e30), "backend": backend}
    weights = torch.full(SHAPE[:3], 1e30)
    found = fused_weighted_mtp_loss(logits, ids, weights, reduction="sum", **huge)
    assert found.loss == float("inf")
    wanted = fused_weighted_mtp_loss(logits, ids, reduction="head_mean", backend=backend).loss
    tiny = {"position_mask": torch.full((2, 7), 1e-40), "backend": backend}
    found = fused_weighted_mtp_loss(logits, ids, reduction="head_mean", **tiny).loss
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
