"""The operators of the loss on logits: `torch.ops.wmtp.weighted_loss`, `loss_gradient`,
`row_gradient`, `next_token_ce`; their records are in `records.py`.

`grad` is written in the pass that reads the logits, so backward has at most a factor left to
multiply. Whoever wants no more than ce leaves it to backward: row_gradient. So does whoever packs
what is saved for backward, as checkpointing does: see `gradients_ahead`. B batch, S sequence,
H heads, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from wmtp.arguments import Call
from wmtp.backends import BACKENDS, multiply
from wmtp.labels import Targets
from wmtp.layout import PLAIN, aligned, alike, heads_share_storage, one_tensor, unit_stride
from wmtp.ops.derivatives import Upstream, for_each_row, left_over, no_second_derivative
from wmtp.ops.library import define, needed, none_for
from wmtp.ops.loss_backward import Wanted, gradients, save_for_backward
from wmtp.records import (
    Inputs,
    Outputs,
    RowInputs,
    RowSettings,
    Settings,
    flat,
    names_of,
    new_outputs,
    schema_of,
    unflat,
)
from wmtp.reduction import accumulation_dtype
from wmtp.weightings.base import field_of


def gradients_ahead() -> bool:
    """Whether gradients are made in the forward call. Where somebody packs what is saved for
    backward, checkpointing for one, they would be held beside it, and checkpointed made twice."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def weighted_loss(inputs: Inputs, settings: Settings) -> Outputs:
    """loss, ce and row_loss are differentiable in logits and head_weights; arguments as checked.

    `settings.gradient` is what may be written: "new", "inplace", or "none" where the loss will not
    be differentiated; what is written, and so the next two settings, is decided here.
    """
    logits, first = inputs.logits, inputs.logits[0]
    differentiated = torch.is_grad_enabled() and any(head.requires_grad for head in logits)
    traced = (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or any(type(head) not in PLAIN for head in logits)
    )
    once = settings.gradient == "inplace" and differentiated and not traced
    ahead = differentiated and settings.gradient != "none" and gradients_ahead()
    # Of a leaf every head's own gradient is wanted; of a view only their sum is ever used.
    of_heads = differentiated and first.is_leaf and settings.gradient != "inplace"
    settings.gradient = ("inplace" if once else "new") if ahead else "none"
    settings.shared_heads = first.dim() == 4 and heads_share_storage(first) and not of_heads
    settings.once = once
    if traced:
        return Outputs(*torch.ops.wmtp.weighted_loss(*flat(inputs, settings)))
    weights = inputs.head_weights
    learning = torch.is_grad_enabled() and weights is not None and weights.requires_grad
    if differentiated or learning:
        out = _WeightedLoss.apply(inputs, settings, weights, *logits)  # type: ignore[no-untyped-call]
        return Outputs(*out)
    return _weighted_loss(inputs, settings)


