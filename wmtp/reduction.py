"""From token losses to the scalar loss: in which dtype, which tokens count, what divides their sum.

B batch, S sequence, H heads. Part of the definition in `wmtp.reference`.
"""

import torch
from torch import Tensor

MIN_WEIGHT_SUM = 1e-8


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    """fp32, whatever the logits' dtype; fp64 for fp64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def counted_tokens(weight_sum: Tensor) -> Tensor:
    """[B, S] bool: sum_k w > 1e-8, and NaN counts."""
    return ~(weight_sum <= MIN_WEIGHT_SUM)


def to_row_scalar(weights: Tensor, weight_sum: Tensor, reduction: str) -> Tensor:
    """[B, S, H], d token_loss / d ce: w / sum_k w, 0 where the token does not count; else w."""
    if reduction != "token_mean":
        return weights
    counted = counted_tokens(weight_sum)[..., None]
    return torch.where(counted, weights, 0.0) / torch.where(counted, weight_sum[..., None], 1.0)


def find_denominator(weight_sum: Tensor, reduction: str, normalizer: Tensor | None) -> Tensor:
    """[], what divides the sum of the token losses.

    An empty batch has token losses 0 and is divided by 1, so its loss and gradients are 0.
    """
    if normalizer is not None:
        return normalizer.to(weight_sum.dtype)
    if reduction == "token_mean":
        return counted_tokens(weight_sum).sum().clamp(min=1).to(weight_sum.dtype)
    total = weight_sum.sum()
    if reduction == "weight_mean":
        return torch.where(total == 0, torch.ones_like(total), total)
    return torch.ones_like(total)
