"""From weights to the scalar loss: in which dtype, which tokens count, what divides their sum.

B batch, S sequence, H heads. Part of the definition in `wmtp.reference`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.exact_zero import product
from wmtp.labels import Targets

MIN_WEIGHT_SUM = 1e-8


class Terms(NamedTuple):
    """How a loss is made of its weights and cross entropies; three reductions are left of five.

    pair_mean is "sum" over a normalizer, head_mean too, with a scale for each head.
    """

    reduction: str  # "token_mean", "weight_mean" or "sum"
    normalizer: Tensor | None = None  # [], replaces the denominator
    head_scale: Tensor | None = None  # [H], multiplies what a head adds to the loss
    factor: Tensor | None = None  # broadcast to [B, S, H], multiplies the rule's weights
    of_heads: Tensor | None = None  # [H], what head_mean divides by, before it became a scale

    def multiplied(self, factor: Tensor | None) -> "Terms":
        """With another factor of the weights."""
        if factor is None or self.factor is None:
            return self if factor is None else self._replace(factor=factor)
        return self._replace(factor=self.factor * factor)


def terms_of(
    reduction: str,
    normalizer: Tensor | None,
    head_prior: Tensor | None,
    targets: Targets,
    dtype: torch.dtype,
) -> Terms:
    """Of arguments as checked.

    Args:
        normalizer: [], or [H] with head_mean, or None.
        head_prior: [H], or None.
        dtype: that the loss is accumulated in.
    """
    factor = targets.factor(dtype)
    if head_prior is not None:
        head_prior = head_prior.detach().to(dtype)
    if reduction == "head_mean":
        if normalizer is None:
            normalizer = pairs_of_heads(targets)
        prior = 1 / targets.heads if head_prior is None else head_prior
        scale, unit = _of_heads(normalizer.to(targets.ids.device, torch.float64))
        scale = (prior * scale).to(dtype).expand(targets.heads).contiguous()
        return Terms("sum", unit, scale, factor, normalizer)
    if head_prior is not None:
        factor = head_prior if factor is None else factor * head_prior
    if reduction == "pair_mean":
        counted = pairs_of_heads(targets).sum() if normalizer is None else normalizer
        return Terms("sum", counted, None, factor)
    return Terms(reduction, normalizer, None, factor)


def _of_heads(divisors: Tensor) -> tuple[Tensor, Tensor]:
    """1 / divisors, 0 for 0, times and over the smallest of them, which keeps it in range."""
    empty = divisors == 0
    unit = divisors.masked_fill(empty, torch.inf).amin()
    unit = torch.where(unit.isinf(), 1.0, unit)
    return torch.where(empty, 0.0, unit / divisors.masked_fill(empty, 1.0)), unit


def pairs_of_heads(targets: Targets) -> Tensor:
    """[H] float64: how many pairs of each head count, those with a float mask by its value."""
    valid, factor = targets.valid(), targets.factor(torch.float64)
    counted = valid.double() if factor is None else torch.where(valid, factor, 0.0)
    return counted.sum((0, 1))


def denominator(weights: Tensor, valid_mask: Tensor, terms: Terms) -> Tensor:
    """What the loss was divided by, [], or [H] by heads: float64.

    Args:
        weights: [B, S, H], the final ones.
        valid_mask: [B, S] bool, the tokens that count.
    """
    divisor = terms.normalizer if terms.of_heads is None else terms.of_heads
    if divisor is not None:
        return divisor.detach().to(weights.device, torch.float64)
    if terms.reduction == "token_mean":
        return valid_mask.sum(dtype=torch.float64)
    if terms.reduction == "weight_mean":
        return weights.sum(dtype=torch.float64)
    return weights.new_ones((), dtype=torch.float64)


def may_be_negative(reduction: str, has_normalizer: bool) -> bool:
    """Whether weights may: where no sum of them divides. Of the reductions in `Terms`."""
    return reduction == "sum" or (reduction == "weight_mean" and has_normalizer)


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    """fp32, whatever the logits' dtype; fp64 for fp64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def counted_tokens(weight_sum: Tensor) -> Tensor:
    """[B, S] bool: sum_k |w| > 1e-8, and NaN counts."""
    return ~(weight_sum <= MIN_WEIGHT_SUM)


def to_row_scalar(weights: Tensor, terms: Terms) -> Tensor:
    """[B, S, H], d loss / d ce of loss = sum row_scalar ce: a weight's share of its token's, or of
    all, or itself; over the denominator. A weight of 0 has a row scalar of 0, whatever divides it,
    so that an empty batch has a loss and gradients of 0.

    Args:
        weights: [B, S, H], 0 where a pair does not count.
        terms: whose factor the weights have already.
    """
    normalizer = terms.normalizer
    if terms.reduction == "token_mean":
        counted = counted_tokens(weights.sum(-1))
        row_scalar = torch.where(counted[..., None], _shares(weights, (-1,)), 0.0)
        if normalizer is None:
            return row_scalar / counted.sum().clamp(min=1)
    elif terms.reduction == "weight_mean" and normalizer is None:
        return _shares(weights, (0, 1, 2))
    else:
        row_scalar = weights if terms.head_scale is None else product(weights, terms.head_scale)
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


def to_token_scalar(valid: Tensor, dtype: torch.dtype, terms: Terms) -> Tensor:
    """[B, S, 1], or by head [B, S, H]: d loss / d token_loss of weights that sum to 1 over the
    valid heads of each token, as excess weights do: it follows from `valid` [B, S, H], even where a
    weight comes out as NaN.
    """
    return to_row_scalar(valid.any(-1, keepdim=True).to(dtype), terms)


def _shares(weights: Tensor, dims: tuple[int, ...]) -> Tensor:
    """w / sum w, also where the sum is out of the dtype's range; where all of them are 0 a constant
    0, for the loss is no slope there."""
    largest = weights.detach().amax(dims, keepdim=True) if weights.numel() else weights
    relative = weights / torch.where(largest > 0, largest, 1.0)
    total = relative.sum(dims, keepdim=True)
    empty = total == 0
    return product(relative, total.masked_fill(empty, 1.0).reciprocal()).masked_fill(empty, 0.0)
