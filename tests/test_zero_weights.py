"""What counts for nothing spoils nothing: pairs of weight 0 with any logits, denominators of 0."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd import grad

from support.agreement import loss_and_gradients, make_case
from support.covering import in_pairs
from wmtp import fused_linear_weighted_mtp_loss, fused_weighted_mtp_loss, mtp_cross_entropy
from wmtp.checks import FLOAT_DTYPES, REDUCTIONS
from wmtp.labels import has_target
from wmtp.reference import compute_weighted_mtp_loss, cross_entropy_per_head

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("eager", "cpu")
LOSSES = {"logits": fused_weighted_mtp_loss, "linear": fused_linear_weighted_mtp_loss}
POISONS = ("target", "nan", "inf", "target inf", "all")


def poisoned(poison, dtype=torch.float32, shape=(2, 7, 3, 21), **options):
    """A case of which some pairs have weight 0; the same with the logits of these spoiled; and
    which they are, [B, S, H]."""
    case = make_case(shape, dtype, "given", **options)
    weights = case.options["head_weights"]
    weights[torch.rand(weights.shape) < 0.3] = 0.0
    none = has_target(case.target_ids, shape[2]) & (weights == 0)
    case.grad_ce[none] = 0.0
    logits = case.logits.clone()
    for b, t, k in none.nonzero().tolist():
        row, target = logits[b, t, k], case.target_ids[b, t + k + 1]
        if poison.startswith("target"):
            row[target] = math.inf if poison == "target inf" else -math.inf
        elif poison == "all":
            row[:] = -math.inf
        else:
            row[(target + 1) % len(row)] = float(poison)
    return case, replace(case, logits=logits), none


def with_weights(function, case, **more):
    """The loss, and its gradients in the logits and the weights."""
    inputs = [
        value.detach().requires_grad_() for value in (case.logits, case.options["head_weights"])
    ]
    result = function(
        inputs[0], case.target_ids, **{**case.options, "head_weights": inputs[1]}, **more
    )
    return result.loss, *grad(result.loss, inputs)


@in_pairs(backend=BACKENDS, dtype=FLOAT_DTYPES, reduction=REDUCTIONS, poison=POISONS)
def test_pairs_of_weight_zero_may_have_any_logits(backend, dtype, reduction, poison):
    """Neither the loss nor a gradient is another, and theirs are 0; their cross entropies show."""
    clean, case, none = poisoned(poison, dtype, reduction=reduction)
    function = partial(fused_weighted_mtp_loss, backend=backend)
    (result, gradients), (wanted, expected) = (
        loss_and_gradients(function, each) for each in (case, clean)
    )
    assert none.any()
    torch.testing.assert_close(result.loss, wanted.loss)
    torch.testing.assert_close(gradients[:, ~none], expected[:, ~none])
    assert (gradients[:, none] == 0).all()
    ce = cross_entropy_per_head(case.logits.double(), case.target_ids)
    assert not ce[none].isfinite().any()
    torch.testing.assert_close(
        result.ce_per_head.double(), ce, equal_nan=True, rtol=2e-5, atol=2e-5
    )


@in_pairs(backend=BACKENDS, reduction=REDUCTIONS, poison=POISONS)
def test_a_weight_of_zero_that_learns_has_the_slope_of_its_cross_entropy(
    backend, reduction, poison
):
    """Infinite where that is; the other weights' slopes know nothing of it."""
    clean, case, none = poisoned(poison, reduction=reduction)
    function = partial(fused_weighted_mtp_loss, backend=backend)
    (loss, gradient, slopes), (wanted, expected, true_slopes) = (
        with_weights(function, each) for each in (case, clean)
    )
    torch.testing.assert_close((loss, gradient[~none]), (wanted, expected[~none]))
    assert (gradient[none] == 0).all()
    torch.testing.assert_close(slopes[~none], true_slopes[~none])
    counted = (clean.options["head_weights"].sum(-1) > 0)[..., None].expand_as(none)
    ce = cross_entropy_per_head(case.logits, case.target_ids)
    reached = none & counted if reduction == "token_mean" else none
    torch.testing.assert_close(slopes[reached], ce[reached], equal_nan=True)
    (gone,) = grad(
        function_of_weights(function, case), case.options["head_weights"], torch.tensor(0.0)
    )
    assert (gone == 0).all()