class _WeightedLoss(torch.autograd.Function):
    """The operator in eager mode: the same functions without torch.library's 60 us a call, and with
    the permission to write over an input, which a differentiable operator does not have."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Inputs, settings: Settings, head_weights: Tensor | None, *logits: Tensor
    ) -> tuple[Tensor, ...]:
        # A setup_context of its own would cost another 30 us. The tensors are those of `inputs`.
        out = _weighted_loss(inputs, settings)
        if settings.gradient == "inplace":
            out = out._replace(grad=out.grad.new_empty(0))
        ctx.waits = False
        _, _, of_weights, *of_logits = ctx.needs_input_grad
        save_for_backward(ctx, inputs, settings, out, Wanted(any(of_logits), of_weights))
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        of_logits, of_weights = gradients(ctx, Upstream.of(grads))
        return None, None, of_weights, *of_logits


def _weighted_loss(inputs: Inputs, settings: Settings) -> Outputs:
    backend = BACKENDS[settings.backend]
    ref_ce = inputs.ref_ce
    if inputs.teacher is not None:
        how = RowSettings(ignore_index=settings.ignore_index, backend=settings.backend)
        ref_ce = next_token_ce(inputs.teacher, inputs.target_ids, how)
    inputs = Inputs(
        logits=_rows(inputs.logits, settings.shared_heads),  # copies must live until the launch
        target_ids=aligned(inputs.target_ids),
        head_weights=aligned(inputs.head_weights),
        head_scale=aligned(inputs.head_scale),
        ref_ce=aligned(ref_ce),
        numbers=aligned(inputs.numbers),
        normalizer=aligned(inputs.normalizer),
    )
    out = backend.weighted_loss(inputs, settings)
    if settings.vocab_size is not None and settings.gradient != "none":
        for grad in inputs.logits if settings.gradient == "inplace" else [out.grad]:
            _clear_padding(grad, settings)
    return out


def _clear_padding(grad: Tensor, settings: RowSettings) -> None:
    """Of a gradient [B, S, H, V] or [B, S, V]: 0 behind the columns that are tokens."""
    shared = grad.dim() == 4 and heads_share_storage(grad)
    rows = grad[:, :, :1] if shared else grad
    rows.data[..., settings.vocab_size :].zero_()  # `.data`: our own write


def _rows(logits: list[Tensor], shared_heads: bool) -> list[Tensor]:
    """The kernels walk along V one by one; every other stride is free."""
    if logits[0].dim() == 3:
        return alike(logits)
    return [_rows_of(logits[0], shared_heads)]


def _rows_of(logits: Tensor, shared_heads: bool) -> Tensor:
    if shared_heads:  # torch.compile may have materialised the heads on the way here
        return unit_stride(logits[:, :, :1]).expand(logits.shape)
    return logits.contiguous() if heads_share_storage(logits) else unit_stride(logits)


def _weighted_loss_traced(*values: Any) -> tuple[Tensor, ...]:
    inputs, settings = unflat(values, Inputs, Settings)
    out = _weighted_loss(inputs, settings)
    # As long as the graph keeps row_scalar.
    out.row_scalar.untyped_storage()._wmtp_gradient = out.grad  # type: ignore[attr-defined]
    return tuple(out._replace(grad=out.grad.new_empty(0)))


def _save_traced(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, settings = unflat(inputs, Inputs, Settings)
    needs, _ = unflat(needed(ctx, inputs), Inputs, Settings)
    wanted = Wanted(any(needs.logits), needs.head_weights)
    ctx.none = none_for(inputs)
    save_for_backward(ctx, tensors, settings, Outputs(*output), wanted)
    ctx.waits = ctx.written is not None
    ctx.written = None


def _backward_traced(ctx: Any, *upstream: Tensor) -> Any:
    of_logits, of_weights = gradients(ctx, Upstream.of(upstream))
    grads, settings = unflat(ctx.none, Inputs, Settings)
    grads = replace(grads, logits=list(of_logits), head_weights=of_weights)
    return tuple(flat(grads, settings))


def _loss_gradient(logits: list[Tensor], *values: Any) -> Tensor:
    *saved, row_scalar, factors, grad_loss = values[: -len(names_of(RowSettings))]
    (settings,) = unflat(values[-len(names_of(RowSettings)) :], RowSettings)
    grad = vars(row_scalar.untyped_storage()).pop("_wmtp_gradient", None)
    if grad is not None:
        left = left_over(grad_loss, factors, logits[0].dtype)
        return multiply(grad, left, settings.backend)
    row_scalar = Upstream(loss=grad_loss).of_rows(row_scalar)
    row_scalar = for_each_row(row_scalar, settings.shared_heads)
    target_ids, row_max, log_sum = saved
    rows = RowInputs(one_tensor(logits), target_ids, row_max, log_sum, row_scalar)
    return _gradient_of(rows, settings)


def _row_gradient(*values: Any) -> Tensor:
    rows, settings = unflat(values, RowInputs, RowSettings)
    return _gradient_of(rows, settings)


def _gradient_of(rows: RowInputs, settings: RowSettings) -> Tensor:
    logits = _rows_of(rows.logits, settings.shared_heads)
    rows = RowInputs(logits, *map(aligned, flat(rows)[1:]))
    grad = BACKENDS[settings.backend].row_gradient(rows, settings)
    if settings.vocab_size is not None:
        _clear_padding(grad, settings)
    return grad


def reference_ce(logits: Tensor, targets: Targets, settings: RowSettings) -> Tensor:
    """As `reference.reference_ce`, but that pairs may not count, by a kernel."""
    ce = next_token_ce(logits, targets.for_operators(), settings)
    return ce[:, : targets.about()]


def reference_resolved(call: Call, backend: str, *, one_pass: bool) -> Call:
    """With the cross entropies of a reference's logits, where the operator does not make them: it
    knows no other labels than those that stand in a row, in two passes weights are made between
    them, and what is measured is made of weights that are known."""
    ref_logits, center = field_of(call.rule, "ref_logits"), field_of(call.rule, "center")
    inside = one_pass and call.targets.in_a_row and not call.metrics and center is None
    if ref_logits is None or inside:
        return call
    settings = RowSettings(ignore_index=call.targets.ignore_index, backend=backend)
    ref_ce = reference_ce(ref_logits, call.targets.next_tokens(), settings)
    return call._replace(rule=call.rule.with_fields(ref_ce=ref_ce, ref_logits=None))


def next_token_ce(logits: Tensor, target_ids: Tensor, settings: RowSettings) -> Tensor:
    """[B, S] acc: the cross entropy of logits [B, S, V] at t for `target_ids[b, t]`, [B, L]."""
    ce: Tensor = torch.ops.wmtp.next_token_ce(logits.detach(), target_ids, *flat(settings))
    return ce


def _next_token_ce(logits: Tensor, target_ids: Tensor, *how: Any) -> Tensor:
    (settings,) = unflat(how, RowSettings)
    backend = BACKENDS[settings.backend]
    return backend.next_token_ce(unit_stride(logits), aligned(target_ids), settings)


def _fake_weighted_loss(*values: Any) -> tuple[Tensor, ...]:
    inputs, settings = unflat(values, Inputs, Settings)
    first = inputs.logits[0]
    heads = first.shape[2] if first.dim() == 4 else len(inputs.logits)
    return tuple(new_outputs(first, heads, settings)._replace(grad=first.new_empty(0)))


def _fake_loss_gradient(logits: list[Tensor], *values: Any) -> Tensor:
    if logits[0].dim() == 3:
        batch, length, vocabulary = logits[0].shape
        return logits[0].new_empty(batch, length, len(logits), vocabulary)
    return _fake_row_gradient(logits[0], *values)


def _fake_row_gradient(logits: Tensor, *values: Any) -> Tensor:
    (settings,) = unflat(values[-len(names_of(RowSettings)) :], RowSettings)
    batch, length, heads, vocabulary = logits.shape
    return logits.new_empty(batch, length, 1 if settings.shared_heads else heads, vocabulary)


def _fake_next_token_ce(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[:2], dtype=accumulation_dtype(logits))


NO_GRAPH = (torch.Tag.cudagraph_unsafe,)  # which does not see the memory of what waits
define(
    f"weighted_loss({schema_of(Inputs, Settings)}) -> ({schema_of(Outputs)})",
    _weighted_loss_traced,
    _fake_weighted_loss,
    _backward_traced,
    _save_traced,
    tags=NO_GRAPH,
)
define(
    "loss_gradient(Tensor[] logits, Tensor target_ids, Tensor row_max, Tensor log_sum, "
    f"Tensor row_scalar, Tensor factors, Tensor grad_loss, {schema_of(RowSettings)}) -> Tensor",
    _loss_gradient,
    _fake_loss_gradient,
    tags=NO_GRAPH,
)
define(
    f"row_gradient({schema_of(RowInputs, RowSettings)}) -> Tensor",
    _row_gradient,
    _fake_row_gradient,
    no_second_derivative,
)
define(
    f"next_token_ce(Tensor logits, Tensor target_ids, {schema_of(RowSettings)}) -> Tensor",
    _next_token_ce,
    _fake_next_token_ce,
)
