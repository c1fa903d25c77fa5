"""The registered operators: `torch.ops.wmtp.weighted_loss`, `row_gradient`, `next_token_ce`.

To autograd, torch.compile and the profiler each is one opaque operator; which kernels run is its
`backend` argument ("cpu" or "triton"). Shapes and mathematics of the loss:

    logits [B, S, H, V], target_ids [B, S] int64, head_weights [B, S, H] or None,
    ref_ce [B, S-1] or None, normalizer [] or None  ->
        loss []                 sum row_scalar ce
        valid_mask [B, S]       sum_k w > 1e-8
        ce [B, S, H]
        token_loss [B, S]       sum_k w ce, over sum_k w for token_mean
        weight_sum [B, S]       sum_k w
        row_scalar [B, S, H]    dloss/dce
        row_max, log_sum [B, S, H]  whose sum is the row's log-sum-exp; added up they would lose
                                the digits that the gradient needs
        factors [2]             1 / denominator, and what grad is still to be multiplied with
        grad                    dloss/dlogits[b, t, k, :] = row_scalar (softmax - onehot)

`grad` is written in the pass that reads the logits, so backward has at most a factor left to
multiply. Whoever wants no more than ce leaves it to backward: row_gradient.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from wmtp.backends import KERNELS, multiply
from wmtp.inplace import Overwritten, note_overwritten
from wmtp.labels import has_target
from wmtp.layout import heads_share_storage, is_aligned
from wmtp.reduction import accumulation_dtype, counted_tokens

LOGITS_ARE_GONE = (
    "inplace=True has put the gradient of the loss where the logits were: neither "
    "ce_per_head nor the gradient itself can be differentiated then, pass inplace=False"
)

library = torch.library.Library("wmtp", "DEF")
library.define(
    "weighted_loss(Tensor logits, Tensor target_ids, Tensor? head_weights, Tensor? ref_ce, "
    "Tensor? normalizer, float temperature, bool signed, str reduction, int ignore_index, "
    "str backend, bool shared_heads, bool ahead, bool inplace)"
    " -> (Tensor loss, Tensor valid_mask, Tensor ce, Tensor token_loss, Tensor weight_sum, "
    "Tensor row_scalar, Tensor row_max, Tensor log_sum, Tensor factors, Tensor grad)"
)
library.define(
    "row_gradient(Tensor logits, Tensor target_ids, Tensor row_max, Tensor log_sum, "
    "Tensor row_scalar, int ignore_index, str backend, bool shared_heads) -> Tensor"
)
library.define(
    "next_token_ce(Tensor logits, Tensor target_ids, int ignore_index, str backend) -> Tensor"
)


def weighted_loss(
    logits: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None = None,
    ref_ce: Tensor | None = None,
    normalizer: Tensor | None = None,
    temperature: float = 1.0,
    signed: bool = False,
    *,
    reduction: str,
    ignore_index: int,
    backend: str,
    inplace: bool = False,
    loss_wanted: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, valid_mask, ce), differentiable in logits and head_weights; arguments as checked.

    `loss_wanted=False`: only ce will be differentiated, so no gradient is written ahead.
    """
    differentiated = torch.is_grad_enabled() and logits.requires_grad
    # Of a leaf every head's own gradient is wanted; of a view only their sum is ever used.
    of_heads = differentiated and logits.is_leaf and not inplace
    shared = heads_share_storage(logits) and not of_heads
    ahead = differentiated and loss_wanted
    traced = (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or type(logits) not in (Tensor, torch.nn.Parameter)
    )
    arguments = (
        *(logits, target_ids, head_weights, ref_ce, normalizer, temperature, signed, reduction),
        *(ignore_index, backend, shared, ahead, inplace and differentiated and not traced),
    )
    call = torch.ops.wmtp.weighted_loss if traced else _WeightedLoss.apply
    return call(*arguments)[:3]


