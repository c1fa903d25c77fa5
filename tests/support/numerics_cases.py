"""Cases of scaled, capped, smoothed logits, and how close a backend has to come to fp64 on them."""

import torch
from torch import Tensor

from support.agreement import GRADIENT_TOLERANCE, LOSS_TOLERANCE, assert_no_worse, largest
from wmtp import fused_weighted_mtp_loss, td_head_weights
from wmtp.metrics import MeasuredLoss, Metrics
from wmtp.reference import compute_weighted_mtp_loss

# Of logits with a standard deviation of 3 many lie beyond the caps.
NUMERICS = {
    "none": {},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 2.5},
    "sigmoid": {"sigmoid_cap": (6.0, 0.5, 2.0)},
    "z_loss": {"z_loss": 0.1},
    "smoothing": {"label_smoothing": 0.2},
    "soft all": {"logit_scale": 1.7, "softcap": 5.0, "z_loss": 0.01, "label_smoothing": 0.1},
    "sigmoid all": {
        "logit_scale": 0.7, "sigmoid_cap": (5.0, -1.0, 3.0), "z_loss": 0.01, "label_smoothing": 0.1,
    },
}  # fmt: skip
WEIGHTINGS = ("uniform", "negative", "ref_ce", "critic")
FORMS = ("one", "list", "shared", "inplace", "strided")
COLUMNS = ((37, None), (64, 40), (131, 130))  # V and vocab_size
NEGATIVE = ("sum", "pair_mean", "head_mean")  # where weights may be


class _Capped(torch.autograd.Function):
    """a tanh(u) + b of u = slope logits + offset, in float64; its slope a / cosh(u)^2 keeps its
    digits where tanh is 1, which autograd's 1 - tanh^2 does not."""

    @staticmethod
    def forward(ctx, logits, slope, offset, a, b):
        steps = slope * logits + offset
        ctx.save_for_backward(steps)
        ctx.steepest = slope * a
        return a * steps.tanh() + b

    @staticmethod
    def backward(ctx, gradient):
        decay = (-2 * ctx.saved_tensors[0].abs()).exp()
        return gradient * (ctx.steepest * 4 * decay / (1 + decay).square()), None, None, None, None


def truth(logits, ids, *, logit_scale=1.0, softcap=None, sigmoid_cap=None, **others):
    """The loss in eager torch of float64 logits, scaled and capped here."""
    given = logits
    if softcap is not None:
        logits = _Capped.apply(logits, logit_scale / softcap, 0.0, softcap, 0.0)
    elif sigmoid_cap is not None:
        a, b, c = sigmoid_cap
        logits = _Capped.apply(logits, logit_scale / (2 * c), b / (2 * c), a / 2, a / 2)
    else:
        logits = logits * logit_scale
    result = compute_weighted_mtp_loss(logits, ids, horizon=logits.shape[2], **others)
    if result.metrics is None:
        return result
    # Beyond a cap logits become equal that are not: the largest is that of those given.
    plain = compute_weighted_mtp_loss(given.detach(), ids, horizon=logits.shape[2], **others)
    return MeasuredLoss(*result, result.metrics._replace(correct=plain.metrics.correct))


def largest_x(logits: Tensor, numerics: dict) -> float:
    """Of it at most: its rounding is seen in whatever is exponentiated."""
    cap = numerics.get("softcap", numerics.get("sigmoid_cap", (None,)))
    cap = cap[0] if isinstance(cap, tuple) else cap
    return cap or largest(logits) * numerics.get("logit_scale", 1.0)


def largest_row_gradient(leaf, ids, options, upstream, form, heads) -> float:
    """No row's gradient is larger than this, of terms that may cancel in it."""
    eps, z = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    leaf = leaf.detach().requires_grad_()
    result = truth(arranged(leaf, form, heads), ids, metrics=True, **options)
    (of_ce,) = torch.autograd.grad(result.loss, [result.ce_per_head])
    a, _, c = options.get("sigmoid_cap", (4.0, 0.0, 1.0))
    steepest = options.get("logit_scale", 1.0) * a / (4 * c)
    of_loss = largest(of_ce) / (1 - eps) * (1 + 2 * z * largest(result.metrics.lse))
    return steepest * (abs(upstream[0]) * of_loss + largest(upstream[1]))


def possible(weighting: str, reduction: str) -> bool:
    return weighting != "negative" or reduction in NEGATIVE


def labels(batch: int, length: int, tokens: int) -> Tensor:
    ids = torch.randint(tokens, (batch, length))
    ids[torch.rand(batch, length) < 0.2] = -100
    return ids


def weighted(weighting: str, ids: Tensor, heads: int, dtype=torch.float64) -> dict[str, Tensor]:
    """The arguments of a weighting, in the dtype of the truth."""
    batch, length = ids.shape
    if weighting == "negative":
        weights = torch.randn(batch, length, heads, dtype=dtype)
        weights[torch.rand(batch, length) < 0.1] = 0.0
        return {"head_weights": weights}
    if weighting == "critic":
        return {"head_weights": td_head_weights(torch.randn(batch, length).to(dtype), ids, heads)}
    if weighting == "ref_ce":
        return {"ref_ce": 8 * torch.rand(batch, length - 1, dtype=dtype)}
    return {}


