"""Memory for new CPU gradients and for the linear op's logits: the last one's again, if free.

torch hands large blocks back to the operating system, which clears them, page by page, when the
next one is asked for: that costs as much as the whole loss. So one block is kept, from
32 MiB on (smaller blocks `malloc` keeps by itself), until a gradient of another size is wanted or
`release_memory` is called. `WMTP_KEEP_GRADIENT=0` keeps none.
"""

import os
import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

KEPT_FROM_BYTES = 32 << 20

_lock = threading.Lock()
_kept: torch.UntypedStorage | None = None


def _references(storage: torch.UntypedStorage | None) -> tuple[int, int] | None:
    """How many hold it, in torch and in Python; None where that is not known."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None or storage is None:
        return None
    return count(storage._cdata), sys.getrefcount(storage)


# Nothing else refers to this one: what is found of it, here and now, is what idle memory has. A
# constant would not do: in compiled code Python itself holds one more reference.
_idle = torch.empty(1, device="cpu").untyped_storage()


def new_gradient(shape: tuple[int, ...], dtype: torch.dtype, prepare: Callable) -> Tensor:
    """An uninitialised tensor whose memory no other tensor sees.

    Args:
        prepare: called with memory that is really new, before it is touched.
    """
    global _kept
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    with _lock:
        if _is_free(nbytes):
            new = torch.empty(0, dtype=dtype, device="cpu")
            return new.set_(_kept, 0, shape)  # type: ignore[call-overload]
        allowed = _references(_idle) is not None and os.environ.get("WMTP_KEEP_GRADIENT") != "0"
        is_kept = allowed and nbytes >= KEPT_FROM_BYTES
        if is_kept:
            _kept = None  # before the new one is allocated: never two
        new = torch.empty(shape, dtype=dtype, device="cpu")
        prepare(new)
        if is_kept:
            _kept = new.untyped_storage()
        return new


def release_memory() -> None:
    """Give back the memory that the CPU backend keeps for its next gradient.

    >>> release_memory()
    """
    global _kept
    with _lock:
        _kept = None


def _is_free(nbytes: int) -> bool:
    """Whether there is memory of this size that nobody uses, not in another process either."""
    if _kept is None or _kept.nbytes() != nbytes or _kept.is_shared():
        return False
    return _references(_kept) == _references(_idle)
