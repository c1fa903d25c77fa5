"""The backward of the loss on logits: what is saved for it, and the gradients it hands out.

Those of the logits were mostly written with the loss, and belong to whoever gets them: handed out
once. Others are made anew from the rows' statistics. B batch, S sequence, H heads, V vocabulary.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wmtp.backends import multiply
from wmtp.inplace import GRADIENT_IS_TAKEN, Overwritten
from wmtp.layout import one_tensor
from wmtp.ops.derivatives import (
    Upstream,
    constant_of,
    for_each_row,
    left_over,
    weights_gradient,
)
from wmtp.records import Inputs, Outputs, RowInputs, Settings, flat, row_settings
from wmtp.transforms import is_batched
from wmtp.weightings import Uniform

LOGITS_ARE_GONE = (
    "inplace=True has put the gradient of the loss where the logits were: it serves one upstream "
    "gradient, not a batch of them, and neither it nor ce_per_head can be differentiated then, "
    "pass inplace=False"
)


class Wanted(NamedTuple):
    """Which gradients the graph asks for."""

    logits: bool
    head_weights: bool


class Saved(NamedTuple):
    """What backward reads, unpacked once, by name: checkpointing allows no second time."""

    target_ids: Tensor
    row_scalar: Tensor
    row_max: Tensor
    log_sum: Tensor
    factors: Tensor
    row_loss: Tensor | None  # this and the next three: for the gradient of the weights
    head_weights: Tensor | None
    head_scale: Tensor | None
    normalizer: Tensor | None
    logits: tuple[Tensor, ...]  # a tensor, or a list's; none where they are overwritten


def save_for_backward(
    ctx: Any, inputs: Inputs, settings: Settings, out: Outputs, wanted: Wanted
) -> None:
    ctx.settings, ctx.wanted = settings, wanted
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(out.valid_mask, *out[4:])
    logits = tuple(inputs.logits)
    ctx.heads, ctx.shape, ctx.dtype = len(logits), logits[0].shape, logits[0].dtype
    ctx.listed = logits[0].dim() == 3
    ctx.spent = False
    ctx.written = out.grad if settings.gradient != "none" else None
    if settings.gradient == "inplace":
        ctx.written, logits = Overwritten(logits), ()
    statistics = (out.row_scalar, out.row_max, out.log_sum, out.factors)
    of_weights: tuple[Tensor | None, ...] = (None,) * 4
    if wanted.head_weights:  # the caller may change his ce in place
        terms = (inputs.head_scale, inputs.normalizer)
        row_loss = out.row_loss if settings.numerics.adds_terms else out.ce
        of_weights = (row_loss.clone(), inputs.head_weights, *terms)
    ctx.save_for_backward(inputs.target_ids, *statistics, *of_weights, *logits)


def gradients(ctx: Any, upstream: Upstream) -> tuple[Sequence[Tensor | None], Tensor | None]:
    """Those of the logits, one or a list, and of head_weights; None where there is none."""
    of_logits: Sequence[Tensor | None] = [None] * ctx.heads
    of_weights = None
    if upstream.none:
        return of_logits, of_weights
    differentiable = torch.is_grad_enabled()
    if ctx.settings.once:
        if ctx.spent:
            raise RuntimeError(GRADIENT_IS_TAKEN)
        if differentiable or upstream.of_pairs is not None or is_batched(upstream.loss):
            raise RuntimeError(LOGITS_ARE_GONE)
        ctx.spent = True
    tensors, named = ctx.saved_tensors, len(Saved._fields) - 1
    saved = Saved._make((*tensors[:named], tensors[named:]))
    if ctx.wanted.head_weights and upstream.loss is not None:
        row_loss = _row_losses(ctx, saved) if differentiable else saved.row_loss
        of_weights = weights_gradient(saved, row_loss, upstream.loss, ctx.settings)
    written, ctx.written = ctx.written, None
    if not ctx.wanted.logits:
        return of_logits, of_weights
    if upstream.loss is not None and upstream.of_pairs is None and not differentiable:
        if ctx.waits:
            return _waiting(ctx, saved, upstream.loss), of_weights
        if written is not None:
            factor = left_over(upstream.loss, saved.factors, ctx.dtype)
            return _handed_out(ctx, written, factor), of_weights
    del written  # before there is another
    return _made_anew(ctx, saved, upstream), of_weights


def _waiting(ctx: Any, saved: Saved, grad_loss: Tensor) -> Sequence[Tensor]:
    """What traced code has left beside row_scalar."""
    rows = (saved.target_ids, saved.row_max, saved.log_sum, saved.row_scalar, saved.factors)
    how = flat(row_settings(ctx.settings))
    grad = torch.ops.wmtp.loss_gradient([*saved.logits], *rows, grad_loss, *how)
    return _by_head(ctx, grad)


def _handed_out(ctx: Any, written: Tensor | Overwritten, factor: Tensor | None) -> Sequence[Tensor]:
    backend, shared = ctx.settings.backend, ctx.settings.shared_heads
    if isinstance(written, Tensor):
        return _by_head(ctx, multiply(written, factor, backend))
    parts = written.take()
    for part in parts:
        # `.data`: our own write, and not somebody else's.
        multiply(part.data[:, :, :1] if shared else part.data, factor, backend)
    written.multiplied()
    return parts


def _made_anew(ctx: Any, saved: Saved, upstream: Upstream) -> Sequence[Tensor]:
    settings = row_settings(ctx.settings)
    found = []
    for row_scalar, numerics in upstream.sources(saved.row_scalar, settings.numerics):
        row_scalar = for_each_row(row_scalar, settings.shared_heads)
        rows = RowInputs(
            logits=one_tensor(saved.logits),
            target_ids=saved.target_ids,
            row_max=saved.row_max,
            log_sum=saved.log_sum,
            row_scalar=constant_of(row_scalar, saved.head_weights),
        )
        how = flat(replace(settings, numerics=numerics))
        found.append(torch.ops.wmtp.row_gradient(*flat(rows), *how))
    return _by_head(ctx, functools.reduce(torch.add, found))


def _by_head(ctx: Any, grad: Tensor) -> Sequence[Tensor]:
    """Of [B, S, H, V], or of shared heads [B, S, 1, V], what each of the logits gets."""
    return grad.unbind(2) if ctx.listed else [grad.expand(ctx.shape)]


def _row_losses(ctx: Any, saved: Saved) -> Tensor:
    """Those of forward once more, for they have to be differentiated there."""
    inputs = Inputs(logits=[*saved.logits], target_ids=saved.target_ids)
    how = {"rule": Uniform().key(), "reduction": "sum", "gradient": "none", "metrics": False}
    settings = replace(ctx.settings, checked=False, once=False, **how)
    out = Outputs(*torch.ops.wmtp.weighted_loss(*flat(inputs, settings)))
    return out.row_loss if settings.numerics.adds_terms else out.ce
