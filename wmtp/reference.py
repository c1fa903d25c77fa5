"""The eager definition of the weighted multi-token-prediction loss: the truth kernels are held to.

Read this first. It is written for the eye, in plain torch operations that autograd differentiates;
it is what `backend="eager"` runs. In fp64 it is the oracle of the tests.

    B batch, S sequence, H heads (the horizon), V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp import checks
from wmtp.arguments import Call, checked_call, chosen_weighting
from wmtp.exact_zero import log_sum_exp, product
from wmtp.kinds import is_readable
from wmtp.labels import Targets
from wmtp.metrics import MTPLoss, OfRows, measured
from wmtp.numerics import PLAIN, Numerics, numerics_of
from wmtp.reduction import (
    Terms,
    accumulation_dtype,
    counted_tokens,
    may_be_negative,
    to_row_scalar,
    to_token_scalar,
)
from wmtp.weightings import Given, Weighting
from wmtp.weightings.base import field_of


class RowStatistics(NamedTuple):
    """What rows of logits say of their targets, [B, S, H] each; 0 where a pair does not count."""

    ce: Tensor
    row_loss: Tensor  # f, which the loss averages
    lse: Tensor  # of x
    entropy: Tensor  # of softmax(x); this and the next without gradient
    correct: Tensor  # bool


def compute_weighted_mtp_loss(
    logits: Tensor,
    target_ids: Tensor | Sequence[Tensor],
    head_weights: Tensor | None = None,
    horizon: int = 4,
    ignore_index: int = -100,
    *,
    weighting: Weighting | None = None,
    ref_ce: Tensor | None = None,
    ref_logits: Tensor | None = None,
    temperature: Tensor | float = 0.7,
    excess: str = "abs",
    head_prior: Tensor | None = None,
    shifted: bool = False,
    offsets: Sequence[int] | None = None,
    document_ids: Tensor | None = None,
    target_mask: Tensor | None = None,
    position_mask: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sigmoid_cap: Sequence[float] | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    vocab_size: int | None = None,
    reduction: str | None = None,
    normalizer: Tensor | float | None = None,
    metrics: bool = False,
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
    call = checked_call(
        "logits",
        logits,
        target_ids,
        rule,
        accumulation_dtype(logits),
        reduction=reduction,
        normalizer=normalizer,
        horizon=horizon,
        head_prior=head_prior,
        ignore_index=ignore_index,
        shifted=shifted,
        offsets=offsets,
        document_ids=document_ids,
        target_mask=target_mask,
        position_mask=position_mask,
        numerics=numerics_of(logit_scale, softcap, sigmoid_cap, z_loss, label_smoothing),
        vocab_size=vocab_size,
        metrics=metrics,
    )
    return loss_of_logits(logits, call)


def loss_of_logits(logits: Tensor, call: Call) -> MTPLoss:
    """`compute_weighted_mtp_loss` of arguments as checked."""
    rule, targets, terms = call.rule, call.targets, call.terms
    rows = row_statistics(logits, targets, call.numerics, call.vocab_size, call.measured)
    ce = rows.ce
    if isinstance(rule, Given):
        negative = may_be_negative(terms.reduction, terms.normalizer is not None)
        checks.raise_on_bad_weight(rule.head_weights, targets.valid, negative)
    ref_logits = field_of(rule, "ref_logits")
    if ref_logits is not None:
        rule = rule.with_fields(ref_ce=reference_ce(ref_logits, targets), ref_logits=None)
    rule, valid = rule.resolved(targets), targets.valid()
    weights = final_weights(rule, Pairs(ce, valid, rows.entropy), call)
    how = {"bare": call.sums_to_one}
    loss, valid_mask = loss_of_weights(rows.row_loss, weights, valid, terms, **how)
    made = MTPLoss(loss, valid_mask, ce)
    if not call.metrics:
        return made
    of_rows = OfRows(rows.lse, rows.entropy, rows.correct)
    return with_metrics(made, of_rows, call._replace(rule=rule))


def with_metrics(loss: MTPLoss, rows: OfRows, call: Call) -> MTPLoss:
    """The loss with what `metrics` asks for; the rule knows its weights, or their reference."""
    valid = call.targets.valid()
    with torch.no_grad():
        weights = final_weights(call.rule, Pairs(loss.ce_per_head, valid, rows.entropy), call)
        # A row that is all -inf has none, whatever a backend finds.
        rows = rows._replace(lse=rows.lse.masked_fill(loss.ce_per_head.isnan(), float("nan")))
        return measured(loss, rows, weights, valid, call.terms)


def loss_of_weights(
    row_loss: Tensor, weights: Tensor, valid: Tensor, terms: Terms, *, bare: bool = False
) -> tuple[Tensor, Tensor]:
    """(loss, valid_mask): everything after the pairs' losses and weights [B, S, H]; differentiable
    in both.

    Args:
        row_loss: what is averaged, the cross entropy for one.
        valid: [B, S, H] bool, the pairs that count.
        bare: the weights are a rule's that sum to 1 over a token's pairs, and nothing else.
    """
    if bare:
        row_scalar = product(weights, to_token_scalar(valid, row_loss.dtype, terms))
    else:
        row_scalar = to_row_scalar(weights, terms)
    loss = product(row_scalar, row_loss).sum()
    return loss, counted_tokens(weights.abs().sum(-1))


class Pairs(NamedTuple):
    """What a rule's weights follow from, [B, S, H] each."""

    ce: Tensor
    valid: Tensor
    entropy: Tensor | None = None  # of rules that need it


