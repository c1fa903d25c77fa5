"""From weights to the scalar loss: in which dtype, which tokens count, what divides their sum.

B batch, S sequence, H heads. Part of the definition in `wmtp.reference`.
"""

import torch
from torch import Tensor

from wmtp.exact_zero import product

MIN_WEIGHT_SUM = 1e-8


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    """fp32, whatever the logits' dtype; fp64 for fp64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def counted_tokens(weight_sum: Tensor) -> Tensor:
    """[B, S] bool: sum_k w > 1e-8, and NaN counts."""
    return ~(weight_sum <= MIN_WEIGHT_SUM)


def to_row_scalar(weights: Tensor, reduction: str, normalizer: Tensor | None) -> Tensor:
    """[B, S, H], d loss / d ce of loss = sum row_scalar ce: a weight's share of its token's, or of
    all, or itself; over the denominator. A weight of 0 has a row scalar of 0, whatever divides it,
    so that an empty batch has a loss and gradients of 0.

    Args:
        weights: [B, S, H], 0 where there is no valid target.
        normalizer: [], replaces the denominator, or None.
    """
    if reduction == "token_mean":
        counted = counted_tokens(weights.sum(-1))
        row_scalar = torch.where(counted[..., None], _shares(weights, (-1,)), 0.0)
        if normalizer is None:
            return row_scalar / counted.sum().clamp(min=1)
    elif reduction == "weight_mean" and normalizer is None:
        return _shares(weights, (0, 1, 2))
    else:
        row_scalar = weights
    return row_scalar if normalizer is None else _divided(row_scalar, normalizer)


def _divided(row_scalar: Tensor, normalizer: Tensor) -> Tensor:
    """In two steps, for it may be a sum of weights that is out of their dtype's range."""
    dtype, limit = row_scalar.dtype, torch.finfo(row_scalar.dtype).max
    normalizer = normalizer.to(torch.promote_types(normalizer.dtype, dtype))
    divisor, rest = (
        normalizer.clamp(max=limit).to(dtype),
        (normalizer / limit).clamp(min=1).to(dtype),
    )
    return row_scalar / torch.where((row_scalar == 0) & (divisor == 0), 1.0, divisor) / rest


def to_token_scalar(
    valid: Tensor, dtype: torch.dtype, reduction: str, normalizer: Tensor | None
) -> Tensor:
    """[B, S, 1], d loss / d token_loss of weights that sum to 1 over the valid heads of each token,
    as excess weights do: it follows from `valid` [B, S, H], even where a weight comes out as NaN.
    """
    return to_row_scalar(valid.any(-1, keepdim=True).to(dtype), reduction, normalizer)


def _shares(weights: Tensor, dims: tuple[int, ...]) -> Tensor:
    """w / sum w, also where the sum is out of the dtype's range; 0 where all of them are 0."""
    largest = weights.detach().amax(dims, keepdim=True) if weights.numel() else weights
    relative = weights / torch.where(largest > 0, largest, 1.0)
    total = relative.sum(dims, keepdim=True)
    return product(relative, torch.where(total == 0, 1.0, total).reciprocal())
