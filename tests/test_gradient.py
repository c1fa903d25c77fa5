"""What autograd gets: gradients for any upstream gradient, as often as asked, in no more memory."""

from functools import partial

import pytest
import torch

from support.agreement import (
    GRADIENT_TOLERANCE,
    WEIGHTINGS,
    assert_agrees,
    assert_no_worse,
    correctly_rounded,
    largest,
    make_case,
    relative_error,
)
from support.covering import in_pairs
from support.instruction_sets import HERE
from wmtp import fused_weighted_mtp_loss, mtp_cross_entropy, next_token_cross_entropy
from wmtp.backends import cpu
from wmtp.benchmarks.memory import peak_bytes
from wmtp.checks import FLOAT_DTYPES, REDUCTIONS
from wmtp.reference import compute_weighted_mtp_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
fused = partial(fused_weighted_mtp_loss, backend="cpu")


def loss_of(case, logits, function=fused, **more):
    return function(logits, case.target_ids, **case.options, **more).loss


def true_gradient(case, upstream=1.0, dtype=torch.float64):
    exact = case.cast(dtype)
    logits = exact.logits.requires_grad_()
    function = partial(compute_weighted_mtp_loss, horizon=logits.shape[2])
    return torch.autograd.grad(loss_of(exact, logits, function) * upstream, logits)[0].double()


@in_pairs(instruction_set=HERE, dtype=FLOAT_DTYPES, weighting=WEIGHTINGS, reduction=REDUCTIONS)
@pytest.mark.usefixtures("instruction_set")
def test_written_in_forward_for_every_weighting(monkeypatch, dtype, weighting, reduction):
    """The gradient of the loss alone, with a row_gradient that would be found out."""
    monkeypatch.delattr(cpu, "row_gradient")
    case = make_case((2, 9, 4, 133), dtype, weighting, ignored=0.3, reduction=reduction)
    logits = case.logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(case, logits), logits)
    truth, eager = true_gradient(case), true_gradient(case, dtype=dtype)
    assert_no_worse(gradient, eager, truth, 2 * GRADIENT_TOLERANCE[dtype] * largest(truth))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_upstream_gradient_of_one_is_no_work(monkeypatch, dtype):
    """What was written in forward is what comes out."""
    written, weighted_loss = [], cpu.weighted_loss

    def watched(*arguments):
        outputs = weighted_loss(*arguments)
        written.append(outputs.grad.data_ptr())
        return outputs

    monkeypatch.setattr(cpu, "weighted_loss", watched)
    case = make_case((2, 9, 4, 133), dtype, "given")
    logits = case.logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(case, logits), logits)
    assert [gradient.data_ptr()] == written
    loss_of(case, logits).backward()
    assert logits.grad.data_ptr() == written[1]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_bfloat16_gradients_are_right_to_the_last_bit(target, weighting):
    """What forward writes, and the gradient of the cross entropies."""
    backend, device = target
    case = make_case((1, 9, 4, 517), torch.bfloat16, weighting, device)
    exact = case.cast(torch.float64)
    grads = []
    for each, function in (
        (case, partial(fused_weighted_mtp_loss, backend=backend)),
        (exact, partial(compute_weighted_mtp_loss, horizon=4)),
    ):
        logits = each.logits.requires_grad_()
        result = function(logits, case.target_ids, **each.options)
        outputs = (result.loss, (result.ce_per_head * case.grad_ce).sum())
        of_logits = [
            torch.autograd.grad(output, logits, retain_graph=True)[0].cpu() for output in outputs
        ]
        grads.append(of_logits)
    for found, truth in zip(*grads, strict=True):
        assert correctly_rounded(found, truth) >= 0.99


@pytest.mark.parametrize("upstream", [1.0, 0.37, -2.5, 0.0, 1e-3, 65536.0, float("nan")])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_any_upstream_gradient(dtype, upstream):
    case = make_case((2, 9, 4, 133), dtype, "given")
    logits = case.logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(case, logits) * upstream, logits)
    truth, eager = true_gradient(case, upstream), true_gradient(case, upstream, dtype)
    assert gradient.dtype == dtype
    if upstream != upstream:
        assert gradient.isnan().any()
        return
    assert_no_worse(gradient, eager, truth, 2 * GRADIENT_TOLERANCE[dtype] * largest(truth))


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_small_float16_gradients_survive_as_in_eager(scale):
    """A loss scale is there to lift them above float16's smallest number."""
    case = make_case((1, 64, 2, 8000), torch.float16)
    logits = case.logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(case, logits) * scale, logits)
    truth, eager = true_gradient(case, scale), true_gradient(case, scale, torch.float16)
    seen = eager != 0
    assert torch.count_nonzero(gradient) >= 0.99 * torch.count_nonzero(eager)

    def typical_error(found):
        return ((found.double() - truth)[seen] / truth[seen]).abs().median()

    assert typical_error(gradient) <= 2 * typical_error(eager) + 2e-4