def _rows(logits: Tensor, shared_heads: bool) -> Tensor:
    """The kernels walk along V one by one; every other stride is free."""
    if shared_heads:  # torch.compile may have materialised the heads on the way here
        return unit_stride(logits[:, :, :1]).expand(logits.shape)
    return logits.contiguous() if heads_share_storage(logits) else unit_stride(logits)


def unit_stride(logits: Tensor) -> Tensor:
    logits = aligned(logits.resolve_neg())
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def aligned(value):
    return value if not isinstance(value, Tensor) or is_aligned(value) else value.clone()


def _weighted_loss(logits, *arguments):
    *options, backend, shared_heads, ahead, inplace = arguments
    gradient = ("inplace" if inplace else "new") if ahead else "none"
    rows = _rows(logits, shared_heads)
    return KERNELS[backend].weighted_loss(rows, *map(aligned, options), gradient)


def _row_gradient(logits, *arguments):
    *options, backend, shared_heads = arguments
    return KERNELS[backend].row_gradient(_rows(logits, shared_heads), *map(aligned, options))


def _next_token_ce(logits, target_ids, ignore_index, backend):
    logits, target_ids = unit_stride(logits), aligned(target_ids)
    return KERNELS[backend].next_token_ce(logits, target_ids, ignore_index)


def _fake_weighted_loss(logits, *arguments):
    *_, shared_heads, ahead, _inplace = arguments
    tokens, rows, dtype = logits.shape[:2], logits.shape[:3], accumulation_dtype(logits)
    loss, mask = logits.new_empty((), dtype=dtype), logits.new_empty(tokens, dtype=torch.bool)
    shapes = (rows, tokens, tokens, rows, rows, rows, (2,))
    others = (logits.new_empty(shape, dtype=dtype) for shape in shapes)
    grad = _fake_gradient(logits, shared_heads) if ahead else logits.new_empty(0)
    return loss, mask, *others, grad


def _fake_gradient(logits, shared_heads):
    batch, length, heads, vocabulary = logits.shape
    return logits.new_empty(batch, length, 1 if shared_heads else heads, vocabulary)


def _fake_row_gradient(logits, *arguments):
    return _fake_gradient(logits, arguments[-1])


def _fake_next_token_ce(logits, *_):
    batch, length, _vocabulary = logits.shape
    return logits.new_empty(batch, max(length - 1, 0), dtype=accumulation_dtype(logits))


def save_for_backward(ctx, inputs, output, other_heads=()):
    logits, target_ids, _weights, _ref_ce, normalizer, _temperature, _signed = inputs[:7]
    ctx.reduction, ctx.ignore_index, ctx.backend, ctx.shared_heads, ahead, ctx.inplace = inputs[7:]
    ctx.constant_denominator = normalizer is not None or ctx.reduction != "weight_mean"
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], *output[3:])
    loss, _, ce, token_loss, weight_sum, *of_rows, factors, grad = output
    heads = (logits, *other_heads)
    ctx.overwritten = Overwritten(heads) if ahead and ctx.inplace else None
    ctx.grad = grad if ahead and not ctx.inplace else None
    if ctx.overwritten:  # which looks after them itself
        heads = (None,) * len(heads)
    # The caller may change his loss in place, `loss /= n`: copies.
    of_weights = (
        (loss.clone(), ce.clone(), token_loss, weight_sum) if ctx.needs_input_grad[2] else ()
    )
    ctx.save_for_backward(heads[0], target_ids, *of_rows, factors, *heads[1:], *of_weights)


def _backward(ctx, grad_loss, _valid_mask, grad_ce, *_):
    grad_logits = grad_weights = None
    if ctx.needs_input_grad[2] and grad_loss is not None:
        grad_weights = weights_gradient(ctx, grad_loss)
    if ctx.needs_input_grad[0] and not (grad_loss is None and grad_ce is None):
        grad_logits = _logits_gradient(ctx, grad_loss, grad_ce)
    return grad_logits, None, grad_weights, *(None,) * 10


