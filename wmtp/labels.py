"""The only shift in the library: which future token each head is asked for."""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # torch's own convention for "no target"


def shift_to_heads(values: Tensor, horizon: int, fill: float) -> Tensor:
    """Line up a per-position tensor with the heads that predict those positions.

    Head `k` at position `t` predicts position `t + k + 1`, so

        shifted[b, t, k] = values[b, t + k + 1]   if t + k + 1 < S, else fill

    (Gloeckle et al. 2024, arXiv 2404.19737, eq. 2: head 0 is ordinary next-token prediction.)

    Args:
        values: [B, S], any dtype: unshifted `target_ids`, or any other per-position value.
        horizon: H >= 1, the number of heads.
        fill: what stands where the sequence has ended; `ignore_index` for `target_ids`.

    Returns:
        [B, S, H], a view of a padded copy of `values`.

    Example: one sequence of five tokens, three heads, `-100` where nothing is left to predict.

        >>> import torch
        >>> shift_to_heads(torch.tensor([[10, 11, 12, 13, 14]]), horizon=3, fill=-100)
        tensor([[[  11,   12,   13],
                 [  12,   13,   14],
                 [  13,   14, -100],
                 [  14, -100, -100],
                 [-100, -100, -100]]])
    """
    length = values.shape[1]
    return F.pad(values[:, 1:], (0, horizon), value=fill).unfold(1, horizon, 1)[:, :length]


def has_target(target_ids: Tensor, horizon: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """[B, S, H] bool: where head k at position t has a target that is not `ignore_index`.

    >>> import torch
    >>> has_target(torch.tensor([[10, 11, -100]]), horizon=2)
    tensor([[[ True, False],
             [False, False],
             [False, False]]])
    """
    return shift_to_heads(target_ids.long(), horizon, ignore_index) != ignore_index