def final_weights(rule: Weighting, pairs: Pairs, call: Call) -> Tensor:
    """[B, S, H]: the rule's weights, times masks and prior."""
    weights = weights_of(rule, pairs, call.targets)
    return weights if call.terms.factor is None else product(call.terms.factor, weights)


def weights_of(rule: Weighting, pairs: Pairs, targets: Targets) -> Tensor:
    """[B, S, H]: a rule's weights of the cross entropies, which are constants to it; 0 where a pair
    does not count."""
    ce, needs = pairs.ce.detach(), {}
    if rule.compares:
        needs["ref_ce"] = targets.reference_of_heads(field_of(rule, "ref_ce").detach().to(ce.dtype))
    for name in rule.needs:
        needs[name] = getattr(pairs, name)
    return rule.weights(ce, pairs.valid, **needs)


@torch.no_grad()
def formed(rule: Weighting, pairs: Pairs, call: Call) -> Given:
    """A rule's weights of pairs that another pass measured, for the pass to come: of any value, for
    NaN and inf of logits and references surface by them."""
    return Given(final_weights(rule, pairs, call))


def cross_entropy_per_head(logits: Tensor, target_ids: Tensor, ignore_index: int = -100) -> Tensor:
    """`cross_entropies` of unshifted ids [B, S], and no more said of them."""
    _, length, heads, _ = logits.shape
    return cross_entropies(logits, Targets(target_ids, length, heads, ignore_index))


def cross_entropies(
    logits: Tensor, targets: Targets, numerics: Numerics = PLAIN, vocab_size: int | None = None
) -> Tensor:
    """ce[b, t, k] = logsumexp(x[b, t, k, :]) - x[b, t, k, target of head k at t].

    Returns:
        [B, S, H] float32 (float64 for float64 logits), nats, 0 where a pair does not count.
    """
    return row_statistics(logits, targets, numerics.of_ce, vocab_size).ce


