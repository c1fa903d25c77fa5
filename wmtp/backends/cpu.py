"""The CPU backend: calls libwmtp_cpu (kernels/cpu) through its C ABI; see `protocol.Backend`.

weighted_loss  loss, cross entropies and, if wanted, the gradient: one read and one write
row_gradient   the gradient of sum row_scalar * f: one read, one write
multiply_      a gradient times what came from above
next_token_ce  a reference model's CE: one read
rows_ce_       the CE of rows, which df/dlogits overwrites: one read and one write
"""

import ctypes
import functools
import os
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from wmtp.backends import cpu_library
from wmtp.backends.cpu_library import Numbers, load
from wmtp.backends.cpu_library import instruction_set as instruction_set
from wmtp.backends.cpu_library import unavailable as unavailable
from wmtp.backends.gradient_memory import new_gradient
from wmtp.checks import target_error, weight_error
from wmtp.layout import as_rows, heads_share_storage
from wmtp.records import (
    Inputs,
    Outputs,
    RowInputs,
    RowOutputs,
    RowSettings,
    Settings,
    names_of,
    new_outputs,
    rows_of,
)
from wmtp.reduction import may_be_negative
from wmtp.weightings.base import rule_of

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_REDUCTIONS = {"sum": 0, "token_mean": 1, "weight_mean": 2}
_NOWHERE = (None, 0, 0)
_NO_RULE = -2
_ROW_SCALAR = "row_scalar"  # instead of a rule
_BAD_TARGET, _BAD_WEIGHT = 1, 2


class _Gradient(NamedTuple):
    """Where it goes, and times what."""

    memory: Tensor | None = None
    scale: float = 1.0


def fuses(rule: str) -> bool:
    return _number(rule) != _NO_RULE


def weighted_loss(inputs: Inputs, settings: Settings) -> Outputs:
    rows, offsets = as_rows(inputs.logits)
    heads = rows.shape[2]
    shared = offsets is None and heads_share_storage(rows)
    memory = None
    if settings.gradient != "none":
        memory = rows if settings.gradient == "inplace" else _gradient_memory(rows, shared)
    gradient = _Gradient(memory, 1 / heads if shared else 1.0)
    return _run(inputs, settings, gradient)


def row_gradient(rows: RowInputs, settings: RowSettings) -> Tensor:
    # row_max and log_sum are not needed: the pass that finds them again has the exponentials then.
    inputs = Inputs(logits=[rows.logits], target_ids=rows.target_ids, head_weights=rows.row_scalar)
    memory = _gradient_memory(rows.logits, heads_share_storage(rows.logits))
    return _run(inputs, _of_row_scalars(settings), _Gradient(memory)).grad


def multiply_(grad: Tensor, factor: Tensor) -> Tensor:
    number = factor.item()
    if number == 0:
        return grad.zero_()
    return grad if number == 1 else grad.mul_(factor)


def next_token_ce(logits: Tensor, target_ids: Tensor, settings: RowSettings) -> Tensor:
    inputs = Inputs(logits=[logits[:, :, None]], target_ids=target_ids)
    return _run(inputs, _of_row_scalars(settings), _Gradient()).ce[:, :, 0]


def rows_ce_(
    logits: Tensor, target_ids: Tensor, row_scalar: Tensor | None, settings: RowSettings
) -> RowOutputs:
    rows = logits[None, :, None]
    inputs = Inputs(logits=[rows], target_ids=target_ids[None], head_weights=row_scalar)
    gradient = _Gradient(None if row_scalar is None else rows)
    return rows_of(_run(inputs, _of_row_scalars(settings), gradient))


def _of_row_scalars(settings: RowSettings) -> Settings:
    """head_weights are dloss/df itself, of any sign, and grad is final."""
    known = {name: getattr(settings, name) for name in names_of(RowSettings)}
    return Settings(rule=_ROW_SCALAR, reduction="sum", checked=True, **known)


def new_rows(count: int, weight: Tensor) -> Tensor:
    """The last call's memory, if it fits."""
    return new_gradient((count, len(weight)), weight.dtype, _ask_for_huge_pages)


