"""The CPU backend: calls libwmtp_cpu (kernels/cpu) through its C ABI.

    token_loss     CE, weights, row scalar and loss of every token: one read of the logits
    row_gradient   row_scalar (softmax - onehot): one read, one write
    next_token_ce  a reference model's CE: one read

B batch, S sequence, H heads, V vocabulary. Logits are float32, bfloat16, float16 or float64, with
last stride 1 and any other strides; "acc" is float32, float64 for float64 logits. The library is
loaded at first use; `WMTP_CPU_ISA=avx512|avx2|baseline` overrides its choice of instruction set.
"""

import ctypes
import functools
import os
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from wmtp.checks import target_error, weight_error

LIBRARY = Path(__file__).parent / "libwmtp_cpu.so"

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_BAD_TARGET, _BAD_WEIGHT, _UNKNOWN_ISA, _MISSING_ISA = 1, 2, 3, 4


class _Rows(ctypes.Structure):  # kernels/cpu/wmtp_cpu.h, and so the next two
    _fields_ = [
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride_b", "stride_s", "stride_h")),
        *((name, ctypes.c_int64) for name in ("B", "S", "H", "V")),
        ("target_ids", ctypes.c_void_p),
        ("ignore_index", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class _Weighting(ctypes.Structure):
    _fields_ = [
        ("head_weights", ctypes.c_void_p),
        ("ref_ce", ctypes.c_void_p),
        ("temperature", ctypes.c_double),
        ("is_signed", ctypes.c_int32),
        ("normalize", ctypes.c_int32),
    ]


class _TokenLoss(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("token_loss", "row_scalar", "weight_sum", "ce", "lse")
    ]


def token_loss(
    logits: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None,
    ref_ce: Tensor | None,
    temperature: float,
    signed: bool,
    normalize: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """CE, weights and loss of every token.

    Args:
        logits: [B, S, H, V].
        target_ids: [B, S] int64, contiguous, unshifted.
        head_weights: [B, S, H] acc, contiguous, or None.
        ref_ce: [B, S - 1] acc, contiguous, nats, or None; not with head_weights.
        temperature: of the excess softmax, nats.
        signed: excess is ce - ref_ce instead of |ce - ref_ce|.
        normalize: row_scalar is w / sum_k w instead of w.
        ignore_index: a target of this id is no target.

    Returns:
        token_loss [B, S], row_scalar [B, S, H], weight_sum [B, S], ce [B, S, H], lse [B, S, H].

    Raises:
        IndexError: a target outside [0, V).
        ValueError: a negative or non-finite weight where there is a target.
    """
    library = _library()
    batch, length, heads, _ = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tokens = [torch.empty(batch, length, dtype=dtype) for _ in range(2)]
    rows = [torch.empty(batch, length, heads, dtype=dtype) for _ in range(3)]
    out = (tokens[0], rows[0], tokens[1], rows[1], rows[2])
    how = _Weighting(_pointer(head_weights), _pointer(ref_ce), temperature, signed, normalize)
    position = ctypes.c_int64()
    status = library.wmtp_cpu_token_loss(
        _rows(logits, logits.stride(2), heads, target_ids, ignore_index),
        how,
        _TokenLoss(*(tensor.data_ptr() for tensor in out)),
        position,
    )
    if status == _BAD_WEIGHT:
        assert head_weights is not None
        token, k = divmod(position.value, heads)
        b, t = divmod(token, length)
        raise weight_error(f"[{b}, {t}, {k}]", head_weights[b, t, k].item())
    if status == _BAD_TARGET:
        _raise_target_error(target_ids, position.value, logits.shape[-1], ignore_index)
    return out


def row_gradient(
    logits: Tensor,
    target_ids: Tensor,
    lse: Tensor,
    row_scalar: Tensor,
    ignore_index: int,
    inplace: bool = False,
) -> Tensor:
    """The gradient of sum row_scalar * ce with respect to the logits.

    Args:
        logits: [B, S, H, V]. Shared heads (H > 1, stride 0 along them) are one row a token.
        target_ids: [B, S] int64, contiguous, unshifted.
        lse: [B, S, H] acc, contiguous, from `token_loss`. Its rounding bounds the relative error of
            the probabilities: half a unit in its last place, 1e-6 up to 32 in float32.
        row_scalar: [B, S, H] acc, contiguous.
        ignore_index: a target of this id is no target; such rows get exactly 0, unread.
        inplace: write over the logits.

    Returns:
        [B, S, H, V] contiguous, of the logits' dtype; shared heads: their sum, [B, S, 1, V]. The
        logits themselves when `inplace`.

    Raises:
        IndexError: a target outside [0, V).
    """
    library = _library()
    batch, length, heads, vocabulary = logits.shape
    grad = None
    if not inplace:
        shared = heads > 1 and logits.stride(2) == 0
        shape = (batch, length, 1 if shared else heads, vocabulary)
        grad = torch.empty(shape, dtype=logits.dtype)
    position = ctypes.c_int64()
    status = library.wmtp_cpu_row_gradient(
        _rows(logits, logits.stride(2), heads, target_ids, ignore_index),
        lse.data_ptr(),
        row_scalar.data_ptr(),
        _pointer(grad),
        0 if grad is None else grad.numel() * grad.element_size(),
        position,
    )
    if status == _BAD_TARGET:
        _raise_target_error(target_ids, position.value, vocabulary, ignore_index)
    return logits if grad is None else grad


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
    library = _library()
    batch, length, vocabulary = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ref_ce = torch.empty(batch, max(length - 1, 0), dtype=dtype)
    position = ctypes.c_int64()
    status = library.wmtp_cpu_next_token_ce(
        _rows(logits, 0, 1, target_ids, ignore_index), ref_ce.data_ptr(), position
    )
    if status == _BAD_TARGET:
        _raise_target_error(target_ids, position.value, vocabulary, ignore_index)
    return ref_ce


def unavailable() -> str | None:
    """Why the CPU kernel cannot run here, with the remedy; None when it can.

    Raises:
        RuntimeError: WMTP_CPU_ISA names an instruction set that is unknown or missing here.
    """
    remedy = "install a C++17 compiler, CMake and Ninja, then install wmtp again"
    if not LIBRARY.exists():
        return f"its C++ kernel was not built when wmtp was installed: {remedy}"
    try:
        _library()
    except OSError as error:
        return f"its C++ kernel does not load ({error}): {remedy}"
    return None


def instruction_set() -> str:
    """ "avx512", "avx2" or "baseline": what the kernel runs with here.

    Raises:
        OSError: the kernel is not there; `unavailable` says why.
        RuntimeError: WMTP_CPU_ISA names an instruction set that is unknown or missing here.
    """
    return _library().wmtp_cpu_instruction_set().decode()


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    pointer, position = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64)
    rows = ctypes.POINTER(_Rows)
    library.wmtp_cpu_select.argtypes = [ctypes.c_char_p]
    library.wmtp_cpu_instruction_set.restype = ctypes.c_char_p
    library.wmtp_cpu_token_loss.argtypes = [
        rows,
        ctypes.POINTER(_Weighting),
        ctypes.POINTER(_TokenLoss),
        position,
    ]
    library.wmtp_cpu_row_gradient.argtypes = [
        *(rows, pointer, pointer, pointer),
        *(ctypes.c_size_t, position),
    ]
    library.wmtp_cpu_next_token_ce.argtypes = [rows, pointer, position]
    _select_instruction_set(library, os.environ.get("WMTP_CPU_ISA", ""))
    return library


def _select_instruction_set(library: ctypes.CDLL, name: str) -> None:
    status = library.wmtp_cpu_select(name.encode())
    if status == _UNKNOWN_ISA:
        raise RuntimeError(
            f"WMTP_CPU_ISA must be avx512, avx2 or baseline (the last only, elsewhere than on "
            f"x86-64), got {name!r}: unset it to choose the best"
        )
    if status == _MISSING_ISA:
        raise RuntimeError(f"WMTP_CPU_ISA is {name}, which this CPU lacks: unset it")


def _rows(
    logits: Tensor, head_stride: int, heads: int, target_ids: Tensor, ignore_index: int
) -> _Rows:
    return _Rows(
        logits.data_ptr(),
        *(logits.stride(0), logits.stride(1), head_stride),
        *(logits.shape[0], logits.shape[1], heads, logits.shape[-1]),
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