def weights_gradient(ctx, grad_loss):
    _, target_ids, _, _, _, factors, *_, loss, ce, token_loss, weight_sum = ctx.saved_tensors
    slope = ce
    if ctx.reduction == "token_mean":  # d/dw of sum w ce / sum w, token by token
        slope = (ce - token_loss[..., None]) / weight_sum[..., None]
        slope = torch.where(counted_tokens(weight_sum)[..., None], slope, 0.0)
    elif not ctx.constant_denominator:  # and over the batch
        slope = ce - loss
    valid = has_target(target_ids, ce.shape[2], ctx.ignore_index)
    return torch.where(valid, grad_loss * factors[0] * slope, 0.0)


def _logits_gradient(ctx, grad_loss, grad_ce):
    logits, target_ids, row_scalar, row_max, log_sum, factors, *_ = ctx.saved_tensors
    # What was written ahead belongs to whoever gets it; a second backward is computed anew.
    grad, ctx.grad = ctx.grad, None
    if grad_ce is None and not torch.is_grad_enabled():
        if ctx.overwritten:
            return take_overwritten(ctx, grad_loss * factors[1])[0]
        if grad is not None:
            return multiply(grad, grad_loss * factors[1], ctx.backend).expand(logits.shape)
    elif ctx.overwritten:
        raise RuntimeError(LOGITS_ARE_GONE)
    del grad
    scalar = upstream(row_scalar, grad_loss, grad_ce)
    if ctx.shared_heads:
        # Autograd sums the heads' gradients into the one row; each is handed an equal part.
        scalar = scalar / logits.shape[2]
    arguments = (logits, target_ids, row_max, log_sum, scalar.contiguous(), ctx.ignore_index)
    grad = torch.ops.wmtp.row_gradient(*arguments, ctx.backend, ctx.shared_heads)
    return grad.expand(logits.shape)


def take_overwritten(ctx, factor):
    """The gradients that stand where the logits were, times what came from above []."""
    gradients = ctx.overwritten.take()
    for gradient in gradients:
        # `.data`: our own write, which note_overwritten counts, and not somebody else's.
        rows = gradient.data[:, :, :1] if ctx.shared_heads else gradient.data
        KERNELS[ctx.backend].multiply_(rows, factor)
        note_overwritten(gradient)
    return gradients


def upstream(row_scalar, grad_loss, grad_ce):
    """d/dce of what backward was called on, [B, S, H]."""
    scalar = torch.zeros_like(row_scalar) if grad_ce is None else grad_ce
    return scalar if grad_loss is None else scalar + row_scalar * grad_loss


class _WeightedLoss(torch.autograd.Function):
    """The operator in eager mode: the same functions without torch.library's 60 us a call, and with
    the permission to write over an input, which a differentiable operator does not have."""

    @staticmethod
    def forward(ctx, logits, *arguments):  # a setup_context of its own would cost another 30 us
        *output, grad = _weighted_loss(logits, *arguments)
        *_, ahead, inplace = arguments
        output = (*output, grad.new_empty(0) if ahead and inplace else grad)
        save_for_backward(ctx, (logits, *arguments), output)
        return output

    backward = staticmethod(_backward)


def no_second_derivative(ctx, *_):
    raise NotImplementedError(
        "the fused loss has no second derivative: use backend='eager' to differentiate twice"
    )


def register(name, kernel, fake, backward=None, setup_context=None):
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wmtp::{name}", fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(
            f"wmtp::{name}", backward, setup_context=setup_context, lib=library
        )


register("weighted_loss", _weighted_loss, _fake_weighted_loss, _backward, save_for_backward)
register("row_gradient", _row_gradient, _fake_row_gradient, no_second_derivative)
register("next_token_ce", _next_token_ce, _fake_next_token_ce)

next_token_ce = torch.ops.wmtp.next_token_ce
