"""The registered operators: `torch.ops.wmtp.token_loss`, `row_gradient`, `next_token_ce`.

To autograd, torch.compile and the profiler each is one opaque operator; which kernels run is its
`backend` argument ("cpu" or "triton"). Shapes, dtypes and the mathematics of each kernel call:

    logits [B, S, H, V], target_ids [B, S] int64, head_weights [B, S, H] or None,
    ref_ce [B, S-1] or None  ->
        token_loss [B, S]       sum_k row_scalar ce
        row_scalar [B, S, H]    w / sum_k w when `normalize`, else w
        weight_sum [B, S]       sum_k w
        ce, lse    [B, S, H]

    dtoken_loss/dlogits[b, t, k, :] = row_scalar[b, t, k] (softmax - onehot)
"""

import torch
from torch import Tensor

from wmtp.backends import KERNELS
from wmtp.labels import has_target
from wmtp.reference import accumulation_dtype, counted_tokens

_library = torch.library.Library("wmtp", "DEF")
_library.define(
    "token_loss(Tensor logits, Tensor target_ids, Tensor? head_weights, Tensor? ref_ce, "
    "float temperature, bool signed, bool normalize, int ignore_index, str backend, bool inplace)"
    " -> (Tensor token_loss, Tensor row_scalar, Tensor weight_sum, Tensor ce, Tensor lse)"
)
_library.define(
    "row_gradient(Tensor logits, Tensor target_ids, Tensor lse, Tensor row_scalar, "
    "int ignore_index, str backend, bool shared_heads) -> Tensor"
)
_library.define(
    "row_gradient_(Tensor(a!) logits, Tensor target_ids, Tensor lse, Tensor row_scalar, "
    "int ignore_index, str backend) -> ()"
)
_library.define(
    "next_token_ce(Tensor logits, Tensor target_ids, int ignore_index, str backend) -> Tensor"
)


def heads_share_storage(logits: Tensor) -> bool:
    """One row of logits per token, seen H times: `logits[:, :, None].expand(-1, -1, H, -1)`."""
    return logits.shape[2] > 1 and logits.stride(2) == 0


def _unit_stride(logits: Tensor, shared_heads: bool = False) -> Tensor:
    """The kernels walk along V one by one; every other stride is free."""
    if shared_heads:  # torch.compile may have materialised the heads on the way here
        return _unit_stride(logits[:, :, :1]).expand(logits.shape)
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _token_loss(
    logits, target_ids, head_weights, ref_ce, temperature, signed, normalize, ignore_index,
    backend, inplace,
):  # fmt: skip
    logits = _unit_stride(logits, heads_share_storage(logits))
    return KERNELS[backend].token_loss(
        logits,
        target_ids,
        head_weights,
        ref_ce,
        temperature,
        signed,
        normalize,
        ignore_index,
    )


def _row_gradient(logits, target_ids, lse, row_scalar, ignore_index, backend, shared_heads):
    logits = _unit_stride(logits, shared_heads)
    if heads_share_storage(logits) and not shared_heads:
        logits = logits.contiguous()
    return KERNELS[backend].row_gradient(logits, target_ids, lse, row_scalar, ignore_index)


def _row_gradient_(logits, target_ids, lse, row_scalar, ignore_index, backend):
    KERNELS[backend].row_gradient(logits, target_ids, lse, row_scalar, ignore_index, inplace=True)


def _next_token_ce(logits, target_ids, ignore_index, backend):
    return KERNELS[backend].next_token_ce(_unit_stride(logits), target_ids, ignore_index)


def _fake_token_loss(logits, *_):
    tokens = logits.new_empty(logits.shape[:2], dtype=accumulation_dtype(logits))
    rows = logits.new_empty(logits.shape[:3], dtype=accumulation_dtype(logits))
    return tokens, rows, tokens.clone(), rows.clone(), rows.clone()


def _fake_row_gradient(logits, target_ids, lse, row_scalar, ignore_index, backend, shared_heads):
    batch, length, heads, vocabulary = logits.shape
    return logits.new_empty(batch, length, 1 if shared_heads else heads, vocabulary)


def _fake_row_gradient_(*_):
    return None


def _fake_next_token_ce(logits, *_):
    batch, length, _vocabulary = logits.shape
    return logits.new_empty(batch, max(length - 1, 0), dtype=accumulation_dtype(logits))


def _save_for_backward(ctx, inputs, output):
    logits, target_ids = inputs[:2]
    ctx.normalize, ctx.ignore_index, ctx.backend, ctx.inplace = inputs[6:]
    # Of a leaf every head's own gradient is wanted; of a view only their sum is ever used.
    ctx.shared_heads = heads_share_storage(logits) and (ctx.inplace or not logits.is_leaf)
    token_loss, row_scalar, weight_sum, ce, lse = output
    ctx.mark_non_differentiable(row_scalar, lse)
    ctx.save_for_backward(logits, target_ids, lse, row_scalar, token_loss, weight_sum, ce)


def _backward(ctx, grad_token_loss, _row_scalar, grad_weight_sum, grad_ce, _lse):
    logits, target_ids, lse, row_scalar, token_loss, weight_sum, ce = ctx.saved_tensors
    grad_logits = grad_weights = None
    if ctx.needs_input_grad[2]:
        slope = ce
        if ctx.normalize:  # d/dw of sum w ce / sum w
            slope = (ce - token_loss[..., None]) / weight_sum[..., None]
            slope = torch.where(counted_tokens(weight_sum)[..., None], slope, 0.0)
        grad_weights = grad_token_loss[..., None] * slope + grad_weight_sum[..., None]
        grad_weights = torch.where(
            has_target(target_ids, ce.shape[2], ctx.ignore_index), grad_weights, 0.0
        )
    if ctx.needs_input_grad[0]:
        scalar = grad_token_loss[..., None] * row_scalar + grad_ce
        grad_logits = _logits_gradient(ctx, logits, target_ids, lse, scalar)
    return grad_logits, None, grad_weights, *(None,) * 7


def _logits_gradient(ctx, logits, target_ids, lse, scalar):
    if ctx.shared_heads:
        # Autograd sums the heads' gradients into the one row; each is handed an equal part.
        scalar = scalar / logits.shape[2]
    if ctx.inplace:
        torch.ops.wmtp.row_gradient_(logits, target_ids, lse, scalar, ctx.ignore_index, ctx.backend)
        # From here on whoever saved these logits, a second backward too, gets autograd's error.
        torch.autograd.graph.increment_version(logits)
        return logits.detach()
    grad = torch.ops.wmtp.row_gradient(
        logits, target_ids, lse, scalar, ctx.ignore_index, ctx.backend, ctx.shared_heads
    )
    return grad.expand(logits.shape)


def _no_second_derivative(ctx, *_):
    raise NotImplementedError(
        "the fused loss has no second derivative: use backend='eager' to differentiate twice"
    )


def _register(name, kernel, fake, backward=None, setup_context=None):
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wmtp::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"wmtp::{name}", backward, setup_context=setup_context, lib=_library
        )


_register("token_loss", _token_loss, _fake_token_loss, _backward, _save_for_backward)
_register("row_gradient", _row_gradient, _fake_row_gradient, _no_second_derivative)
_register("row_gradient_", _row_gradient_, _fake_row_gradient_)
_register("next_token_ce", _next_token_ce, _fake_next_token_ce)

token_loss = torch.ops.wmtp.token_loss
next_token_ce = torch.ops.wmtp.next_token_ce
