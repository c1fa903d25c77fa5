"""The eager definition of the weighted multi-token-prediction loss: the truth kernels are held to.

Read this first. It is written for the eye, in plain torch operations that autograd differentiates;
it is what `backend="eager"` runs. In fp64 it is the oracle of the tests.

    B batch, S sequence, H heads (the horizon), V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wmtp import checks
from wmtp.arguments import check_call, chosen_weighting
from wmtp.exact_zero import log_sum_exp, product
from wmtp.kinds import is_readable
from wmtp.labels import has_target, shift_to_heads
from wmtp.reduction import accumulation_dtype, counted_tokens, to_row_scalar, to_token_scalar
from wmtp.weightings import Excess, Given, Weighting
from wmtp.weightings.base import as_tensor
from wmtp.weightings.excess import align_ref_ce


class MTPLoss(NamedTuple):
    """What every weighted loss returns; unpacks as three.

    Attributes:
        loss: [], the scalar to call `.backward()` on.
        valid_mask: [B, S] bool, the tokens that count: those whose weights sum to more than 1e-8
            (a NaN sum counts too, so that it surfaces in the loss).
        ce_per_head: [B, S, H], the cross entropy in nats, 0 where there is no target.
    """

    loss: Tensor
    valid_mask: Tensor
    ce_per_head: Tensor


def compute_weighted_mtp_loss(
    logits: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None = None,
    horizon: int = 4,
    ignore_index: int = -100,
    *,
    weighting: Weighting | None = None,
    ref_ce: Tensor | None = None,
    ref_logits: Tensor | None = None,
    temperature: Tensor | float = 0.7,
    excess: str = "abs",
    reduction: str = "token_mean",
    normalizer: Tensor | float | None = None,
) -> MTPLoss:
    """The weighted multi-token-prediction loss, in eager torch.

    Same mathematics, arguments and errors as `wmtp.fused_weighted_mtp_loss`, which see; here
    `horizon` keeps the default 4 and must equal the number of heads H.

        >>> logits = torch.zeros(1, 3, 2, 5)           # uniform predictions over five tokens
        >>> loss, valid_mask, ce = compute_weighted_mtp_loss(
        ...     logits, torch.tensor([[0, 1, 2]]), torch.ones(1, 3, 2), horizon=2)
        >>> round(loss.item(), 4)                      # log 5
        1.6094
        >>> valid_mask.tolist()                        # nothing follows the last token
        [[True, True, False]]
    """
    rule = chosen_weighting(
        head_weights,
        weighting,
        ref_ce=ref_ce,
        ref_logits=ref_logits,
        temperature=temperature,
        excess=excess,
    )
    checks.check_logits("logits", logits, "[B, S, H, V]")
    check_call(
        "logits",
        logits,
        target_ids,
        rule,
        reduction=reduction,
        normalizer=normalizer,
        ignore_index=ignore_index,
        horizon=horizon,
    )
    ignore_index = int(ignore_index)
    return loss_of_logits(logits, target_ids, rule, as_tensor(normalizer), reduction, ignore_index)


def loss_of_logits(
    logits: Tensor,
    target_ids: Tensor,
    rule: Weighting,
    normalizer: Tensor | None,
    reduction: str,
    ignore_index: int,
) -> MTPLoss:
    """`compute_weighted_mtp_loss` of arguments as checked."""
    ce = cross_entropy_per_head(logits, target_ids, ignore_index)
    rule = rule.resolved(target_ids, ce.shape[2], ignore_index)
    if isinstance(rule, Given):
        valid = has_target(target_ids, ce.shape[2], ignore_index)
        raise_on_bad_weight(rule.head_weights, valid)
    elif isinstance(rule, Excess) and rule.ref_logits is not None:
        ref_ce = next_token_ce(rule.ref_logits, target_ids, ignore_index)
        rule = rule.with_fields(ref_ce=ref_ce, ref_logits=None)
    return loss_of_cross_entropies(ce, target_ids, rule, normalizer, reduction, ignore_index)


def loss_of_cross_entropies(
    ce: Tensor,
    target_ids: Tensor,
    rule: Weighting,
    normalizer: Tensor | None,
    reduction: str,
    ignore_index: int,
) -> MTPLoss:
    """Everything after the cross entropies [B, S, H]; differentiable in them and given weights."""
    valid = has_target(target_ids, ce.shape[2], ignore_index)
    weights = weights_of(rule, ce, valid)
    if rule.sums_to_one:
        row_scalar = product(weights, to_token_scalar(valid, ce.dtype, reduction, normalizer))
    else:
        row_scalar = to_row_scalar(weights, reduction, normalizer)
    loss = product(row_scalar, ce).sum()
    return MTPLoss(loss, counted_tokens(weights.sum(-1)), ce)


def weights_of(rule: Weighting, ce: Tensor, valid: Tensor) -> Tensor:
    """[B, S, H]: a rule's weights of the cross entropies, which are constants to it; 0 where there
    is no target."""
    needs = {}
    if rule.compares:
        ref_ce = vars(rule)["ref_ce"].detach().to(ce.dtype)
        needs["ref_ce"] = align_ref_ce(ref_ce, *ce.shape[1:])
    return rule.weights(ce.detach(), valid, **needs)


@torch.no_grad()
def formed(rule: Weighting, ce: Tensor, target_ids: Tensor, ignore_index: int = -100) -> Given:
    """A rule's weights of cross entropies [B, S, H] that another pass made, for the pass to come.

    NaN and inf of the logits reach the loss by their cross entropies; the weights that follow from
    these would be refused as if the caller had given them, and are 1.
    """
    weights = weights_of(rule, ce, has_target(target_ids, ce.shape[2], ignore_index))
    spoiled = ~ce.isfinite().all(-1, keepdim=True) & ~weights.isfinite()
    return Given(weights.masked_fill(spoiled, 1.0))


def cross_entropy_per_head(logits: Tensor, target_ids: Tensor, ignore_index: int = -100) -> Tensor:
    """ce[b, t, k] = logsumexp(logits[b, t, k, :]) - logits[b, t, k, target_ids[b, t + k + 1]].

    Args:
        logits: [B, S, H, V] float32, bfloat16, float16 or float64.
        target_ids: [B, S] integer, unshifted.
        ignore_index: a target of this id has no cross entropy.

    Returns:
        [B, S, H] float32 (float64 for float64 logits), nats, 0 where there is no target.

    Raises:
        IndexError: on the CPU, for a target outside [0, V). Elsewhere its cross entropy is NaN.
    """
    vocabulary = logits.shape[-1]
    targets = shift_to_heads(target_ids.long(), logits.shape[2], ignore_index)
    valid = targets != ignore_index
    in_range = (targets >= 0) & (targets < vocabulary)
    raise_on_bad_target(targets, valid, vocabulary, ignore_index)
    # Rows without a target must not be able to spoil anything, not even with NaN.
    rows = logits.to(accumulation_dtype(logits)).masked_fill(~valid[..., None], 0.0)
    picked = rows.gather(-1, targets.clamp(0, vocabulary - 1)[..., None])[..., 0]
    # Never max + log sum, which would lose the digits of the second to a large first.
    row_max, log_sum = max_and_log_sum(rows)
    ce = torch.where(in_range | ~valid, (row_max - picked) + log_sum, float("nan"))
    return torch.where(valid, ce, 0.0)


def max_and_log_sum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """m = max x and log sum exp(x - m) of rows [..., V], which sum to the log-sum-exp.

    m is a constant: the sum of both does not depend on it. It is kept finite, so that -inf is a
    probability of 0 and +inf a log sum of inf.
    """
    limits = torch.finfo(rows.dtype)
    row_max = rows.detach().amax(-1).clamp(limits.min, limits.max)
    return row_max, log_sum_exp(rows, row_max)


def next_token_ce(logits: Tensor, target_ids: Tensor, ignore_index: int = -100) -> Tensor:
    """[B, S - 1]: the cross entropy of logits [B, S, V] at t for `target_ids[t + 1]`, detached."""
    return cross_entropy_per_head(logits.detach()[:, :, None], target_ids, ignore_index)[:, :-1, 0]


def raise_on_bad_target(targets: Tensor, valid: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Targets [B, S, H], as shifted to the heads, lie in [0, V) where they are valid."""
    # Elsewhere than on the CPU the question would cost a sync; there the loss becomes NaN.
    if not is_readable(targets):
        return
    bad = valid & ((targets < 0) | (targets >= vocabulary))
    if bad.any():
        b, t, k = bad.nonzero()[0].tolist()
        raise checks.target_error(
            f"[{b}, {t + k + 1}]", int(targets[b, t, k]), vocabulary, ignore_index
        )


def raise_on_bad_weight(head_weights: Tensor, valid: Tensor) -> None:
    if not is_readable(head_weights):
        return
    bad = valid & ~((head_weights >= 0) & head_weights.isfinite())
    if bad.any():
        b, t, k = bad.nonzero()[0].tolist()
        raise checks.weight_error(f"[{b}, {t}, {k}]", float(head_weights[b, t, k]))
