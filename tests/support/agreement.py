"""Random cases, and how close a backend has to come to the fp64 truth on them."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from support.backends import row_settings
from wmtp.arguments import Call, checked_call, loss_inputs
from wmtp.backends import cpu
from wmtp.labels import IGNORE_INDEX, has_target
from wmtp.numerics import PLAIN
from wmtp.records import Inputs, Outputs, RowInputs, Settings
from wmtp.reduction import accumulation_dtype
from wmtp.reference import MTPLoss, compute_weighted_mtp_loss
from wmtp.weightings import Excess, Given, Uniform, Weighting

# Beyond eager torch's own error in that dtype, relative to the largest gradient entry.
GRADIENT_TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
LOSS_TOLERANCE = {torch.float64: 1e-13}  # others: 2e-5, for they accumulate in fp32
WEIGHTINGS = ("uniform", "given", "critic", "ref_ce", "ref_logits", "signed")


@dataclass
class Case:
    """Arguments of one call, and a random upstream gradient for each differentiable output."""

    logits: Tensor
    target_ids: Tensor
    options: dict
    grad_loss: Tensor
    grad_ce: Tensor

    def cast(self, dtype: torch.dtype) -> "Case":
        """The same numbers, every floating tensor in `dtype`."""

        def to(value):
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        options = {name: to(value) for name, value in self.options.items()}
        return Case(to(self.logits), self.target_ids, options, to(self.grad_loss), to(self.grad_ce))


def make_case(
    shape, dtype=torch.float32, weighting="uniform", device="cpu", ignored=0.2, seed=0, **options
) -> Case:
    """`shape` = (B, S, H, V); a fraction `ignored` of the labels is -100."""
    batch, length, heads, vocabulary = shape
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(shape, generator=g)).to(dtype)
    if isinstance(weighting, Weighting):
        options["weighting"] = weighting
    target_ids = torch.randint(vocabulary, (batch, length), generator=g)
    target_ids[torch.rand(batch, length, generator=g) < ignored] = -100
    if weighting in ("given", "critic"):
        weights = torch.rand(batch, length, heads, generator=g)
        if weighting == "critic":
            weights = weights.softmax(-1)
        weights[torch.rand(batch, length, generator=g) < 0.1] = 0.0  # whole tokens left out
        options["head_weights"] = weights
    elif weighting in ("ref_ce", "signed"):
        # As far below as above the cross entropies of a hundred words: excess of either sign.
        options["ref_ce"] = 16 * torch.rand(batch, max(length - 1, 0), generator=g)
        options["excess"] = "signed" if weighting == "signed" else "abs"
    elif weighting == "ref_logits":
        shape = (batch, length, vocabulary)
        options["ref_logits"] = (3 * torch.randn(shape, generator=g)).to(dtype)
    options = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    return Case(
        logits.to(device),
        target_ids.to(device),
        options,
        torch.randn((), generator=g).to(device),
        torch.randn((batch, length, heads), generator=g).to(device) / (1 + batch * length),
    )


def loss_and_gradients(function, case: Case, **more) -> tuple[MTPLoss, Tensor]:
    """The outputs, and [2, B, S, H, V] the gradients in the logits: that of `grad_loss * loss`,
    which may have been written in forward, and of `grad_loss * loss + sum(grad_ce * ce)`."""
    logits = case.logits.detach().requires_grad_()
    result = function(logits, case.target_ids, **case.options, **more)
    outputs = [result.loss, result.ce_per_head]
    upstream = [case.grad_loss.to(result.loss.dtype), case.grad_ce.to(result.loss.dtype)]
    (of_loss,) = torch.autograd.grad(outputs[:1], [logits], upstream[:1], retain_graph=True)
    (of_both,) = torch.autograd.grad(outputs, [logits], upstream)
    return MTPLoss(*(value.detach() for value in result)), torch.stack([of_loss, of_both])


def assert_identical(found: tuple[MTPLoss, Tensor], wanted: tuple[MTPLoss, Tensor]) -> None:
    """Two answers of `loss_and_gradients`, bit by bit."""
    for ours, theirs in zip((*found[0], found[1]), (*wanted[0], wanted[1]), strict=True):
        assert torch.equal(ours, theirs)


def row_scalars(case: Case) -> Tensor:
    """[2, B, S, H]: row by row the gradients above are this times (softmax - onehot)."""
    logits = case.logits.detach().requires_grad_()
    result = compute_weighted_mtp_loss(
        logits, case.target_ids, horizon=logits.shape[2], **case.options
    )
    (slope,) = torch.autograd.grad(result.loss, [result.ce_per_head], case.grad_loss)
    return torch.stack([slope, slope + case.grad_ce])


def largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def relative_error(found: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest entry."""
    return largest(found.double() - truth) / max(largest(truth), 1e-30)