def function_of_weights(function, case):
    case.options["head_weights"].requires_grad_()
    return function(case.logits, case.target_ids, **case.options).loss


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_of_the_truth_are_not_spoiled(reduction, poison):
    clean, case, none = poisoned(poison, torch.float64, reduction=reduction)

    def second(case):
        logits = case.logits.detach().requires_grad_()
        weights = case.options["head_weights"].double().detach().requires_grad_()
        options = {**case.options, "head_weights": weights}
        result = compute_weighted_mtp_loss(logits, case.target_ids, horizon=3, **options)
        of_logits, of_weights = grad(result.loss, [logits, weights], create_graph=True)
        objective = of_logits.square().sum() + of_weights[~none].square().sum()
        return grad(objective, [logits, weights])

    (found, slopes), (wanted, true_slopes) = second(case), second(clean)
    assert (found[none] == 0).all()
    torch.testing.assert_close(found[~none], wanted[~none])
    torch.testing.assert_close(slopes[~none], true_slopes[~none])


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropies_that_nobody_uses_have_no_gradient(backend, poison):
    _, case, none = poisoned(poison)
    logits = case.logits.requires_grad_()
    ce = mtp_cross_entropy(logits, case.target_ids, backend=backend)
    (gradient,) = grad(torch.where(none, 0.0, ce).sum(), logits)
    assert (gradient[none] == 0).all()
    assert gradient.isfinite().all()
    (all_of_it,) = grad(mtp_cross_entropy(logits, case.target_ids, backend=backend).sum(), logits)
    if poison != "target":
        assert all_of_it[none].isnan().any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["logits", "linear"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_nobody_uses_has_no_gradient(backend, op, dtype):
    leaves = [torch.randn(1, 4, 2, 5).to(dtype), torch.eye(5).to(dtype)]
    leaves = [leaf.requires_grad_() for leaf in leaves[: 1 + (op == "linear")]]
    leaves[0].data[0, 1, 0, 3] = math.nan
    target_ids = torch.tensor([[1, 2, 3, 4]])
    loss = LOSSES[op](*leaves, target_ids, backend=backend).loss
    assert loss.isnan()
    gradients = grad(torch.where(torch.tensor(True), 1.0, loss), leaves[0])
    assert not any(map(torch.count_nonzero, gradients))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_shared_heads_are_spoiled_only_by_those_that_weigh(dtype):
    case = make_case((1, 5, 2, 21), dtype, ignored=0)
    case.logits[0, 1, :, 3] = math.nan
    weights = torch.ones(1, 5, 2)
    weights[0, 1] = 0.0

    def gradient(weights):
        rows = case.logits[:, :, 0].detach().requires_grad_()
        heads = rows[:, :, None].expand(-1, -1, 2, -1)
        result = fused_weighted_mtp_loss(heads, case.target_ids, weights, backend="cpu")
        return result.loss, *grad(result.loss, rows)

    loss, found = gradient(weights)
    assert loss.isfinite()
    assert found.isfinite().all()
    assert (found[0, 1] == 0).all()
    weights[0, 1, 1] = 1.0
    loss, found = gradient(weights)
    assert loss.isnan()
    assert found[0, 1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_hidden_states_that_count_for_nothing_may_be_anything(backend, dtype, weighted):
    """Those without a target, and by the chunks those of weight 0."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 6, 2, 8).to(dtype), torch.randn(13, 8).to(dtype)
    target_ids, weights = torch.tensor([[1, 2, -100, 4, 5, 6]]), torch.ones(1, 6, 2)
    none = ~has_target(target_ids, 2)
    if weighted and backend != "eager":
        weights[0, 0, 0] = 0.0
        none = none | (weights == 0)

    def step(hidden):
        leaves = [hidden.requires_grad_(), weight.detach().requires_grad_()]
        result = fused_linear_weighted_mtp_loss(
            *leaves, target_ids, weights, backend=backend, chunk_bytes=300
        )
        return result.loss.detach(), *grad(result.loss, leaves)

    wanted = step(hidden.clone())
    found = step(hidden.masked_fill(none[..., None], math.nan))
    torch.testing.assert_close(found, wanted)


def step_over(normalizer, op, backend, dtype, target_ids, weights=None, **options):
    """What `op` returns, and its gradients in the logits, or in hidden states and weight."""
    leaves = [torch.randn(*target_ids.shape, 2, 5, dtype=dtype, requires_grad=True)]
    if op == "linear":
        leaves.append(torch.randn(7, 5, dtype=dtype, requires_grad=True))
    options |= {"normalizer": torch.tensor(normalizer), "backend": backend}
    result = LOSSES[op](*leaves, target_ids, weights, **options)
    return result, grad(result.loss, leaves)


@in_pairs(
    backend=BACKENDS,
    op=LOSSES,
    nothing=["no target", "no weight", "no reference"],
    dtype=FLOAT_DTYPES,
    reduction=REDUCTIONS,
    normalizer=[0, 0.0],
)
def test_nothing_over_a_denominator_of_zero_is_zero(
    backend, op, nothing, dtype, reduction, normalizer
):
    target_ids = torch.full((2, 4), 3 if nothing == "no weight" else -100)
    options = {
        "no target": {},
        "no weight": {"weights": torch.zeros(2, 4, 2)},
        "no reference": {"ref_ce": torch.ones(2, 3)},
    }[nothing]
    result, gradients = step_over(
        normalizer, op, backend, dtype, target_ids, reduction=reduction, **options
    )
    assert result.loss == 0
    assert not any(map(torch.count_nonzero, gradients))


@in_pairs(backend=BACKENDS, op=LOSSES, dtype=FLOAT_DTYPES, reduction=REDUCTIONS)
def test_something_over_a_denominator_of_zero_is_infinite(backend, op, dtype, reduction):
    """And what has no target or no weight still has no gradient; of a head that is divided by 0
    nothing is left, for head_mean adds up those that there are."""
    target_ids, weights = torch.tensor([[1, 2, -100, 4]]), torch.ones(1, 4, 2)
    weights[0, 0, 0] = 0.0
    counts = has_target(target_ids, 2) & (weights != 0)
    result, gradients = step_over(0.0, op, backend, dtype, target_ids, weights, reduction=reduction)
    assert (gradients[0][~counts] == 0).all()
    if reduction == "head_mean":
        assert result.loss == 0
        return
    assert result.loss == math.inf
    assert not gradients[0][counts].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["token_mean", "weight_mean"])
@pytest.mark.parametrize("op", LOSSES)
def test_a_mean_of_no_weight_is_a_constant(op, reduction, backend):
    """0 over 0 is 0, and there the loss does not learn what would make it something else."""
    weights = torch.zeros(1, 5, 2, requires_grad=True)
    states, ids = torch.randn(1, 5, 2, 11, requires_grad=True), torch.randint(11, (1, 5))
    more = {"lm_head_weight": torch.randn(11, 11)} if op == "linear" else {}
    how = {"target_ids": ids, "head_weights": weights, "reduction": reduction, "backend": backend}
    loss = LOSSES[op](states, **more, **how).loss
    assert loss == 0
    for gradient in grad(loss, (weights, states)):
        assert torch.count_nonzero(gradient) == 0