def moved(options: dict, device: str, dtype: torch.dtype) -> dict:
    """Tensors there, the floating ones in that dtype."""

    def to(value):
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return {name: to(value) for name, value in options.items()}


def arranged(leaf: Tensor, form: str, heads: int):
    """The logits of a leaf [B, S, H, V], or [B, S, V] where the heads share them."""
    if form == "shared":
        return leaf[:, :, None].expand(-1, -1, heads, -1)
    if form == "list":
        return [leaf[:, :, k] for k in range(heads)]
    if form == "strided":
        return torch.nn.functional.pad(leaf, (1, 2))[..., 1:-2]
    return leaf * 1


def answers(function, leaf, ids, options, upstream, form="one", heads=3, **more):
    """The result, and the gradients of `upstream[0] loss`, and of that and `sum upstream[1] ce`."""
    leaf = leaf.detach().requires_grad_()

    def call():
        return function(arranged(leaf, form, heads), ids, metrics=True, **options, **more)

    result = call()
    loss = result.loss * upstream[0]
    if form == "inplace":  # which gives the logits to one backward
        return result, [torch.autograd.grad(loss, leaf)[0]]
    other = call()
    both = other.loss * upstream[0] + (other.ce_per_head * upstream[1].to(result.loss)).sum()
    return result, [torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(both, leaf)[0]]


def assert_metrics_agree(found: Metrics, wanted: Metrics, rtol: float, atol: float) -> None:
    for name in ("correct", "valid"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    for name in ("lse", "entropy", "weights", "denominator"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert ours.shape == theirs.shape, name
        assert not ours.requires_grad, name
        torch.testing.assert_close(
            ours.double(), theirs.double(), rtol=rtol, atol=atol, equal_nan=True,
            msg=lambda told, name=name: f"{name}: {told}",
        )  # fmt: skip


def assert_agrees(
    target, dtype, numerics, weighting, reduction, form="one", columns=(37, None), std=3.0,
    shape=(2, 5, 3),
):  # fmt: skip
    """The loss on logits with all its answers, against fp64 in eager torch; its gradients no worse
    than eager torch's in its dtype."""
    backend, device = target
    batch, length, heads = shape
    columns, vocab_size = columns
    ids = labels(batch, length, vocab_size or columns)
    row_shape = (batch, length, columns) if form == "shared" else (*shape, columns)
    leaf = (std * torch.randn(row_shape)).to(device, dtype)
    upstream = torch.randn(()).item(), (torch.randn(shape) / 9).to(device)
    options = weighted(weighting, ids, heads) | numerics | {"reduction": reduction}
    options |= {} if vocab_size is None else {"vocab_size": vocab_size}
    ids = ids.to(device)
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    more = {"backend": backend, "inplace": form == "inplace"}
    how = moved(options, device, acc)
    result, found = answers(fused_weighted_mtp_loss, leaf, ids, how, upstream, form, heads, **more)

    as_one = "one" if form == "list" else form
    of_truth = (ids, how, upstream, as_one, heads)
    wide = moved(how, device, torch.float64)
    exact, true = answers(truth, leaf.double(), ids, wide, upstream, as_one, heads)
    _, eager = answers(compute_weighted_mtp_loss, leaf, *of_truth, horizon=heads)
    # x is a sum of terms as large as the cap, or the logits, and rounded so.
    rounding = 4 * torch.finfo(acc).eps * max(1.0, largest_x(leaf, numerics))
    rtol = LOSS_TOLERANCE.get(dtype, 2e-5)
    atol = rtol * (1e-1 if backend == "triton" else 1e-2) + rounding
    scale = largest_row_gradient(leaf.double(), ids, wide, upstream, as_one, heads)
    of_loss = atol * max(1.0, largest(how.get("head_weights", leaf.new_ones(1))) * ids.numel())
    torch.testing.assert_close(result.loss.double(), exact.loss, rtol=rtol, atol=of_loss)
    torch.testing.assert_close(result.ce_per_head.double(), exact.ce_per_head, rtol=rtol, atol=atol)
    assert torch.equal(result.valid_mask, exact.valid_mask)
    of_weights = 10 if weighting == "ref_ce" else 1  # these see the rounding of ce
    assert_metrics_agree(result.metrics, exact.metrics, of_weights * rtol, of_weights * atol)
    for ours, theirs, wanted in zip(found, eager, true, strict=True):
        assert ours.dtype == dtype
        allowed = GRADIENT_TOLERANCE[dtype] * largest(wanted) + rounding * scale
        assert_no_worse(ours, theirs, wanted, allowed)
        if vocab_size is not None:
            assert torch.count_nonzero(ours[..., vocab_size:]) == 0
        if form != "shared":
            assert torch.count_nonzero(ours[~result.metrics.valid]) == 0