def correctly_rounded(found: Tensor, truth: Tensor) -> float:
    """Which part of the entries is the fp64 truth rounded once; those that are 0 do not count."""
    wanted = truth.to(found.dtype)
    counted = wanted != 0
    return (found == wanted)[counted].double().mean().item() if counted.any() else 1.0


def assert_no_worse(found: Tensor, eager: Tensor, truth: Tensor, allowed: float) -> None:
    """No further from the truth than eager torch in the same dtype, give or take."""
    assert largest(found.double() - truth) <= largest(eager.double() - truth) + allowed


def assert_agrees(function, case: Case, **more) -> None:
    """`function` against the fp64 truth, its gradients no worse than eager torch in its dtype."""
    dtype, heads = case.logits.dtype, case.logits.shape[2]
    result, gradients = loss_and_gradients(function, case, **more)
    exact = case.cast(torch.float64)
    truth, true_gradients = loss_and_gradients(compute_weighted_mtp_loss, exact, horizon=heads)
    assert result.loss.dtype == result.ce_per_head.dtype == accumulation_dtype(case.logits)
    assert gradients.dtype == dtype
    assert torch.equal(result.valid_mask, truth.valid_mask)
    rtol = LOSS_TOLERANCE.get(dtype, 2e-5)
    atol = rtol * (1e-2 if case.logits.device.type == "cpu" else 1e-1)  # a GPU's log is coarser
    torch.testing.assert_close(result.loss.double(), truth.loss, rtol=rtol, atol=atol)
    torch.testing.assert_close(result.ce_per_head.double(), truth.ce_per_head, rtol=rtol, atol=atol)

    valid = has_target(case.target_ids, heads, case.options.get("ignore_index", IGNORE_INDEX))
    _, eager_gradients = loss_and_gradients(compute_weighted_mtp_loss, case, horizon=heads)
    # Where all tokens are certain, p - 1 is little but the rounding of p, in eager torch too; and
    # excess weights see the rounding of ce through 1 / temperature.
    of_excess = not case.options.keys().isdisjoint({"ref_ce", "ref_logits"})
    units = 4 / min(1.0, case.options.get("temperature", 1.0)) if of_excess else 4
    for ours, eager, true, scalars in zip(
        gradients, eager_gradients, true_gradients, row_scalars(exact), strict=True
    ):
        rounding = units * torch.finfo(result.loss.dtype).eps * largest(scalars[valid])
        allowed = max(GRADIENT_TOLERANCE[dtype] * largest(true), rounding)
        assert_no_worse(ours, eager, true, allowed)
        assert torch.count_nonzero(ours[~valid]) == 0


def operator_call(scores, target_ids, rule, reduction="token_mean", normalizer=None) -> Call:
    """What an operator is called with, of scores [B, S, H, ...]."""
    options = {"reduction": reduction, "normalizer": normalizer, "horizon": None}
    acc = accumulation_dtype(scores)
    call = checked_call("logits", scores, target_ids, rule, acc, **options, head_prior=None)
    return call.resolved()


def kernel_loss(
    backend, logits, target_ids, weights=None, ref_ce=None, *,
    excess="abs", reduction="token_mean", normalizer=1.0, gradient="none", numerics=PLAIN,
    metrics=False,
) -> Outputs:  # fmt: skip
    """A backend's own outputs; unless told otherwise row_scalar is w / sum_k w."""
    rule = Uniform() if weights is None else Given(weights)
    if ref_ce is not None:
        rule = Excess(ref_ce, 0.7, excess)
    heads = [logits] if isinstance(logits, Tensor) else logits
    seen = logits if isinstance(logits, Tensor) else torch.stack(logits, 2)
    call = operator_call(seen, target_ids, rule, reduction, normalizer)
    how = loss_inputs(call, accumulation_dtype(seen))
    settings = Settings(
        rule=call.rule.key(),
        reduction=call.terms.reduction,
        ignore_index=IGNORE_INDEX,
        backend="",
        gradient=gradient,
        numerics=numerics,
        metrics=metrics,
    )
    return backend.weighted_loss(Inputs(logits=heads, **how), settings)


cpu_loss = partial(kernel_loss, cpu)


def kernel_gradient(backend, logits, target_ids, row_scalar, row_max=None, log_sum=None) -> Tensor:
    """The gradient of sum row_scalar ce."""
    unused = torch.full_like(row_scalar, float("nan"))
    statistics = [unused if value is None else value for value in (row_max, log_sum)]
    return backend.row_gradient(
        RowInputs(logits, target_ids[:, 1:], *statistics, row_scalar), row_settings()
    )


cpu_gradient = partial(kernel_gradient, cpu)
