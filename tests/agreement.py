"""Random cases, and how close a backend has to come to the fp64 truth on them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wmtp.labels import IGNORE_INDEX, has_target
from wmtp.reference import MTPLoss, accumulation_dtype, compute_weighted_mtp_loss

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


def loss_and_gradient(function, case: Case, **more) -> tuple[MTPLoss, Tensor]:
    """The outputs, and the gradient of `grad_loss * loss + sum(grad_ce * ce)` in the logits."""
    logits = case.logits.detach().requires_grad_()
    result = function(logits, case.target_ids, **case.options, **more)
    outputs = [result.loss, result.ce_per_head]
    upstream = [case.grad_loss.to(result.loss.dtype), case.grad_ce.to(result.loss.dtype)]
    (gradient,) = torch.autograd.grad(outputs, [logits], upstream)
    return MTPLoss(*(value.detach() for value in result)), gradient


def assert_identical(found: tuple[MTPLoss, Tensor], wanted: tuple[MTPLoss, Tensor]) -> None:
    """Two answers of `loss_and_gradient`, bit by bit."""
    for ours, theirs in zip((*found[0], found[1]), (*wanted[0], wanted[1]), strict=True):
        assert torch.equal(ours, theirs)


def row_scalars(case: Case) -> Tensor:
    """[B, S, H]: row by row the gradient above is this times (softmax - onehot)."""
    logits = case.logits.detach().requires_grad_()
    result = compute_weighted_mtp_loss(
        logits, case.target_ids, horizon=logits.shape[2], **case.options
    )
    (slope,) = torch.autograd.grad(result.loss, [result.ce_per_head], case.grad_loss)
    return slope + case.grad_ce


def largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def relative_error(found: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest entry."""
    return largest(found.double() - truth) / max(largest(truth), 1e-30)


def assert_agrees(function, case: Case, **more) -> None:
    """`function` against the truth in fp64, its gradient no worse than eager torch in its dtype."""
    dtype, heads = case.logits.dtype, case.logits.shape[2]
    result, gradient = loss_and_gradient(function, case, **more)
    exact = case.cast(torch.float64)
    truth, true_gradient = loss_and_gradient(compute_weighted_mtp_loss, exact, horizon=heads)
    assert result.loss.dtype == result.ce_per_head.dtype == accumulation_dtype(case.logits)
    assert gradient.dtype == dtype
    assert torch.equal(result.valid_mask, truth.valid_mask)
    rtol = LOSS_TOLERANCE.get(dtype, 2e-5)
    atol = rtol * (1e-2 if case.logits.device.type == "cpu" else 1e-1)  # a GPU's log is coarser
    torch.testing.assert_close(result.loss.double(), truth.loss, rtol=rtol, atol=atol)
    torch.testing.assert_close(result.ce_per_head.double(), truth.ce_per_head, rtol=rtol, atol=atol)

    valid = has_target(case.target_ids, heads, case.options.get("ignore_index", IGNORE_INDEX))
    _, eager_gradient = loss_and_gradient(compute_weighted_mtp_loss, case, horizon=heads)
    # Where all tokens are certain, p - 1 is little but the rounding of p, in eager torch too; and
    # excess weights see the rounding of ce through 1 / temperature.
    of_excess = not case.options.keys().isdisjoint({"ref_ce", "ref_logits"})
    units = 4 / min(1.0, case.options.get("temperature", 1.0)) if of_excess else 4
    rounding = units * torch.finfo(result.loss.dtype).eps * largest(row_scalars(exact)[valid])
    allowed = max(GRADIENT_TOLERANCE[dtype] * largest(true_gradient), rounding)
    eager_error = largest(eager_gradient.double() - true_gradient)
    assert largest(gradient.double() - true_gradient) <= eager_error + allowed
    assert torch.count_nonzero(gradient[~valid]) == 0
