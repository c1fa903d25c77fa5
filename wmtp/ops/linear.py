"""The operators of the linear loss: `torch.ops.wmtp.linear_loss`, `linear_gradient`; their records
are in `records.py`.

The sums are made while the logits are there, if `ahead`, so backward has only factors left to
multiply. They are handed out once: a second backward, and whoever differentiates ce, has them made
anew. The products' dtype is a setting: no autocast around a call or its backward changes it.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wmtp.checks import raise_on_bad_weight
from wmtp.exact_zero import product
from wmtp.labels import Targets, as_targets
from wmtp.ops.chunks import new_row_outputs, run_chunks
from wmtp.ops.derivatives import Upstream, constant_of, no_second_derivative, weights_gradient
from wmtp.ops.library import define
from wmtp.ops.loss import NO_GRAPH, next_token_ce
from wmtp.ops.plan import make_plan
from wmtp.ops.product import Linear, Wanted
from wmtp.ops.selection import run_selected
from wmtp.ops.sums import Gradients, find_unscale, finish_gradients
from wmtp.records import (
    LinearInputs,
    LinearOutputs,
    LinearSettings,
    RowOutputs,
    RowSettings,
    flat,
    names_of,
    schema_of,
    unflat,
)
from wmtp.reduction import (
    Terms,
    accumulation_dtype,
    counted_tokens,
    may_be_negative,
    to_row_scalar,
    to_token_scalar,
)
from wmtp.weightings import KeepTop, Uniform, Weighting
from wmtp.weightings.base import rule_of

ARGUMENTS = (*names_of(LinearInputs), *names_of(LinearSettings))
Kernel = Callable[..., tuple[Tensor, ...]]


class Saved(NamedTuple):
    """What backward reads, as in `loss_backward.Saved`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target_ids: Tensor
    row_scalar: Tensor
    unscale: Tensor
    row_loss: Tensor | None  # this and the next three: for the gradient of the weights
    head_weights: Tensor | None
    head_scale: Tensor | None
    normalizer: Tensor | None


def linear_loss(inputs: LinearInputs, settings: LinearSettings) -> LinearOutputs:
    """Differentiable in hidden, weight, bias and head_weights; arguments as checked."""
    return LinearOutputs(*torch.ops.wmtp.linear_loss(*flat(inputs, settings)))


def without_autocast(kernel: Kernel) -> Kernel:
    @functools.wraps(kernel)
    def isolated(*values: Any) -> tuple[Tensor, ...]:
        device = next(value for value in values if isinstance(value, Tensor)).device
        with torch.autocast(device.type, enabled=False):
            return kernel(*values)

    return isolated


@without_autocast
def _linear_loss(*values: Any) -> tuple[Tensor, ...]:
    inputs, settings = unflat(values, LinearInputs, LinearSettings)
    linear, (_, length, heads, _) = Linear.of(inputs, settings), inputs.hidden.shape
    targets = as_targets(inputs.target_ids, length, heads, settings.ignore_index)
    valid, dtype = targets.valid(), accumulation_dtype(inputs.hidden)
    rule = rule_of(settings.rule)
    if inputs.numbers is not None:
        rule = rule.with_numbers(inputs.numbers.unbind())
    terms = Terms(settings.reduction, inputs.normalizer, inputs.head_scale)
    if inputs.head_weights is not None and not settings.checked:
        negative = may_be_negative(terms.reduction, terms.normalizer is not None)
        raise_on_bad_weight(inputs.head_weights, lambda: valid, negative)
    weigh = None
    if rule.known:
        weights = valid.to(dtype)
        if inputs.head_weights is not None:
            weights = torch.where(valid, inputs.head_weights, 0.0)
        valid_mask = counted_tokens(weights.abs().sum(-1))
        row_scalar = to_row_scalar(weights, terms).contiguous()
    else:
        valid_mask = valid.any(-1)
        scalar = to_token_scalar(valid, dtype, terms)
        if isinstance(rule, KeepTop):
            scalar = to_row_scalar(valid.to(dtype), _of_kept(terms, rule.count(valid)))
        row_scalar = product(valid.to(dtype), scalar).contiguous()
        weigh = _Weigh(rule, inputs, settings, targets, row_scalar)
    unscale = find_unscale(row_scalar, linear)
    now = Wanted(*settings.wanted) if settings.ahead else Wanted()
    if isinstance(rule, KeepTop):
        assert weigh is not None
        by_chunk = rule.within_chunks(linear.chunk_tokens)
        asked = linear.asked(rule.together if by_chunk else 1)
        plan = make_plan(inputs.target_ids, asked, inputs.hidden.device)
        rows, sums = run_selected(linear, plan, row_scalar, unscale, weigh, now, by_chunk)
    else:
        plan = make_plan(inputs.target_ids, linear.asked(), inputs.hidden.device)
        rows, sums = run_chunks(linear, plan, row_scalar, unscale, weigh, now)
    if weigh is not None and not weigh.sums_to_one:
        valid_mask = counted_tokens(weigh.sums.view_as(valid_mask))
    averaged = rows.row_loss if settings.numerics.adds_terms else rows.ce
    loss, lse = product(row_scalar, averaged).sum(), rows.row_max + rows.log_sum
    of_rows = (rows.ce, rows.row_loss, rows.entropy, rows.correct, lse)
    return tuple(LinearOutputs(loss, valid_mask, *of_rows, row_scalar, unscale, *sums))


