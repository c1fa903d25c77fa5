"""What the Triton kernels write, output by output, and the fp64 truth of each."""

import math

import torch

from support.agreement import (
    GRADIENT_TOLERANCE,
    correctly_rounded,
    kernel_loss,
    relative_error,
)
from wmtp import kernels
from wmtp.labels import has_target, shift_to_heads
from wmtp.reference import cross_entropy_per_head, max_and_log_sum
from wmtp.weightings.excess import excess_head_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Less than a block and more, of any alignment: each dtype has an odd one and an even one.
VOCABULARIES = [
    *((torch.float32, 1), (torch.float32, 130), (torch.bfloat16, 7), (torch.bfloat16, 1000)),
    *((torch.float16, 33), (torch.float16, 1000)),
]
SHARED = [(torch.float32, 1001), (torch.bfloat16, 1001), (torch.float16, 7)]
# Elements before the first row and between rows; heads outermost or not; V.
PLACEMENTS = [
    *((1, 0, False, 131), (3, 5, True, 131), (64, 0, True, 1000)),
    *((0, 1, False, 7), (0, 1, False, 1000), (71, 64, False, 1000)),
]
IGNORED = -100
NAN, INF = math.nan, math.inf


def make(shape, dtype, device, ignored=0.2):
    """Logits, and targets of which some are ignored."""
    target_ids = torch.randint(shape[-1], shape[:2])
    target_ids[torch.rand(shape[:2]) < ignored] = IGNORED
    return (3 * torch.randn(shape)).to(dtype).to(device), target_ids.to(device)


def forward(logits, target_ids, weights=None, ref_ce=None, signed=False, normalize=True):
    """Without gradient, the denominator being 1: the outputs that `truth` returns."""
    *outputs, _grad = weighted_loss(
        logits, target_ids, weights, ref_ce, signed, normalize, gradient="none"
    )
    return outputs


def weighted_loss(
    logits, target_ids, weights=None, ref_ce=None, signed=False, normalize=True, gradient="new"
):
    """(token_loss, row_scalar, weight_sum, ce, row_max, log_sum, gradient)."""
    out = kernel_loss(
        kernels,
        *(logits, target_ids, weights, ref_ce),
        excess="signed" if signed else "abs",
        reduction="token_mean" if normalize else "sum",
        normalizer=torch.ones((), device=logits.device),
        gradient=gradient,
    )
    torch.testing.assert_close(out.loss, out.token_loss.sum(), equal_nan=True)
    assert torch.equal(out.valid_mask, ~(out.weight_sum <= 1e-8))
    of_rows = (out.ce, out.row_max, out.log_sum)
    return out.token_loss, out.row_scalar, out.weight_sum, *of_rows, (out.grad, out.factors[1])


def truth(logits, target_ids, weights=None, ref_ce=None, signed=False, normalize=True):
    """The contract's outputs in fp64 on the CPU, out of the reference's parts."""
    logits, target_ids = logits.double().cpu(), target_ids.cpu()
    ce = cross_entropy_per_head(logits, target_ids)
    valid = shift_to_heads(target_ids, ce.shape[2], IGNORED) != IGNORED
    of_rows = (torch.where(valid, value, 0.0) for value in max_and_log_sum(logits))
    w = valid.double()
    if weights is not None:
        w = torch.where(valid, weights.double().cpu(), 0.0)
    elif ref_ce is not None:
        excess = "signed" if signed else "abs"
        w = excess_head_weights(ce, ref_ce.double().cpu(), target_ids, 0.7, excess)
    weight_sum = w.sum(-1)
    row_scalar = w
    if normalize:
        row_scalar = torch.where((weight_sum <= 1e-8)[..., None], 0.0, w / weight_sum[..., None])
    return (row_scalar * ce).sum(-1), row_scalar, weight_sum, ce, *of_rows


def assert_close(found, wanted, rtol=2e-5, atol=2e-6):
    """Tuples of fp32 outputs against fp64; NaN and inf must stand in the same places."""
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(
            ours.double().cpu(), theirs, rtol=rtol, atol=atol, equal_nan=True
        )


def true_gradient(logits, target_ids, row_scalar, dtype=torch.float64):
    """d/dlogits of sum(row_scalar ce), by autograd through the reference in `dtype`."""
    rows = logits.detach().cpu().to(dtype).requires_grad_()
    ce = cross_entropy_per_head(rows, target_ids.cpu())
    (grad,) = torch.autograd.grad((row_scalar.cpu().to(ce.dtype) * ce).sum(), rows)
    return grad.double()


def placed(logits, lead, gap, heads_first=False):
    """The same numbers, `lead` elements into a storage of NaN, rows `gap` elements apart."""
    batch, length, heads, vocabulary = logits.shape
    row = vocabulary + gap
    strides = (length * heads * row, heads * row, row, 1)
    if heads_first:
        strides = (length * row, row, batch * length * row, 1)
    storage = torch.full((lead + batch * length * heads * row,), NAN).to(logits)
    view = storage.as_strided(logits.shape, strides, lead)
    view.copy_(logits)
    return view, storage


def assert_loss_and_gradient(logits, target_ids, shared=False, gradient="new", **options):
    """Against the fp64 truth; the gradient no worse than eager torch's in that dtype."""
    plain = logits.clone()
    *found, (grad, factor) = weighted_loss(logits, target_ids, gradient=gradient, **options)
    wanted = truth(plain, target_ids, **options)
    assert_close(found, wanted)
    _, row_scalar, *_ = wanted
    exact = true_gradient(plain, target_ids, row_scalar)
    eager = true_gradient(plain, target_ids, row_scalar, logits.dtype)
    if shared:  # the H-th part of the sum
        exact, eager = exact.mean(2, keepdim=True), eager.mean(2, keepdim=True)
    assert grad.shape == exact.shape
    assert grad.dtype == logits.dtype
    allowed = relative_error(eager, exact) + GRADIENT_TOLERANCE[logits.dtype]
    assert relative_error(grad.double().cpu() * factor.item(), exact) <= allowed
    if logits.dtype == torch.bfloat16:
        assert correctly_rounded(grad.cpu(), exact) >= 0.99
    valid = has_target(target_ids, logits.shape[2], IGNORED)
    assert (grad[~(valid.any(-1, keepdim=True) if shared else valid)] == 0).all()
    return grad
