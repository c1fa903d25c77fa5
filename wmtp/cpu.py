"""The CPU backend: calls libwmtp_cpu (kernels/cpu) through its C ABI.

    weighted_loss  loss, cross entropies and, if wanted, the gradient: one read and one write
    row_gradient   the gradient of sum row_scalar * ce: one read, one write
    multiply_      a gradient times what came from above
    next_token_ce  a reference model's CE: one read
    rows_ce_       the CE of rows, which softmax - onehot overwrites: one read and one write

B batch, S sequence, H heads, V vocabulary. Logits are float32, bfloat16, float16 or float64, with
last stride 1 and any other strides; "acc" is float32, float64 for float64 logits.
"""

import ctypes
import os
from typing import NoReturn

import torch
from torch import Tensor

from wmtp.checks import target_error, weight_error
from wmtp.cpu_library import Output, Rows, Weighting, load
from wmtp.cpu_library import instruction_set as instruction_set
from wmtp.cpu_library import unavailable as unavailable
from wmtp.gradient_memory import new_gradient
from wmtp.layout import heads_share_storage
from wmtp.reduction import accumulation_dtype

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_REDUCTIONS = {"sum": 0, "token_mean": 1, "weight_mean": 2}
_CE = 2  # the place of ce among the outputs
_NO_ID = -1  # ignore_index where no target is to be ignored
_BAD_TARGET, _BAD_WEIGHT = 1, 2


def weighted_loss(
    logits: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None,
    ref_ce: Tensor | None,
    normalizer: Tensor | None,
    temperature: Tensor | None,
    signed: bool,
    reduction: str,
    ignore_index: int,
    gradient: str,
    head_offsets: tuple[int, ...] | None = None,
) -> tuple[Tensor, ...]:
    """The loss and, in the same pass, its gradient.

    Args:
        logits: [B, S, H, V].
        target_ids: [B, S] int64, contiguous, unshifted.
        head_weights: [B, S, H] acc, contiguous, or None.
        ref_ce: [B, S - 1] acc, contiguous, nats, or None; not with head_weights.
        normalizer: [], replaces the denominator, or None.
        temperature: [], of the excess softmax, nats; None without ref_ce.
        signed: excess is ce - ref_ce instead of |ce - ref_ce|.
        reduction: "token_mean", "weight_mean" or "sum".
        ignore_index: a target of this id is no target.
        gradient: "none", "new" or "inplace" (over the logits).
        head_offsets: where head k begins, in elements from the lowest: for heads of memory of their
            own, the lowest of which is `logits`, expanded. None: by the strides.

    Returns:
        loss [], valid_mask [B, S] bool, ce [B, S, H], token_loss [B, S], weight_sum [B, S],
        row_scalar [B, S, H] = dloss / dce, row_max and log_sum [B, S, H], factors [2], grad.
        row_max + log_sum is the log-sum-exp; both are 0 where there is no target.
        grad is [B, S, H, V]; shared heads (H > 1, stride 0 along them): [B, S, 1, V], an H-th of
        their sum, for autograd adds it up over the expanded heads; "none": [0].
        factors: 1 / denominator, and what grad is still to be multiplied with. That is 1 but for
        float16, whose gradient is scaled to the range that float16 has: 1 / denominator would carry
        most of it below the smallest number.

    Raises:
        IndexError: a target outside [0, V).
        ValueError: a negative or non-finite weight where there is a target.
    """
    how = Weighting(
        _pointer(head_weights),
        _pointer(ref_ce),
        1.0 if temperature is None else temperature.item(),
        0.0 if normalizer is None else normalizer.item(),
        normalizer is not None,
        signed,
        _REDUCTIONS[reduction],
    )
    shared = head_offsets is None and heads_share_storage(logits)
    grad = _gradient_memory(logits, shared) if gradient == "new" else logits
    wanted = None if gradient == "none" else grad
    scale = 1 / logits.shape[2] if shared else 1.0
    outputs, status, position = _run(
        logits, target_ids, how, ignore_index, wanted, scale, head_offsets
    )
    if status == _BAD_WEIGHT:
        assert head_weights is not None
        token, k = divmod(position, logits.shape[2])
        b, t = divmod(token, logits.shape[1])
        raise weight_error(f"[{b}, {t}, {k}]", head_weights[b, t, k].item())
    if status == _BAD_TARGET:
        _raise_target_error(target_ids, position, logits.shape[-1], ignore_index)
    return (*outputs, logits.new_empty(0) if wanted is None else grad)


def row_gradient(
    logits: Tensor,
    target_ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    row_scalar: Tensor,
    ignore_index: int,
) -> Tensor:
    """The gradient of sum row_scalar * ce with respect to the logits.

    Args:
        logits: [B, S, H, V]. Shared heads (H > 1, stride 0 along them) are one row a token.
        target_ids: [B, S] int64, contiguous, unshifted.
        row_max, log_sum: not needed: the pass that finds them again has the exponentials then.
        row_scalar: [B, S, H] acc, contiguous, of any sign.
        ignore_index: a target of this id is no target; such rows get exactly 0, unread.

    Returns:
        [B, S, H, V] contiguous, of the logits' dtype; shared heads: their sum, [B, S, 1, V].

    Raises:
        IndexError: a target outside [0, V).
    """
    how = Weighting(row_scalar.data_ptr(), reduction=_REDUCTIONS["sum"], are_row_scalars=True)
    grad = _gradient_memory(logits, heads_share_storage(logits))
    _, status, position = _run(logits, target_ids, how, ignore_index, grad, 1.0)
    if status == _BAD_TARGET:
        _raise_target_error(target_ids, position, logits.shape[-1], ignore_index)
    return grad