def _of_kept(terms: Terms, kept: Tensor) -> Terms:
    """What divides, where pairs weigh 1 or nothing, and so many are kept."""
    if terms.reduction != "weight_mean" or terms.normalizer is not None:
        kept_or_given = terms.normalizer
    else:
        kept_or_given = kept
    return terms._replace(reduction="sum", normalizer=kept_or_given)


class _Weigh:
    """Finds the weights of some tokens from their cross entropies, and multiplies with them the row
    scalars."""

    def __init__(
        self,
        rule: Weighting,
        inputs: LinearInputs,
        settings: LinearSettings,
        targets: Targets,
        row_scalar: Tensor,
    ) -> None:
        heads, factor = targets.heads, inputs.head_weights
        self.rule = rule
        self.sums_to_one = rule.sums_to_one and factor is None
        self.factor = None if factor is None else factor.view(-1, heads)
        self.valid = targets.valid().reshape(-1, heads)
        self.row_scalar = row_scalar.view(-1, heads)
        self.sums = row_scalar.new_zeros(len(self.valid))  # of a token's weights
        self.ref_ce = None
        if rule.compares:
            ref_ce = inputs.ref_ce
            if inputs.teacher is not None:
                how = RowSettings(ignore_index=settings.ignore_index, backend=settings.backend)
                ref_ce = next_token_ce(inputs.teacher, inputs.target_ids, how)
            assert ref_ce is not None
            aligned = targets.reference_of_heads(ref_ce.to(row_scalar.dtype))
            self.ref_ce = aligned.reshape(-1, heads)

    def __call__(self, rows: RowOutputs, tokens: slice) -> Tensor:
        needs = {} if self.ref_ce is None else {"ref_ce": self.ref_ce[tokens]}
        for name in self.rule.needs:
            needs[name] = getattr(rows, name).flatten(0, 1)[tokens]
        ce = rows.ce.flatten(0, 1)[tokens]
        weights = self.rule.weights(ce, self.valid[tokens], **needs)
        if self.factor is not None:
            weights = product(self.factor[tokens], weights)
        self.sums[tokens] = weights.sum(-1)
        self.row_scalar[tokens] = product(weights, self.row_scalar[tokens])
        return weights


@without_autocast
def _linear_gradient(*values: Any) -> tuple[Tensor, ...]:
    inputs, settings, row_scalar = unflat(values, LinearInputs, LinearSettings)
    linear, row_scalar = Linear.of(inputs, settings), row_scalar.contiguous()
    _, length, heads, _ = inputs.hidden.shape
    targets = as_targets(inputs.target_ids, length, heads, settings.ignore_index)
    ids = targets.where(row_scalar != 0).ids
    plan = make_plan(ids, linear.asked(), inputs.hidden.device)
    unscale = find_unscale(row_scalar, linear)
    _, sums = run_chunks(linear, plan, row_scalar, unscale, None, Wanted(*settings.wanted))
    return finish_gradients(linear, sums, _factor(linear.dtype, unscale, None))


def _fake_linear_loss(*values: Any) -> tuple[Tensor, ...]:
    inputs, settings = unflat(values, LinearInputs, LinearSettings)
    linear, hidden = Linear.of(inputs, settings), inputs.hidden
    dtype, wanted = accumulation_dtype(hidden), Wanted(*settings.wanted)
    rows = hidden.shape[:3]
    scalar, row_scalar = hidden.new_empty((), dtype=dtype), hidden.new_empty(rows, dtype=dtype)
    of_rows = new_row_outputs(row_scalar, linear.rows)
    return (
        scalar,
        hidden.new_empty(hidden.shape[:2], dtype=torch.bool),
        *(of_rows.ce, of_rows.row_loss, of_rows.entropy, of_rows.correct, of_rows.row_max),
        row_scalar,
        torch.empty_like(scalar),
        *_fake_sums(linear, wanted if settings.ahead else Wanted(), linear.sum_dtype),
    )


def _fake_linear_gradient(*values: Any) -> tuple[Tensor, ...]:
    inputs, settings, _row_scalar = unflat(values, LinearInputs, LinearSettings)
    linear = Linear.of(inputs, settings)
    return _fake_sums(linear, Wanted(*settings.wanted), linear.weight.dtype)


