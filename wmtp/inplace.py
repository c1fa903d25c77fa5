"""inplace=True: which logits may be overwritten, and which have been."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from wmtp.layout import extent, rows_overlap


def check_inplace(inplace: bool, logits: Tensor) -> None:
    if not inplace:
        return
    if isinstance(logits, torch.nn.Parameter):
        raise ValueError(
            "inplace=True would overwrite a Parameter with its gradient: pass inplace=False"
        )
    if logits.stride(-1) != 1 or rows_overlap(logits):
        raise ValueError(
            f"inplace=True needs rows of their own whose last dimension is contiguous, got shape "
            f"{tuple(logits.shape)} with strides {tuple(logits.stride())}: pass "
            f"logits.contiguous() or inplace=False"
        )
    if _autograd_forbids_overwriting(logits):
        raise ValueError(
            "inplace=True would overwrite one of several views that an operation returned together "
            "(chunk, split, unbind) or a view that autograd does not follow: pass a slice of your "
            "own, logits[begin:end], or inplace=False"
        )
    if torch.compiler.is_compiling():
        raise ValueError(
            "inplace=True overwrites the logits, which torch.compile cannot trace: pass "
            "inplace=False inside compiled code"
        )


def check_inplace_heads(inplace: bool, heads: Sequence[Tensor]) -> None:
    if not inplace:
        return
    for head in heads:
        check_inplace(inplace, head)
    if len({head.stride() for head in heads}) > 1:
        raise ValueError(
            "inplace=True needs heads of the same strides, got "
            f"{sorted({head.stride() for head in heads})}: pass inplace=False"
        )
    extents = sorted(extent(head) for head in heads)
    if any(end > begin for (_, end), (begin, _) in pairwise(extents)):
        raise ValueError(
            "inplace=True needs heads of memory of their own, got some that lie across each other: "
            "pass the tensor [B, S, H, V] that they are views of, or inplace=False"
        )


def note_overwritten(logits: Tensor) -> None:
    """These logits hold their gradient now. Whoever saved them for a backward gets autograd's
    error, and whoever passes them in again gets ours, until they are changed."""
    storage = logits.untyped_storage()
    extents = _overwritten_parts(logits)
    torch.autograd.graph.increment_version(logits)
    storage._wmtp_gradients = (logits._version, [*extents, extent(logits)])  # type: ignore[attr-defined]


def check_not_overwritten(name: str, logits: Tensor) -> None:
    parts = _overwritten_parts(logits)
    begin, end = extent(logits) if parts else (0, 0)
    if any(begin < last and first < end for first, last in parts):
        raise ValueError(
            f"{name} have been overwritten by their gradient: an earlier loss was computed from "
            f"them with inplace=True; compute them again, or pass inplace=False there"
        )


def check_gradient_stands(logits: Tensor) -> None:
    """Backward hands out what forward has written here: nobody may have written since."""
    if extent(logits) not in _overwritten_parts(logits):
        raise RuntimeError(
            "the logits, which inplace=True has overwritten with their gradient, have been "
            "modified by an inplace operation since: change them after backward, or pass "
            "inplace=False"
        )


def _overwritten_parts(logits: Tensor) -> list[tuple[int, int]]:
    """Where the storage holds gradients; none any more once somebody else has written to it."""
    version, parts = getattr(logits.untyped_storage(), "_wmtp_gradients", (None, []))
    return parts if parts and version == logits._version else []


def _autograd_forbids_overwriting(logits: Tensor) -> bool:
    if torch.compiler.is_compiling() or not (logits._is_view() and logits.requires_grad):
        return False
    autograd = torch._C._autograd
    return autograd._get_creation_meta(logits) != autograd.CreationMeta.DEFAULT


def has_storage(logits: Tensor) -> bool:
    """Not so for subclasses and inside torch.func; inference tensors count no versions."""
    plain = type(logits) in (Tensor, torch.nn.Parameter) and not logits.is_inference()
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(logits)