@pytest.mark.parametrize("size", [1e5, 1.0, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_size_of_weights_does_not_matter_to_their_mean(dtype, size):
    case = make_case((2, 9, 4, 133), dtype, "given", reduction="weight_mean")
    case.options["head_weights"] = (case.options["head_weights"] + 0.1) * size
    assert_agrees(fused, case)


def test_normalizer_is_a_constant(target):
    backend, device = target
    case = make_case((2, 6, 3, 40), device=device)
    normalizer = torch.tensor(3.0, device=device, requires_grad=True)
    logits = case.logits.requires_grad_()
    for function in (partial(fused_weighted_mtp_loss, backend=backend), None):
        function = function or partial(compute_weighted_mtp_loss, horizon=3)
        loss_of(case, logits, function, normalizer=normalizer).backward()
        assert normalizer.grad is None
        assert not loss_of(case, logits.detach(), function, normalizer=normalizer).requires_grad


def test_heads_of_a_leaf_that_share_storage_keep_their_own_gradients(target):
    backend, device = target
    case = make_case((2, 6, 1, 50), device=device)
    leaf = case.logits.expand(-1, -1, 3, -1).requires_grad_()
    truth = compute_weighted_mtp_loss(leaf, case.target_ids, horizon=3).loss
    found = fused_weighted_mtp_loss(leaf, case.target_ids, backend=backend).loss
    (expected,), (gradient,) = (torch.autograd.grad(loss, leaf) for loss in (truth, found))
    torch.testing.assert_close(gradient, expected)


def test_shared_heads_are_never_materialised():
    """Peak memory of loss and gradient: about one gradient of the shared rows, not H of them."""
    rows = torch.randn(2, 16, 1000, requires_grad=True)
    ids = torch.randint(1000, (2, 16))
    with torch.profiler.profile(profile_memory=True) as profile:
        shared = rows[:, :, None].expand(-1, -1, 8, -1)
        fused_weighted_mtp_loss(shared, ids, backend="cpu").loss.backward()
    allocated = sum(
        event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0
    )
    assert allocated < 2.2 * rows.nbytes  # the gradient, and autograd's sum of it


@pytest.mark.parametrize("reduction", ["token_mean", "weight_mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradient_of_head_weights(target, reduction, dtype):
    backend, device = target
    case = make_case((2, 6, 3, 40), torch.float32, "given", device, reduction=reduction)
    case = case.cast(dtype)

    def gradient(function, case, **more):
        weights = case.options["head_weights"].detach().requires_grad_()
        options = {**case.options, "head_weights": weights}
        result = function(case.logits, case.target_ids, **options, **more)
        return torch.autograd.grad(3 * result.loss, weights)[0]

    found = gradient(fused_weighted_mtp_loss, case, backend=backend)
    truth = gradient(compute_weighted_mtp_loss, case.cast(torch.float64), horizon=3)
    assert found.dtype == dtype
    assert relative_error(found, truth) < (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("reduction", ["token_mean", "weight_mean", "sum"])
def test_gradcheck_runs_on_the_cpu_kernel(reduction):
    case = make_case((2, 5, 3, 11), torch.float64, "given", reduction=reduction)
    weights = case.options["head_weights"].double().requires_grad_()

    def function(logits, weights):
        options = {**case.options, "head_weights": weights}
        result = fused_weighted_mtp_loss(logits, case.target_ids, **options, backend="cpu")
        return result.loss, result.ce_per_head

    inputs = (case.logits.requires_grad_(), weights)
    # The first backward hands out what forward has written, the next ones compute it anew.
    assert torch.autograd.gradcheck(function, inputs, nondet_tol=1e-14)


def test_loss_scaled_and_summed_with_others(target):
    backend, device = target
    case = make_case((2, 6, 3, 40), weighting="ref_ce", device=device)

    def gradient(function, dtype, **more):
        logits = case.logits.to(dtype).requires_grad_()
        result = function(logits, case.target_ids, **case.cast(dtype).options, **more)
        total = 0.3 * result.loss + result.ce_per_head[..., 0].mean() + 1e-3 * logits.square().sum()
        return torch.autograd.grad(total, logits)[0]

    found = gradient(fused_weighted_mtp_loss, torch.float32, backend=backend)
    truth = gradient(compute_weighted_mtp_loss, torch.float64, horizon=3)
    assert relative_error(found, truth) < 1e-6


def test_backward_twice_under_retain_graph(target):
    backend, device = target
    case = make_case((1, 5, 2, 30), weighting="given", device=device)
    logits = case.logits.requires_grad_()
    loss = fused_weighted_mtp_loss(logits, case.target_ids, **case.options, backend=backend).loss
    truth = true_gradient(case).to(device)
    for upstream in (1.0, -2.5, 1.0, 0.0, 0.5):
        grad_loss = torch.tensor(upstream, device=device)
        (gradient,) = torch.autograd.grad(loss, logits, grad_loss, retain_graph=True)
        torch.testing.assert_close(gradient.double(), upstream * truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_backward_adds_up_in_a_leaf(dtype):
    case = make_case((1, 5, 2, 30), dtype, weighting="given")
    logits = case.logits.requires_grad_()
    (once,) = torch.autograd.grad(loss_of(case, logits), logits)
    loss = loss_of(case, logits)
    # The second is computed anew; of float16, whose first was scaled, it may round otherwise.
    rtol = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-6)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(logits.grad, times * once, rtol=rtol, atol=2e-7)


def test_a_gradient_belongs_to_whoever_got_it(target):
    """Changing one changes neither another nor what the graph still holds."""
    backend, device = target
    case = make_case((1, 5, 2, 30), weighting="given", device=device)
    logits = case.logits.requires_grad_()
    loss = loss_of(case, logits, partial(fused_weighted_mtp_loss, backend=backend))
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    expected = first.clone()
    torch.testing.assert_close(second, expected)
    second.zero_()
    assert torch.equal(first, expected)
    (third,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(third, expected)


def test_a_leaf_may_zero_its_gradient_between_two_backwards():
    case = make_case((1, 5, 2, 30), weighting="given")
    logits = case.logits.requires_grad_()
    loss = loss_of(case, logits)
    loss.backward(retain_graph=True)
    expected = logits.grad.clone()
    logits.grad.zero_()
    loss.backward()
    torch.testing.assert_close(logits.grad, expected)


def test_no_second_derivative_is_an_error_not_a_zero():
    case = make_case((1, 5, 2, 30))
    logits = case.logits.requires_grad_()
    loss = fused_weighted_mtp_loss(logits, case.target_ids, backend="cpu").loss
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='eager'"):
        gradient.square().sum().backward()


def no_grad():
    return torch.no_grad(), True


def inference_mode():
    return torch.inference_mode(), False


def detached_logits():
    return torch.enable_grad(), False


@pytest.mark.parametrize("mode", [no_grad, inference_mode, detached_logits])
def test_no_gradient_wanted_costs_none(mode):
    context, requires_grad = mode()
    with context:
        case = make_case((1, 512, 2, 4000), weighting="given")
        logits = case.logits.requires_grad_(requires_grad)
        calls = (
            partial(loss_of, case, logits),
            partial(mtp_cross_entropy, logits, case.target_ids, backend="cpu"),
            partial(next_token_cross_entropy, logits[:, :, 0], case.target_ids, backend="cpu"),
        )
        for call in calls:
            assert not call().requires_grad
            assert peak_bytes(call) < 0.01 * logits.nbytes


def test_gradient_of_weights_alone_costs_none_of_logits():
    case = make_case((1, 512, 2, 4000), weighting="given")
    weights = case.options["head_weights"].requires_grad_()
    assert peak_bytes(lambda: loss_of(case, case.logits).backward()) < 0.01 * case.logits.nbytes
    assert torch.count_nonzero(weights.grad)


@in_pairs(weighting=["given", "ref_ce"], dtype=DTYPES, upstream=[1, 0.5])
def test_a_leafs_gradient_is_all_the_memory_it_takes(dtype, weighting, upstream):
    case = make_case((1, 256, 2, 4000), dtype, weighting)
    logits = case.logits.requires_grad_()

    def step():
        logits.grad = None
        (upstream * loss_of(case, logits)).backward()

    step()
    logits.grad = None
    assert peak_bytes(step) < 1.03 * logits.nbytes


@pytest.mark.parametrize("weighting", ["uniform", "given"])
def test_the_caller_may_change_what_he_got(weighting):
    """As trainers do: `loss *= processes`."""
    case = make_case((1, 6, 2, 40), torch.float64, weighting)
    inputs = [case.logits.requires_grad_()]
    if weighting == "given":
        inputs.append(case.options["head_weights"].double().requires_grad_())
        case.options["head_weights"] = inputs[1]
    gradients = []
    for function in (partial(compute_weighted_mtp_loss, horizon=2), fused):
        result = function(case.logits, case.target_ids, **case.options)
        loss = result.loss * 1 if function is not fused else result.loss
        loss /= 4
        if function is fused:
            result.ce_per_head.detach().mul_(3)
        gradients.append(torch.autograd.grad(loss, inputs))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