def _run(inputs: Inputs, settings: Settings, gradient: _Gradient) -> Outputs:
    library, (padded, head_offsets) = load(), as_rows(inputs.logits)
    rows = padded[..., : settings.vocab_size]
    outputs = new_outputs(rows, rows.shape[2], settings)
    if gradient.memory is not None:
        outputs = outputs._replace(grad=gradient.memory)
    data = _inputs(inputs, rows, head_offsets, settings.ignore_index)
    how = _settings(settings, multiplied=inputs.head_weights is not None)
    wanted = gradient.memory is not None
    scratch_bytes = library.wmtp_cpu_scratch_bytes(data, how, wanted)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device="cpu")
    memory = cpu_library.Outputs(
        *(tensor.data_ptr() for tensor in outputs[:-1]),
        _pointer(gradient.memory),
        scratch.data_ptr(),
        padded.shape[3],
        gradient.scale,
    )
    position = ctypes.c_int64()
    status = library.wmtp_cpu_weighted_loss(data, how, memory, position)
    if status == _BAD_WEIGHT:
        _raise_weight_error(inputs, settings, position.value, rows.shape[2])
    if status == _BAD_TARGET:
        shape, ignore_index = rows.shape, settings.ignore_index
        _raise_target_error(inputs.target_ids, position.value, shape, ignore_index)
    return outputs


def _gradient_memory(logits: Tensor, shared_heads: bool) -> Tensor:
    batch, length, heads, vocabulary = logits.shape
    rows = 1 if shared_heads else heads
    shape = (batch, length, rows, vocabulary)
    return new_gradient(shape, logits.dtype, _ask_for_huge_pages)


def _ask_for_huge_pages(new: Tensor) -> None:
    load().wmtp_cpu_ask_for_huge_pages(new.data_ptr(), new.nbytes)


def _inputs(
    inputs: Inputs, rows: Tensor, head_offsets: tuple[int, ...] | None, ignore_index: int
) -> cpu_library.Inputs:
    offsets = None if head_offsets is None else (ctypes.c_int64 * len(head_offsets))(*head_offsets)
    return cpu_library.Inputs(
        rows.data_ptr(),
        *rows.stride()[:3],
        *rows.shape,
        offsets,
        *_of_heads(inputs.target_ids),
        inputs.target_ids.shape[1:].numel(),
        ignore_index,
        _pointer(inputs.head_weights),
        _pointer(inputs.head_scale),
        *(_NOWHERE if inputs.ref_ce is None else _of_heads(inputs.ref_ce)),
        Numbers() if inputs.numbers is None else Numbers(*inputs.numbers.tolist()),
        0.0 if inputs.normalizer is None else inputs.normalizer.item(),
        inputs.normalizer is not None,
        _DTYPES[rows.dtype],
        1 if _forked else torch.get_num_threads(),
    )


def _settings(settings: Settings, *, multiplied: bool) -> cpu_library.Settings:
    known, metrics = settings.numerics, settings.metrics
    numerics = cpu_library.Numerics(*known, known.largest_gradient)
    reduction = _REDUCTIONS[settings.reduction]
    if settings.rule == _ROW_SCALAR:
        return cpu_library.Settings(-1, True, False, False, reduction, True, numerics, metrics)
    rule = rule_of(settings.rule)
    bare = not rule.known and not multiplied
    return cpu_library.Settings(
        _number(settings.rule),
        rule.known,
        not rule.known and rule.scope == "token",
        bare and rule.sums_to_one,
        reduction,
        settings.checked,
        numerics,
        metrics,
    )


@functools.cache
def _number(rule: str) -> int:
    """The rule's in weights.h."""
    number: int = load().wmtp_cpu_rule(rule_of(rule).case.encode())
    return number


def _of_heads(tensor: Tensor) -> tuple[int, int, int]:
    """Where it is, and the strides of b and t: of [B, L], shifted, or of [B, S, H]."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _raise_weight_error(inputs: Inputs, settings: Settings, position: int, heads: int) -> NoReturn:
    assert inputs.head_weights is not None
    token, k = divmod(position, heads)
    b, t = divmod(token, inputs.head_weights.shape[1])
    negative = may_be_negative(settings.reduction, inputs.normalizer is not None)
    weight = inputs.head_weights[b, t, k].item()
    raise weight_error(f"[{b}, {t}, {k}]", weight, negative=negative)


def _raise_target_error(
    target_ids: Tensor, position: int, shape: tuple[int, ...], ignore_index: int
) -> NoReturn:
    _, length, heads, vocabulary = shape
    token, k = divmod(position, heads)
    b, t = divmod(token, length)
    found = target_ids[b, t + k] if target_ids.dim() == 2 else target_ids[b, t, k]
    raise target_error((b, t, k), int(found), vocabulary, ignore_index)


_forked = False


def _note_fork() -> None:
    # The parent's OpenMP threads do not exist in the child, and waiting for them never ends.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