def row_statistics(
    logits: Tensor,
    targets: Targets,
    numerics: Numerics = PLAIN,
    vocab_size: int | None = None,
    metrics: bool = False,
) -> RowStatistics:
    """Of each pair: its cross entropy, and what `numerics` and metrics make of its row x.

        ce = lse - x[target]      f = (1 - eps) ce + eps (lse - mean x) + z lse^2
        entropy = - sum p log p,  p = softmax(x)

    Args:
        logits: [B, S, H, V] float32, bfloat16, float16 or float64.
        vocab_size: of the V columns those before are read; None: all.
        metrics: lse, entropy and correct are wanted, which are empty without.

    Raises:
        IndexError: on the CPU, for a target outside [0, V). Elsewhere its cross entropy is NaN.
    """
    logits, wanted = logits[..., :vocab_size], targets.of_heads()
    vocabulary = logits.shape[-1]
    valid = wanted != targets.ignore_index
    in_range = (wanted >= 0) & (wanted < vocabulary)
    raise_on_bad_target(wanted, valid, vocabulary, targets.ignore_index)
    # Rows without a target must not be able to spoil anything, not even with NaN.
    logits = logits.to(accumulation_dtype(logits)).masked_fill(~valid[..., None], 0.0)
    rows, target = numerics.x_of(logits), wanted.clamp(0, vocabulary - 1)[..., None]
    picked = rows.gather(-1, target)[..., 0]
    # Never max + log sum, which would lose the digits of the second to a large first.
    row_max, log_sum = max_and_log_sum(rows)
    log_sum = torch.where(in_range | ~valid, log_sum, float("nan"))
    ce = row_loss = torch.where(valid, (row_max - picked) + log_sum, 0.0)
    if numerics.label_smoothing:
        smooth = torch.where(valid, (row_max - rows.mean(-1)) + log_sum, 0.0)
        row_loss = (1 - numerics.label_smoothing) * ce + numerics.label_smoothing * smooth
    if numerics.z_loss:
        lse = torch.where(valid, row_max + log_sum, 0.0)
        row_loss = row_loss + numerics.z_loss * product(lse, lse)
    if not metrics:
        return RowStatistics(ce, row_loss, *(ce.new_empty(0),) * 3)
    with torch.no_grad():
        lse = torch.where(valid, row_max + log_sum, 0.0)
        below_max = rows - row_max[..., None]
        of_column = product((below_max - log_sum[..., None]).exp(), below_max)
        entropy = torch.where(valid, log_sum - of_column.sum(-1), 0.0)
        correct = valid & ~lse.isnan() & (logits.argmax(-1) == target[..., 0])
    return RowStatistics(ce, row_loss, lse, entropy, correct)


def max_and_log_sum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """m = max x and log sum exp(x - m) of rows [..., V], which sum to the log-sum-exp.

    m is a constant: the sum of both does not depend on it. It is kept finite, so that -inf is a
    probability of 0 and +inf a log sum of inf.
    """
    limits = torch.finfo(rows.dtype)
    row_max = rows.detach().amax(-1).clamp(limits.min, limits.max)
    return row_max, log_sum_exp(rows, row_max)


def next_token_ce(logits: Tensor, target_ids: Tensor, ignore_index: int = -100) -> Tensor:
    """[B, S - 1]: `reference_ce` of unshifted ids [B, S]."""
    return reference_ce(logits, Targets(target_ids, logits.shape[1], 1, ignore_index))


def reference_ce(logits: Tensor, targets: Targets) -> Tensor:
    """The cross entropy of logits [B, S, V] at t for the next token, detached, indexed by the token
    it is about: [B, T - 1], or [B, T] where the labels are shifted."""
    ce = cross_entropies(logits.detach()[:, :, None], targets.next_tokens())[:, :, 0]
    return ce[:, : targets.about()]


def raise_on_bad_target(targets: Tensor, valid: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Targets [B, S, H], as lined up with the heads, lie in [0, V) where they are valid."""
    # Elsewhere than on the CPU the question would cost a sync; there the loss becomes NaN.
    if not is_readable(targets):
        return
    bad = valid & ((targets < 0) | (targets >= vocabulary))
    if bad.any():
        b, t, k = bad.nonzero()[0].tolist()
        raise checks.target_error((b, t, k), int(targets[b, t, k]), vocabulary, ignore_index)
