"""The registered operators of the linear loss: `torch.ops.wmtp.linear_loss`, `linear_gradient`.

To autograd, torch.compile and the profiler each is one opaque operator.

    hidden [B, S, H, D], weight [V, D], bias [V] or None, target_ids [B, S] int64,
    head_weights [B, S, H] or None, ref_ce [B, S-1] or None, normalizer [] or None  ->
        loss [], valid_mask [B, S], ce [B, S, H]
        row_scalar [B, S, H]    dloss/dce
        unscale []              a factor of the sums that is left to backward: 1 but for float16
        hidden_sum [B, S, H, D], weight_sum [V, D], bias_sum [V]    see `chunks.Gradients`

The sums are made while the logits are there, if `ahead`, so backward has only factors left to
multiply. They are handed out once: a second backward, and whoever differentiates ce, has them made
anew. The products' dtype is an argument: no autocast around a call or its backward changes it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wmtp import ops, reference
from wmtp.chunks import (
    Gradients,
    Linear,
    Wanted,
    find_unscale,
    finish_gradients,
    make_plan,
    run_chunks,
)
from wmtp.derivatives import constant_of, no_second_derivative, upstream, weights_gradient
from wmtp.exact_zero import product
from wmtp.labels import has_target
from wmtp.reduction import accumulation_dtype, counted_tokens, to_row_scalar, to_token_scalar

PRODUCT = 10  # arguments that both operators begin with:
_PRODUCT = (
    "Tensor hidden, Tensor weight, Tensor? bias, ScalarType dtype, ScalarType accum_dtype, "
    "SymInt? chunk_bytes, str backend, Tensor target_ids, int ignore_index, bool[] wanted"
)
WEIGHTS = PRODUCT + 1  # the place of head_weights among linear_loss's
ops.library.define(
    f"linear_loss({_PRODUCT}, bool ahead, "
    "Tensor? head_weights, Tensor? ref_ce, Tensor? normalizer, Tensor? temperature, "
    "str excess, str reduction) -> (Tensor loss, Tensor valid_mask, Tensor ce, "
    "Tensor row_scalar, Tensor unscale, Tensor hidden_sum, Tensor weight_sum, Tensor bias_sum)",
    tags=torch.Tag.cudagraph_unsafe,  # it waits for the device
)
ops.library.define(
    f"linear_gradient({_PRODUCT}, Tensor row_scalar)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    tags=torch.Tag.cudagraph_unsafe,
)


class Saved(NamedTuple):
    """What backward reads, as in `ops.Saved`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target_ids: Tensor
    row_scalar: Tensor
    unscale: Tensor
    ce: Tensor | None  # this and the next two: for the gradient of the weights
    head_weights: Tensor | None
    normalizer: Tensor | None


def without_autocast(kernel: Callable) -> Callable:
    @functools.wraps(kernel)
    def isolated(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            return kernel(hidden, *arguments)

    return isolated


@without_autocast
def _linear_loss(*arguments: Any) -> tuple[Tensor, ...]:
    linear, target_ids, ignore_index, wanted = _product(arguments)
    ahead, head_weights, ref_ce, normalizer, temperature, excess, reduction = arguments[PRODUCT:]
    valid = has_target(target_ids, linear.hidden.shape[2], ignore_index)
    dtype = accumulation_dtype(linear.hidden)
    if head_weights is not None:
        reference.raise_on_bad_weight(head_weights, valid)
    if ref_ce is None:
        weights = reference.known_weights(valid, head_weights, dtype)
        valid_mask = counted_tokens(weights.sum(-1))
        row_scalar, weigh = to_row_scalar(weights, reduction, normalizer).contiguous(), None
    else:  # weights that sum to 1 on each token with a target, and follow from its ce
        valid_mask = valid.any(-1)
        of_token = to_token_scalar(valid, dtype, reduction, normalizer)
        row_scalar = product(valid.to(dtype), of_token).contiguous()
        weigh = _excess_weights(valid, ref_ce, row_scalar, temperature, excess)
    unscale = find_unscale(row_scalar, linear)
    plan = make_plan(target_ids, linear, ignore_index)
    now = wanted if ahead else Wanted()
    ce, sums = run_chunks(linear, plan, row_scalar, unscale, weigh, now)
    loss = product(row_scalar, ce).sum()
    return loss, valid_mask, ce, row_scalar, unscale, *sums


def _excess_weights(valid, ref_ce, row_scalar, temperature, excess):
    """What finds the weights of some tokens from their cross entropies, and multiplies with them
    the row scalars."""
    _, length, heads = valid.shape
    aligned = reference.align_ref_ce(ref_ce, length, heads).reshape(-1, heads)
    valid, scalars = valid.reshape(-1, heads), row_scalar.view(-1, heads)

    def weigh(ce: Tensor, tokens: slice) -> Tensor:
        score = reference.difference(ce, aligned[tokens], excess)
        weights = reference.softmax_over_heads(score, valid[tokens], temperature)
        scalars[tokens] = product(weights, scalars[tokens])
        return weights

    return weigh


@without_autocast
def _linear_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    linear, target_ids, ignore_index, wanted = _product(arguments)
    row_scalar = arguments[PRODUCT].contiguous()
    plan, unscale = make_plan(target_ids, linear, ignore_index), find_unscale(row_scalar, linear)
    _, sums = run_chunks(linear, plan, row_scalar, unscale, None, wanted)
    return finish_gradients(linear, sums, _factor(linear.dtype, unscale, None))


def _product(arguments: tuple[Any, ...]) -> tuple[Linear, Tensor, int, Wanted]:
    *product, target_ids, ignore_index, wanted = arguments[:PRODUCT]
    return Linear(*product), target_ids, ignore_index, Wanted(*wanted)


def _fake_linear_loss(*arguments: Any) -> tuple[Tensor, ...]:
    linear, _, _, wanted = _product(arguments)
    ahead = arguments[PRODUCT]
    hidden, dtype = linear.hidden, accumulation_dtype(linear.hidden)
    tokens, rows = hidden.shape[:2], hidden.shape[:3]
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(tokens, dtype=torch.bool),
        *(hidden.new_empty(shape, dtype=dtype) for shape in (rows, rows, ())),
        *_fake_sums(linear, wanted if ahead else Wanted(), linear.sum_dtype),
    )


