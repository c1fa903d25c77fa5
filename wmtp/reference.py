"""The eager definition of the weighted multi-token-prediction loss: the truth kernels are held to.

Read this first. It is written for the eye, in plain torch operations that autograd differentiates;
it is what `backend="eager"` runs. In fp64 it is the oracle of the tests.

    B batch, S sequence, H heads (the horizon), V vocabulary.
"""

from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from wmtp import checks
from wmtp.exact_zero import log_sum_exp, product
from wmtp.kinds import check_choice, check_same_device, check_scores, check_whole, is_readable
from wmtp.labels import has_target, shift_to_heads
from wmtp.reduction import accumulation_dtype, counted_tokens, to_row_scalar, to_token_scalar


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
    ref_logits: Tensor | None = None,
    ref_ce: Tensor | None = None,
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
    checks.check_loss_arguments(
        logits,
        target_ids,
        head_weights,
        ref_logits=ref_logits,
        ref_ce=ref_ce,
        temperature=temperature,
        excess=excess,
        reduction=reduction,
        normalizer=normalizer,
        ignore_index=ignore_index,
        horizon=horizon,
    )
    ignore_index = int(ignore_index)
    ce = cross_entropy_per_head(logits, target_ids, ignore_index)
    if ref_logits is not None:
        ref_ce = next_token_ce(ref_logits, target_ids, ignore_index)
    if head_weights is not None:
        raise_on_bad_weight(head_weights, has_target(target_ids, ce.shape[2], ignore_index))
    return loss_of_cross_entropies(
        ce,
        target_ids,
        head_weights,
        ref_ce,
        as_tensor(normalizer),
        as_tensor(temperature),
        excess,
        reduction,
        ignore_index,
    )


def loss_of_cross_entropies(
    ce: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None,
    ref_ce: Tensor | None,
    normalizer: Tensor | None,
    temperature: Tensor | None,
    excess: str,
    reduction: str,
    ignore_index: int,
) -> MTPLoss:
    """Everything after the cross entropies [B, S, H]; differentiable in them and the weights."""
    valid = has_target(target_ids, ce.shape[2], ignore_index)
    if ref_ce is not None:
        assert temperature is not None
        score = aligned_difference(ce, ref_ce, excess)
        weights = softmax_over_heads(score, valid, temperature)
        row_scalar = product(weights, to_token_scalar(valid, ce.dtype, reduction, normalizer))
    else:
        weights = known_weights(valid, head_weights, ce.dtype)
        row_scalar = to_row_scalar(weights, reduction, normalizer)
    loss = product(row_scalar, ce).sum()
    return MTPLoss(loss, counted_tokens(weights.sum(-1)), ce)


def known_weights(valid: Tensor, head_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, S, H]: the weights given, or 1; 0 where there is no valid target."""
    if head_weights is None:
        return valid.to(dtype)
    return torch.where(valid, head_weights.to(dtype), 0.0)


@overload
def as_tensor(number: None) -> None: ...
@overload
def as_tensor(number: Tensor | float) -> Tensor: ...
def as_tensor(number: Tensor | float | None) -> Tensor | None:
    """A constant, whatever it was."""
    if number is None or isinstance(number, Tensor):
        return None if number is None else number.detach()
    if torch.compiler.is_compiling():  # a product can be traced for any number, a fill for this one
        return torch.ones((), dtype=torch.float64, device="cpu") * number
    return torch.tensor(number, dtype=torch.float64, device="cpu")


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


def excess_head_weights(
    ce_per_head: Tensor,
    ref_ce: Tensor,
    target_ids: Tensor,
    temperature: Tensor | float = 0.7,
    excess: str = "abs",
    ignore_index: int = -100,
) -> Tensor:
    """Weights of the rho1-wmtp algorithm: more for heads that are far from a reference model.

        excess[b, t, k] = |ce[b, t, k] - ref_ce[b, t + k]|      (excess="signed": without the bars)
        w[b, t, :] = softmax over the valid k of excess[b, t, :] / temperature

    The excess loss is that of Rho-1 (Lin et al. 2024, arXiv 2404.07965, eq. 3), which uses the
    signed form; here it weighs heads within a token instead of selecting tokens.

    Args:
        ce_per_head: [B, S, H] float, nats.
        ref_ce: [B, S - 1] float, nats: position t of the reference predicting `target_ids[t + 1]`.
        target_ids: [B, S] integer, unshifted.
        temperature: > 0, in nats.
        excess: "abs" or "signed".
        ignore_index: a target of this id gets no weight.

    Returns:
        [B, S, H] of ce_per_head's dtype, without gradient; 0 where there is no target.

    Raises:
        ValueError: wrong shapes, mixed devices, temperature <= 0, unknown excess.
        TypeError: ce or ref_ce not floating point, target_ids not integer.

        >>> ce, ref_ce = torch.tensor([[[2.0, 5.0], [3.0, 0.0], [0.0, 0.0]]]), torch.zeros(1, 2)
        >>> w = excess_head_weights(ce, ref_ce, torch.tensor([[0, 1, 2]]), temperature=1.0)
        >>> w[0]                                       # softmax(2, 5); then one head; then none
        tensor([[0.0474, 0.9526],
                [1.0000, 0.0000],
                [0.0000, 0.0000]])
    """
    score = excess_loss(ce_per_head, ref_ce, excess)
    checks.check_targets_of("ce_per_head", ce_per_head, target_ids, ignore_index)
    checks.check_temperature(temperature)
    check_same_device("ce_per_head", ce_per_head, temperature=temperature)
    valid = has_target(target_ids, score.shape[2], int(ignore_index))
    return softmax_over_heads(score, valid, as_tensor(temperature))


def excess_loss(ce_per_head: Tensor, ref_ce: Tensor, excess: str) -> Tensor:
    """[B, S, H], detached: ce[b, t, k] - ref_ce[b, t + k], or its absolute value."""
    batch, length, _ = check_scores("ce_per_head", ce_per_head, "[B, S, H]")
    checks.check_ref_ce(ref_ce, batch, length)
    check_same_device("ce_per_head", ce_per_head, ref_ce=ref_ce)
    check_choice("excess", excess, checks.EXCESSES)
    return aligned_difference(ce_per_head, ref_ce, excess)


def aligned_difference(ce: Tensor, ref_ce: Tensor, excess: str) -> Tensor:
    """`excess_loss` of arguments as checked."""
    aligned = align_ref_ce(ref_ce.detach().to(ce.dtype), *ce.shape[1:])
    return difference(ce.detach(), aligned, excess)


def align_ref_ce(ref_ce: Tensor, length: int, horizon: int) -> Tensor:
    """[B, S, H] of ref_ce [B, S - 1]: the reference's about the token that head k at t predicts."""
    # ref_ce[t] is about token t + 1: shifted one to the right it sits at the token it is about.
    ce_of_token = F.pad(ref_ce, (1, 0))[:, :length]
    return shift_to_heads(ce_of_token, horizon, 0.0)


