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
from typing import Any

import torch
from torch import Tensor

KEPT_FROM_BYTES = 32 << 20

_lock = threading.Lock()
_kept: list[torch.UntypedStorage] = []  # one at most


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    # A thread of the parent may hold it, and does not exist in the child.
    os.register_at_fork(after_in_child=_new_lock)


def _references(held: list[torch.UntypedStorage]) -> tuple[int, int]:
    """How many hold it, in torch and in Python."""
    return torch._C._storage_Use_Count(held[0]._cdata), sys.getrefcount(held[0])


def _references_of_nobody() -> tuple[int, int]:
    """What is found here and now of memory that nothing but a list refers to: no constant, for in
    compiled code Python itself may hold some more."""
    return _references([torch.empty(1, device="cpu").untyped_storage()])


def new_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, prepare: Callable[[Tensor], Any]
) -> Tensor:
    """An uninitialised tensor whose memory no other tensor sees.

    Args:
        prepare: called with memory that is really new, before it is touched.
    """
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    with _lock:
        if _is_free(nbytes):
            new = torch.empty(0, dtype=dtype, device="cpu")
            new.set_(_kept[0], 0, shape)  # type: ignore[call-overload]
            return new
        is_kept = nbytes >= KEPT_FROM_BYTES and _may_keep()
        if is_kept:
            _kept.clear()  # before the new one is allocated: never two
        new = torch.empty(shape, dtype=dtype, device="cpu")
        prepare(new)
        if is_kept:
            _kept.append(new.untyped_storage())
        return new


def _may_keep() -> bool:
    can_count = hasattr(torch._C, "_storage_Use_Count")
    return can_count and os.environ.get("WMTP_KEEP_GRADIENT") != "0"


def release_memory() -> None:
    """Give back the memory that the CPU backend keeps for its next gradient.

    >>> release_memory()
    """
    with _lock:
        _kept.clear()


def _is_free(nbytes: int) -> bool:
    """Whether there is memory of this size that nobody uses, not in another process either."""
    if not _kept or _kept[0].nbytes() != nbytes or _kept[0].is_shared():
        return False
    return _references(_kept) == _references_of_nobody()
