"""How the same numbers may lie in memory: functions of a dense tensor, differentiable in it.

Where memory lies between the numbers it holds NaN, which nobody may read.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NAN = float("nan")


class Layout(NamedTuple):
    arrange: Callable[[Tensor], Tensor]
    unit_stride: bool = True  # along the last axis
    own_rows: bool = True  # no number is two entries, but for those of heads that share a row
    leaf_only: bool = False


def axes_moved(dense: Tensor, *order: int) -> Tensor:
    """Contiguous in another order of the axes."""
    back = [order.index(axis) for axis in range(len(order))]
    return dense.permute(order).contiguous().permute(back)


def after(dense: Tensor, lead: int) -> Tensor:
    """Contiguous, `lead` elements after the beginning of its memory."""
    return F.pad(dense.flatten(), (lead, 0), value=NAN)[lead:].view(dense.shape)


def padded(dense: Tensor) -> Tensor:
    """Rows with a gap between them."""
    return F.pad(dense, (0, 5), value=NAN)[..., : dense.shape[-1]]


def every_second(dense: Tensor) -> Tensor:
    return torch.stack((dense, torch.full_like(dense, NAN)), -1)[..., 0]


def between_elements(dense: Tensor) -> Tensor:
    """At an address that is no multiple of an element's size, as `torch.frombuffer` may give."""
    if not dense.numel() or dense.dtype == torch.float64:  # the truth's
        return dense
    offset = dense.element_size() // 2
    buffer = bytearray(offset + dense.nbytes)
    found = torch.frombuffer(buffer, dtype=dense.dtype, offset=offset)
    return found.view(dense.shape).copy_(dense.detach())


# Of logits or hidden states [B, S, H, V or D].
ROWS = {
    "dense": Layout(lambda dense: dense),
    "heads first": Layout(lambda dense: axes_moved(dense, 0, 2, 1, 3)),
    "sequence first": Layout(lambda dense: axes_moved(dense, 1, 0, 2, 3)),
    "last axis first": Layout(lambda dense: axes_moved(dense, 3, 0, 1, 2), unit_stride=False),
    "every second": Layout(every_second, unit_stride=False),
    "padded": Layout(padded),
    "after 1": Layout(partial(after, lead=1)),
    "after 16": Layout(partial(after, lead=16)),
    "after 33": Layout(partial(after, lead=33)),
    "shared heads": Layout(lambda dense: dense[:, :, :1].expand(dense.shape)),
    "shared padded heads": Layout(lambda dense: padded(dense[:, :, :1]).expand(dense.shape)),
    "one sequence": Layout(lambda dense: dense[:1].expand(dense.shape), own_rows=False),
    "one position": Layout(lambda dense: dense[:, :1].expand(dense.shape), own_rows=False),
    "between elements": Layout(between_elements, own_rows=False, leaf_only=True),
}
# Of an lm_head_weight [V, D].
MATRICES = {
    "dense": Layout(lambda dense: dense),
    "transposed": Layout(lambda dense: axes_moved(dense, 1, 0), unit_stride=False),
    "padded": Layout(padded),
    "after 1": Layout(partial(after, lead=1)),
}
# Of head_weights [B, S, H].
WEIGHTS = {
    "dense": Layout(lambda dense: dense),
    "heads first": Layout(lambda dense: axes_moved(dense, 2, 0, 1), unit_stride=False),
    "one token's": Layout(lambda dense: dense[:1, :1].expand(dense.shape), own_rows=False),
    "one head's": Layout(lambda dense: dense[..., :1].expand(dense.shape), own_rows=False),
}
