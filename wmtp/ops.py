"""The registered operators: `torch.ops.wmtp.weighted_loss`, `loss_gradient`, `row_gradient`,
`next_token_ce`.

To autograd, torch.compile and the profiler each is one opaque operator; which kernels run is its
`backend` argument ("cpu" or "triton"). Shapes and mathematics of the loss:

    logits [B, S, H, V], target_ids [B, S] int64, head_weights [B, S, H] or None,
    ref_ce [B, S-1] or None, normalizer [] or None, temperature [] or None  ->
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
multiply. Whoever wants no more than ce leaves it to backward: row_gradient. So does whoever packs
what is saved for backward, as checkpointing does: see `gradients_ahead`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from wmtp.backends import KERNELS, multiply
from wmtp.derivatives import constant_of, no_second_derivative, upstream, weights_gradient
from wmtp.inplace import GRADIENT_IS_TAKEN, Overwritten
from wmtp.layout import heads_share_storage, is_aligned
from wmtp.reduction import accumulation_dtype
from wmtp.transforms import is_batched

LOGITS_ARE_GONE = (
    "inplace=True has put the gradient of the loss where the logits were: it serves one upstream "
    "gradient, not a batch of them, and neither it nor ce_per_head can be differentiated then, "
    "pass inplace=False"
)

library = torch.library.Library("wmtp", "DEF")
library.define(
    "weighted_loss(Tensor logits, Tensor target_ids, Tensor? head_weights, Tensor? ref_ce, "
    "Tensor? normalizer, Tensor? temperature, bool signed, str reduction, int ignore_index, "
    "str backend, bool shared_heads, bool ahead, bool inplace)"
    " -> (Tensor loss, Tensor valid_mask, Tensor ce, Tensor token_loss, Tensor weight_sum, "
    "Tensor row_scalar, Tensor row_max, Tensor log_sum, Tensor factors, Tensor grad)",
    tags=torch.Tag.cudagraph_unsafe,  # no graph sees the memory of what waits
)
library.define(
    "loss_gradient(Tensor logits, Tensor target_ids, Tensor row_max, Tensor log_sum, "
    "Tensor row_scalar, Tensor factors, Tensor grad_loss, int ignore_index, str backend, "
    "bool shared_heads) -> Tensor",
    tags=torch.Tag.cudagraph_unsafe,
)
library.define(
    "row_gradient(Tensor logits, Tensor target_ids, Tensor row_max, Tensor log_sum, "
    "Tensor row_scalar, int ignore_index, str backend, bool shared_heads) -> Tensor"
)
library.define(
    "next_token_ce(Tensor logits, Tensor target_ids, int ignore_index, str backend) -> Tensor"
)


class Saved(NamedTuple):
    """What backward reads. Checkpointing lets it be unpacked once a backward: here, by name."""

    target_ids: Tensor
    row_scalar: Tensor
    row_max: Tensor
    log_sum: Tensor
    factors: Tensor
    ce: Tensor | None  # this and the next two: for the gradient of the weights
    head_weights: Tensor | None
    normalizer: Tensor | None
    logits: tuple[Tensor, ...]  # a tensor, or a list's; none where they are overwritten


def gradients_ahead() -> bool:
    """Whether gradients are made in the forward call. Where somebody packs what is saved for
    backward, checkpointing for one, they would be held beside it, and checkpointed made twice."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def weighted_loss(
    logits: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None = None,
    ref_ce: Tensor | None = None,
    normalizer: Tensor | None = None,
    temperature: Tensor | None = None,
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
    ahead = differentiated and loss_wanted and gradients_ahead()
    traced = (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or type(logits) not in (Tensor, torch.nn.Parameter)
    )
    arguments = (
        *(logits, target_ids, head_weights, ref_ce, normalizer, temperature, signed, reduction),
        *(ignore_index, backend, shared, ahead, inplace and differentiated and not traced),
    )
    if traced:
        return torch.ops.wmtp.weighted_loss(*arguments)[:3]
    learning = head_weights is not None and head_weights.requires_grad
    recorded = differentiated or (torch.is_grad_enabled() and learning)
    return (_WeightedLoss.apply if recorded else _weighted_loss)(*arguments)[:3]


def _rows(logits: Tensor, shared_heads: bool) -> Tensor:
    """The kernels walk along V one by one; every other stride is free."""
    if shared_heads:  # torch.compile may have materialised the heads on the way here
        return unit_stride(logits[:, :, :1]).expand(logits.shape)
    return logits.contiguous() if heads_share_storage(logits) else unit_stride(logits)