def multiply_(grad: Tensor, factor: Tensor) -> Tensor:
    """grad *= factor [], which is returned; nothing is read where that is 1 or 0: no NaN then."""
    number = factor.item()
    if number == 0:
        return grad.zero_()
    return grad if number == 1 else grad.mul_(factor)


def next_token_ce(logits: Tensor, target_ids: Tensor, ignore_index: int) -> Tensor:
    """The CE of each position predicting the next token.

    Args:
        logits: [B, S, V].
        target_ids: [B, S] int64, contiguous, unshifted.
        ignore_index: a target of this id is no target.

    Returns:
        [B, S - 1] acc, nats, 0 where there is no target.

    Raises:
        IndexError: a target outside [0, V).
    """
    how = Weighting(reduction=_REDUCTIONS["sum"])
    outputs, status, position = _run(logits[:, :, None], target_ids, how, ignore_index, None, 1.0)
    if status == _BAD_TARGET:
        _raise_target_error(target_ids, position, logits.shape[-1], ignore_index)
    return outputs[_CE][:, : max(logits.shape[1] - 1, 0), 0].contiguous()


def rows_ce_(logits: Tensor, target_ids: Tensor, row_scalar: Tensor | None) -> Tensor:
    """The CE of each row; the row becomes row_scalar (softmax - onehot), if there is one.

    Args:
        logits: [R, V], last stride 1.
        target_ids: [1 + R] int64, contiguous: the first is not looked at, target_ids[1 + r] is row
            r's, in [0, V).
        row_scalar: [R] acc, contiguous, of any sign, or None: the logits stay.

    Returns:
        [R] acc, nats.

    Raises:
        IndexError: a target outside [0, V).
    """
    how = Weighting(_pointer(row_scalar), reduction=_REDUCTIONS["sum"], are_row_scalars=True)
    rows = logits[None, :, None]
    grad = None if row_scalar is None else rows
    outputs, status, position = _run(rows, target_ids[None], how, _NO_ID, grad, 1.0)
    if status == _BAD_TARGET:
        _raise_target_error(target_ids[None], position, logits.shape[-1], _NO_ID)
    return outputs[_CE].flatten()


def new_rows(count: int, weight: Tensor) -> Tensor:
    """[count, V] of weight's dtype, for a chunk's logits: the last call's memory, if it fits."""
    return new_gradient((count, len(weight)), weight.dtype, _ask_for_huge_pages)


def _run(
    logits: Tensor,
    target_ids: Tensor,
    how: Weighting,
    ignore_index: int,
    grad: Tensor | None,
    grad_scale: float,
    head_offsets: tuple[int, ...] | None = None,
) -> tuple[list[Tensor], int, int]:
    """All of `weighted_loss`'s outputs but the gradient, which goes to `grad`; status, position."""
    library = load()
    batch, length, heads, _ = logits.shape
    dtype = accumulation_dtype(logits)
    tokens, rows = (batch, length), (batch, length, heads)
    outputs = [
        _empty((), dtype),
        _empty(tokens, torch.bool),
        *(_empty(shape, dtype) for shape in (rows, tokens, tokens, rows, rows, rows, (2,))),
    ]
    data = _rows(logits, target_ids, ignore_index, head_offsets)
    scratch_bytes = library.wmtp_cpu_scratch_bytes(data, how, grad is not None)
    scratch = _empty((scratch_bytes,), torch.uint8)
    output = Output(
        *(tensor.data_ptr() for tensor in outputs),
        _pointer(grad),
        scratch.data_ptr(),
        grad_scale,
    )
    position = ctypes.c_int64()
    status = library.wmtp_cpu_weighted_loss(data, how, output, position)
    return outputs, status, position.value


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")  # whatever torch's default device is


def _gradient_memory(logits: Tensor, shared_heads: bool) -> Tensor:
    batch, length, heads, vocabulary = logits.shape
    rows = 1 if shared_heads else heads
    shape = (batch, length, rows, vocabulary)
    return new_gradient(shape, logits.dtype, _ask_for_huge_pages)


def _ask_for_huge_pages(new: Tensor) -> None:
    load().wmtp_cpu_ask_for_huge_pages(new.data_ptr(), new.nbytes)


def _rows(
    logits: Tensor, target_ids: Tensor, ignore_index: int, head_offsets: tuple[int, ...] | None
) -> Rows:
    stride_b, stride_s, stride_h, _ = logits.stride()
    batch, length, heads, vocabulary = logits.shape
    offsets = None if head_offsets is None else (ctypes.c_int64 * len(head_offsets))(*head_offsets)
    return Rows(
        logits.data_ptr(),
        *(stride_b, stride_s, stride_h),
        *(batch, length, target_ids.shape[1], heads, vocabulary),
        offsets,
        target_ids.data_ptr(),
        ignore_index,
        _DTYPES[logits.dtype],
        1 if _forked else torch.get_num_threads(),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _raise_target_error(
    target_ids: Tensor, position: int, vocabulary: int, ignore_index: int
) -> NoReturn:
    b, s = divmod(position, target_ids.shape[1])
    raise target_error(f"[{b}, {s}]", int(target_ids[b, s]), vocabulary, ignore_index)


_forked = False


def _note_fork() -> None:
    # The parent's OpenMP threads do not exist in the child, and waiting for them never ends.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