def difference(ce: Tensor, aligned_ref_ce: Tensor, excess: str) -> Tensor:
    """ce - ref_ce ("signed") or its absolute value ("abs"), of any shape."""
    signed = ce - aligned_ref_ce
    return signed if excess == "signed" else signed.abs()


def td_head_weights(
    values: Tensor,
    target_ids: Tensor,
    horizon: int,
    discount: float = 0.95,
    temperature: Tensor | float = 0.7,
    ignore_index: int = -100,
) -> Tensor:
    """Weights of the critic-wmtp algorithm: more for heads whose token raises the value.

        delta[b, t] = values[b, t] - discount * values[b, t - 1]      (values[b, -1] = 0)
        w[b, t, :] = softmax over the valid k of delta[b, t + k + 1] / temperature

    delta is the temporal difference (Sutton & Barto 2018, ch. 6.1) seen from the later state.

    Args:
        values: [B, S] float, one value per position.
        target_ids: [B, S] integer, unshifted.
        horizon: H >= 1.
        discount: lambda, in [0, 1].
        temperature: > 0, in units of the values.
        ignore_index: a target of this id gets no weight.

    Returns:
        [B, S, H] of the values' dtype, without gradient; 0 where there is no target.

    Raises:
        ValueError: wrong shapes, mixed devices, horizon < 1, discount outside [0, 1],
            temperature <= 0.
        TypeError: values not floating point, target_ids not integer.

        >>> values = torch.tensor([[0.0, 1.0, 3.0]])
        >>> w = td_head_weights(values, torch.tensor([[5, 6, 7]]), 2, discount=1.0, temperature=1.0)
        >>> w[0]                                       # softmax(1, 2); then one head; then none
        tensor([[0.2689, 0.7311],
                [1.0000, 0.0000],
                [0.0000, 0.0000]])
    """
    _, length = check_scores("values", values, "[B, S]")
    checks.check_targets_of("values", values, target_ids, ignore_index)
    checks.check_temperature(temperature)
    check_same_device("values", values, temperature=temperature)
    check_whole("horizon", horizon, 1, "it is the number of heads, H")
    checks.check_discount(discount)
    values = values.detach()
    previous = F.pad(values, (1, 0))[:, :length]
    score = shift_to_heads(values - float(discount) * previous, horizon, 0.0)
    valid = has_target(target_ids, horizon, int(ignore_index))
    return softmax_over_heads(score, valid, as_tensor(temperature))


def softmax_over_heads(score: Tensor, valid: Tensor, temperature: Tensor) -> Tensor:
    """softmax of score [..., H] / temperature over the valid heads of each token; 0 elsewhere."""
    score = score.masked_fill(~valid, float("-inf"))
    below_max = (score - score.amax(-1, keepdim=True)) / temperature  # in range, unlike the score's
    return torch.where(valid, below_max.softmax(-1), 0.0)


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