def unit_stride(logits: Tensor) -> Tensor:
    logits = aligned(logits.resolve_neg())
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def aligned(value):
    return value.clone() if isinstance(value, Tensor) and not is_aligned(value) else value


def _weighted_loss(logits, *arguments):
    *options, backend, shared_heads, ahead, inplace = arguments
    gradient = ("inplace" if inplace else "new") if ahead else "none"
    rows = _rows(logits, shared_heads)
    return KERNELS[backend].weighted_loss(rows, *map(aligned, options), gradient)


def _weighted_loss_traced(logits, *arguments):
    *output, grad = _weighted_loss(logits, *arguments)
    row_scalar = output[5]
    row_scalar.untyped_storage()._wmtp_gradient = grad  # as long as the graph keeps row_scalar
    return *output, grad.new_empty(0)


def _loss_gradient(logits, *arguments):
    *saved, row_scalar, factors, grad_loss, ignore_index, backend, shared_heads = arguments
    grad = vars(row_scalar.untyped_storage()).pop("_wmtp_gradient", None)
    if grad is not None:
        return multiply(grad, _left_over(grad_loss, factors, logits.dtype), backend)
    row_scalar = _for_each_row(upstream(row_scalar, grad_loss, None), shared_heads)
    return _row_gradient(logits, *saved, row_scalar, ignore_index, backend, shared_heads)


def _left_over(grad_loss, factors, dtype):
    """What a gradient that was written ahead is still to be multiplied with."""
    return grad_loss * factors[1] if dtype == torch.float16 else grad_loss  # elsewhere it is 1


def _for_each_row(row_scalar, shared_heads):
    """Autograd sums the heads' gradients into the one row; each is handed an equal part."""
    return (row_scalar / row_scalar.shape[2] if shared_heads else row_scalar).contiguous()


def _row_gradient(logits, *arguments):
    *options, backend, shared_heads = arguments
    return KERNELS[backend].row_gradient(_rows(logits, shared_heads), *map(aligned, options))


def _next_token_ce(logits, target_ids, ignore_index, backend):
    logits, target_ids = unit_stride(logits), aligned(target_ids)
    return KERNELS[backend].next_token_ce(logits, target_ids, ignore_index)


def _fake_weighted_loss(logits, *arguments):
    tokens, rows, dtype = logits.shape[:2], logits.shape[:3], accumulation_dtype(logits)
    loss, mask = logits.new_empty((), dtype=dtype), logits.new_empty(tokens, dtype=torch.bool)
    shapes = (rows, tokens, tokens, rows, rows, rows, (2,))
    others = (logits.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, mask, *others, logits.new_empty(0)


def _fake_gradient(logits, *arguments):
    *_, shared_heads = arguments
    batch, length, heads, vocabulary = logits.shape
    return logits.new_empty(batch, length, 1 if shared_heads else heads, vocabulary)


def _fake_next_token_ce(logits, *_):
    batch, length, _vocabulary = logits.shape
    return logits.new_empty(batch, max(length - 1, 0), dtype=accumulation_dtype(logits))


def save_for_backward(ctx, inputs, output, other_heads=()):
    logits, target_ids, head_weights, _ref_ce, normalizer, *_ = inputs[:7]
    ctx.reduction, ctx.ignore_index, ctx.backend, ctx.shared_heads, ahead, ctx.inplace = inputs[7:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], *output[3:])
    _loss, _, ce, _, _, *statistics, factors, grad = output
    heads = (logits, *other_heads)
    ctx.heads, ctx.shape, ctx.dtype = len(heads), logits.shape, logits.dtype
    ctx.listed = logits.dim() == 3
    ctx.logits_wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[len(inputs) :])
    ctx.spent = False  # in place, backward is called once
    ctx.waits = False  # with row_scalar
    ctx.written = grad if ahead else None  # belongs to whoever gets it: handed out once
    if ahead and ctx.inplace:
        ctx.written, heads = Overwritten(heads), ()
    of_weights = (None, None, None)
    if ctx.needs_input_grad[2]:
        of_weights = (ce.clone(), head_weights, normalizer)  # the caller may change his ce in place
    ctx.save_for_backward(target_ids, *statistics, factors, *of_weights, *heads)