def _fake_linear_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    linear, _, _, wanted = _product(arguments)
    return _fake_sums(linear, wanted, linear.weight.dtype)


def _fake_sums(linear: Linear, wanted: Wanted, dtype: torch.dtype) -> tuple[Tensor, ...]:
    hidden, weight = linear.hidden, linear.weight
    return (
        hidden.new_empty(hidden.shape if wanted.hidden else (0,)),
        weight.new_empty(weight.shape if wanted.weight else (0,), dtype=dtype),
        weight.new_empty(len(weight) if wanted.bias else 0, dtype=dtype),
    )


def _save_for_backward(ctx, inputs, output):
    hidden, weight, bias, *ctx.product, target_ids, ctx.ignore_index, ctx.wanted = inputs[:PRODUCT]
    ahead, head_weights, _, normalizer, *_, ctx.reduction = inputs[PRODUCT:]
    _loss, _mask, ce, row_scalar, unscale, *sums = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], *output[3:])
    ctx.sums = Gradients(*sums) if ahead and any(ctx.wanted) else None
    of_weights = (None, None, None)
    if ctx.needs_input_grad[WEIGHTS]:
        of_weights = (ce.clone(), head_weights, normalizer)  # the caller may change his ce in place
    ctx.save_for_backward(hidden, weight, bias, target_ids, row_scalar, unscale, *of_weights)


def _backward(ctx, grad_loss, _valid_mask, grad_ce, *_):
    grads, of_weights = [None, None, None], None
    if not (grad_loss is None and grad_ce is None):
        saved = Saved(*ctx.saved_tensors)
        if ctx.needs_input_grad[WEIGHTS] and grad_loss is not None:
            ce = _cross_entropies(ctx, saved) if torch.is_grad_enabled() else saved.ce
            settings = (ctx.reduction, ctx.ignore_index)
            of_weights = weights_gradient(saved, ce, grad_loss, *settings)
        if any(ctx.wanted):
            made = _gradients(ctx, saved, grad_loss, grad_ce)
            grads = [g if wanted else None for g, wanted in zip(made, ctx.wanted, strict=True)]
    return *grads, *(None,) * (WEIGHTS - 3), of_weights, *(None,) * 5


def _gradients(ctx, saved, grad_loss, grad_ce):
    # What was summed ahead belongs to whoever gets it.
    sums, ctx.sums = ctx.sums, None
    if grad_ce is None and sums is not None and not torch.is_grad_enabled():
        linear = Linear(*saved[:3], *ctx.product)
        return finish_gradients(linear, sums, _factor(linear.dtype, saved.unscale, grad_loss))
    del sums
    row_scalar = upstream(saved.row_scalar, grad_loss, grad_ce)
    row_scalar = constant_of(row_scalar, saved.head_weights)
    return torch.ops.wmtp.linear_gradient(*_arguments(ctx, saved), row_scalar)


def _factor(dtype: torch.dtype, unscale: Tensor, grad_loss: Tensor | None) -> Tensor | None:
    """What the sums are still to be multiplied with; None: nothing."""
    if dtype != torch.float16:
        return grad_loss  # unscale is 1
    return unscale if grad_loss is None else unscale * grad_loss


def _cross_entropies(ctx, saved):
    """Those of forward once more, for they have to be differentiated there."""
    how = (False, None, None, None, None, "abs", "sum")
    return linear_loss(*_arguments(ctx, saved), *how)[2]


def _arguments(ctx, saved):
    return *saved[:3], *ctx.product, saved.target_ids, ctx.ignore_index, ctx.wanted


ops.register("linear_loss", _linear_loss, _fake_linear_loss, _backward, _save_for_backward)
ops.register("linear_gradient", _linear_gradient, _fake_linear_gradient, no_second_derivative)

linear_loss = torch.ops.wmtp.linear_loss