def _fake_sums(linear: Linear, wanted: Wanted, dtype: torch.dtype) -> tuple[Tensor, ...]:
    hidden, weight = linear.hidden, linear.weight
    return (
        hidden.new_empty(hidden.shape if wanted.hidden else (0,)),
        weight.new_empty(linear.whole if wanted.weight else (0,), dtype=dtype),
        weight.new_empty(linear.whole[:-1] if wanted.bias else (0,), dtype=dtype),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.settings = unflat(inputs, LinearInputs, LinearSettings)
    ctx.weights_wanted = ctx.needs_input_grad[ARGUMENTS.index("head_weights")]
    out = LinearOutputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(out.valid_mask, *out[4:])
    ahead = ctx.settings.ahead and any(ctx.settings.wanted)
    ctx.sums = Gradients(out.hidden_sum, out.weight_sum, out.bias_sum) if ahead else None
    of_weights: tuple[Tensor | None, ...] = (None,) * 4
    if ctx.weights_wanted:  # the caller may change his ce in place
        terms = (tensors.head_scale, tensors.normalizer)
        row_loss = out.row_loss if ctx.settings.numerics.adds_terms else out.ce
        of_weights = (row_loss.clone(), tensors.head_weights, *terms)
    of_product = (tensors.hidden, tensors.weight, tensors.bias)
    of_rows = (tensors.target_ids, out.row_scalar, out.unscale)
    ctx.save_for_backward(*of_product, *of_rows, *of_weights)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    upstream = Upstream.of(grads)
    found: dict[str, Any] = {}
    if not upstream.none:
        saved = Saved(*ctx.saved_tensors)
        if ctx.weights_wanted and upstream.loss is not None:
            row_loss = _row_losses(ctx, saved) if torch.is_grad_enabled() else saved.row_loss
            of_weights = weights_gradient(saved, row_loss, upstream.loss, ctx.settings)
            found["head_weights"] = of_weights
        if any(ctx.settings.wanted):
            made = _gradients(ctx, saved, upstream)
            each = zip(("hidden", "weight", "bias"), made, ctx.settings.wanted, strict=True)
            found |= {name: grad for name, grad, wanted in each if wanted}
    return tuple(map(found.get, ARGUMENTS))


def _gradients(ctx: Any, saved: Saved, upstream: Upstream) -> tuple[Tensor, ...]:
    # What was summed ahead belongs to whoever gets it.
    sums, ctx.sums = ctx.sums, None
    inputs = _product_of(saved)
    if upstream.of_pairs is None and sums is not None and not torch.is_grad_enabled():
        linear = Linear.of(inputs, ctx.settings)
        return finish_gradients(linear, sums, _factor(linear.dtype, saved.unscale, upstream.loss))
    del sums
    found = []
    for row_scalar, numerics in upstream.sources(saved.row_scalar, ctx.settings.numerics):
        row_scalar = constant_of(row_scalar, saved.head_weights)
        settings = replace(ctx.settings, numerics=numerics, metrics=False)
        found.append(torch.ops.wmtp.linear_gradient(*flat(inputs, settings), row_scalar))
    return tuple(functools.reduce(torch.add, parts) for parts in zip(*found, strict=True))


def _factor(dtype: torch.dtype, unscale: Tensor, grad_loss: Tensor | None) -> Tensor | None:
    """What the sums are still to be multiplied with; None: nothing."""
    if dtype != torch.float16:
        return grad_loss  # unscale is 1
    return unscale if grad_loss is None else unscale * grad_loss


def _row_losses(ctx: Any, saved: Saved) -> Tensor:
    """Those of forward once more, for they have to be differentiated there."""
    how = {"rule": Uniform().key(), "reduction": "sum", "ahead": False, "metrics": False}
    out = linear_loss(_product_of(saved), replace(ctx.settings, **how))
    return out.row_loss if ctx.settings.numerics.adds_terms else out.ce


def _product_of(saved: Saved) -> LinearInputs:
    return LinearInputs(
        hidden=saved.hidden, weight=saved.weight, bias=saved.bias, target_ids=saved.target_ids
    )


define(
    f"linear_loss({schema_of(LinearInputs, LinearSettings)}) -> ({schema_of(LinearOutputs)})",
    _linear_loss,
    _fake_linear_loss,
    _backward,
    _save_for_backward,
    tags=NO_GRAPH,  # it waits for the device
)
define(
    f"linear_gradient({schema_of(LinearInputs, LinearSettings)}, Tensor row_scalar)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _linear_gradient,
    _fake_linear_gradient,
    no_second_derivative,
    tags=NO_GRAPH,
)