def _save_traced(ctx, inputs, output):
    save_for_backward(ctx, inputs, output)
    ctx.waits = ctx.written is not None
    ctx.written = None


def _backward(ctx, grad_loss, _valid_mask, grad_ce, *_):
    (grad_logits,), grad_weights = gradients(ctx, grad_loss, grad_ce)
    return grad_logits, None, grad_weights, *(None,) * 10


def gradients(ctx, grad_loss, grad_ce):
    """Those of the logits, one or a list, and of head_weights; None where there is none."""
    of_logits, of_weights = [None] * ctx.heads, None
    if grad_loss is None and grad_ce is None:
        return of_logits, of_weights
    differentiable = torch.is_grad_enabled()
    if ctx.inplace:
        if ctx.spent:
            raise RuntimeError(GRADIENT_IS_TAKEN)
        if differentiable or grad_ce is not None or is_batched(grad_loss):
            raise RuntimeError(LOGITS_ARE_GONE)
        ctx.spent = True
    tensors, named = ctx.saved_tensors, len(Saved._fields) - 1
    saved = Saved._make((*tensors[:named], tensors[named:]))
    if ctx.needs_input_grad[2] and grad_loss is not None:
        ce = _cross_entropies(ctx, saved) if differentiable else saved.ce
        of_weights = weights_gradient(saved, ce, grad_loss, ctx.reduction, ctx.ignore_index)
    written, ctx.written = ctx.written, None
    if not ctx.logits_wanted:
        return of_logits, of_weights
    if grad_ce is None and not differentiable:
        if ctx.waits:
            return [_waiting(ctx, saved, grad_loss)], of_weights
        if written is not None:
            factor = _left_over(grad_loss, saved.factors, ctx.dtype)
            return _handed_out(ctx, written, factor), of_weights
    del written  # before there is another
    return _made_anew(ctx, saved, grad_loss, grad_ce), of_weights


def _waiting(ctx, saved, grad_loss):
    of_rows = (saved.target_ids, saved.row_max, saved.log_sum, saved.row_scalar, saved.factors)
    how = (ctx.ignore_index, ctx.backend, ctx.shared_heads)
    grad = torch.ops.wmtp.loss_gradient(*saved.logits, *of_rows, grad_loss, *how)
    return grad.expand(ctx.shape)


def _handed_out(ctx, written, factor):
    if not ctx.inplace:
        grad = multiply(written, factor, ctx.backend)
        return grad.unbind(2) if ctx.listed else [grad.expand(ctx.shape)]
    parts = written.take()
    for part in parts:
        # `.data`: our own write, and not somebody else's.
        multiply(part.data[:, :, :1] if ctx.shared_heads else part.data, factor, ctx.backend)
    written.multiplied()
    return parts


def _made_anew(ctx, saved, grad_loss, grad_ce):
    logits = _one_tensor(saved.logits)
    row_scalar = upstream(saved.row_scalar, grad_loss, grad_ce)
    row_scalar = constant_of(_for_each_row(row_scalar, ctx.shared_heads), saved.head_weights)
    grad = torch.ops.wmtp.row_gradient(
        *(logits, saved.target_ids, saved.row_max, saved.log_sum, row_scalar),
        *(ctx.ignore_index, ctx.backend, ctx.shared_heads),
    ).expand(logits.shape)
    return grad.unbind(2) if ctx.listed else [grad]


def _one_tensor(logits: Sequence[Tensor]) -> Tensor:
    return logits[0] if logits[0].dim() == 4 else torch.stack(tuple(logits), 2)


def _cross_entropies(ctx, saved):
    """Those of forward once more, for they have to be differentiated there."""
    how = {"ignore_index": ctx.ignore_index, "backend": ctx.backend}
    logits = _one_tensor(saved.logits)
    return weighted_loss(logits, saved.target_ids, reduction="sum", loss_wanted=False, **how)[2]


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


def register(name, kernel, fake, backward=None, setup_context=None):
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wmtp::{name}", fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(
            f"wmtp::{name}", backward, setup_context=setup_context, lib=library
        )


register("weighted_loss", _weighted_loss_traced, _fake_weighted_loss, _backward, _save_traced)
register("loss_gradient", _loss_gradient, _fake_gradient)
register("row_gradient", _row_gradient, _fake_gradient, no_second_derivative)
register("next_token_ce", _next_token_ce, _fake_next_token_ce)

next_token_ce = torch.ops.wmtp.next_token_ce
