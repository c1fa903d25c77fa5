"""What a loss divides by, before there is a loss. B batch, S sequence, H heads, T tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wmtp import checks, label_checks
from wmtp.arguments import (
    Call,
    chosen_reduction,
    chosen_weighting,
    with_decay,
    without_factors,
)
from wmtp.kinds import check_choice, check_same_device, check_whole, is_readable
from wmtp.labels import IGNORE_INDEX
from wmtp.reduction import counted_tokens, pairs_of_heads, terms_of
from wmtp.weightings import Given, Weighting
from wmtp.weightings.base import fields_of


def loss_denominator(
    target_ids: Tensor | Sequence[Tensor],
    horizon: int,
    *,
    length: int | None = None,
    head_weights: Tensor | None = None,
    weighting: Weighting | None = None,
    head_prior: Tensor | None = None,
    shifted: bool = False,
    offsets: Sequence[int] | None = None,
    document_ids: Tensor | None = None,
    target_mask: Tensor | None = None,
    position_mask: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str | None = None,
) -> Tensor:
    """What `fused_weighted_mtp_loss` divides by, from labels, masks and given weights.

        token_mean   the number of positions with sum_k w > 1e-8
        weight_mean  sum w                pair_mean, head_mean: how many pairs count (of each head),
                                          those with a float mask by its value

    Summed over the micro-batches of a step and over processes it is the `normalizer` with which
    each part's loss is its share of the whole batch's. Where gradients are averaged over processes
    (DDP, FSDP) multiply the loss by their number.

    Args:
        target_ids, head_weights, weighting, head_prior, shifted, offsets, document_ids,
            target_mask, position_mask, ignore_index, reduction: as the loss is given them.
            A reference's weights are weighting=Excess(ref_ce), not a keyword of their own.
        horizon: H.
        length: S, where the labels are longer: T > S. None means T: labels [B, S + H] without it
            have every token counted as a position that predicts.

    Returns:
        [] float64; [H] for "head_mean".

    Raises:
        ValueError: "sum", which divides by nothing; a rule whose weights follow from the cross
            entropies, where these divide; on the CPU, weights that the loss refuses; otherwise as
            `fused_weighted_mtp_loss`.

    Example: a step of two micro-batches is the step of the whole batch.

        >>> from wmtp import fused_weighted_mtp_loss
        >>> logits, ids = torch.randn(2, 5, 2, 7), torch.randint(7, (2, 5))
        >>> ids[0, 2:] = -100
        >>> divisor = sum(loss_denominator(part, 2) for part in ids.split(1))
        >>> parts = zip(logits.split(1), ids.split(1))
        >>> loss = sum(fused_weighted_mtp_loss(*part, normalizer=divisor).loss for part in parts)
        >>> torch.allclose(loss, fused_weighted_mtp_loss(logits, ids).loss)
        True
    """
    rule = chosen_weighting(
        head_weights, weighting, ref_ce=None, ref_logits=None, temperature=1.0, excess="abs"
    )
    check_whole("horizon", horizon, 1, "it is the number of heads, H")
    ids: Any = target_ids
    if label_checks.is_listed(ids):
        ids = label_checks.stacked_labels(ids, horizon)
    checks.check_tensor("target_ids", ids, "[B, T]")
    tokens = ids.shape[1] if ids.dim() > 1 else 0
    if length is not None:
        check_whole("length", length, 0, "it is the number of positions, S")
    shape = (*ids.shape[:1], tokens if length is None else length, horizon, 1)
    scores = torch.empty((), device=ids.device).expand(shape)  # of heads' shape, not data
    targets = label_checks.targets_of(
        "logits",
        scores,
        horizon,
        ids,
        ignore_index=ignore_index,
        shifted=shifted,
        offsets=offsets,
        document_ids=document_ids,
        target_mask=target_mask,
        position_mask=position_mask,
    )
    rule.check("logits", scores, targets)
    reduction = chosen_reduction(reduction, rule)
    check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.check_head_prior(head_prior, horizon)
    check_same_device("target_ids", targets.ids, head_prior=head_prior, **fields_of(rule))
    targets = rule.narrowed(targets)
    if isinstance(rule, Given) and is_readable(rule.head_weights):
        negative = reduction in ("pair_mean", "head_mean")
        checks.raise_on_bad_weight(rule.head_weights, targets.valid, negative)
    head_prior = with_decay(rule, head_prior, targets)
    rule, factor = without_factors(rule, targets, torch.float64)
    terms = terms_of("sum", None, head_prior, targets, torch.float64).multiplied(factor)
    return _denominator(Call(targets, rule, terms), reduction)


def _denominator(call: Call, reduction: str) -> Tensor:
    if reduction == "sum":
        raise ValueError("reduction 'sum' divides by nothing: pass no normalizer, or your own")
    if reduction in ("pair_mean", "head_mean"):
        pairs = pairs_of_heads(call.targets)
        return pairs if reduction == "head_mean" else pairs.sum()
    of_token = _weight_of_tokens(call, reduction)
    return counted_tokens(of_token).double().sum() if reduction == "token_mean" else of_token.sum()


def _weight_of_tokens(call: Call, reduction: str) -> Tensor:
    """[B, S] float64: what the weights of each token sum to."""
    valid, name = call.targets.valid(), type(call.rule).__name__
    if call.sums_to_one:  # exactly 1, whatever rounding makes of the sum
        return valid.any(-1).double()
    call = call.resolved()
    if not call.rule.known:
        raise ValueError(
            f"{reduction} divides by the weights of {name}, which follow from the cross entropies: "
            "name pair_mean or head_mean, or pass the weights as head_weights"
        )
    weights = vars(call.rule).get("head_weights")
    if weights is None:
        return valid.double().sum(-1)
    return Given(weights.detach()).weights(valid.double(), valid).sum(-1)
