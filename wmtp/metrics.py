"""What a loss knows of its pairs besides, for loggers. B batch, S sequence, H heads."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from wmtp.reduction import Terms, denominator


class Metrics(NamedTuple):
    """What `metrics=True` adds to a loss; without gradient, 0 where a pair does not count.

    Attributes:
        lse: [B, S, H] nats, log sum exp x, x being the logits as scaled and capped.
        entropy: [B, S, H] nats, - sum p log p of p = softmax(x), 0 log 0 being 0.
        correct: [B, S, H] bool, the target is the largest logit, of equal ones the first.
        weights: [B, S, H], what each pair counts for in the loss: the weighting's weights, times
            float masks, times `head_prior` unless that is outside them ("head_mean").
        valid: [B, S, H] bool, the pairs that count.
        denominator: [] float64, what the sum over pairs was divided by; [H] with "head_mean".
    """

    lse: Tensor
    entropy: Tensor
    correct: Tensor
    weights: Tensor
    valid: Tensor
    denominator: Tensor


class MTPLoss(NamedTuple):
    """What every weighted loss returns; unpacks as three.

    Attributes:
        loss: [], the scalar to call `.backward()` on.
        valid_mask: [B, S] bool, the tokens that count: those whose weights sum to more than 1e-8
            (a NaN sum counts too, so that it surfaces in the loss).
        ce_per_head: [B, S, H], the cross entropy in nats, 0 where there is no target.
        metrics: with `metrics=True` what is known besides, else None.
    """

    loss: Tensor
    valid_mask: Tensor
    ce_per_head: Tensor

    @property
    def metrics(self) -> Metrics | None:
        return None


class MeasuredLoss(MTPLoss):
    """An MTPLoss of `metrics=True`: it unpacks as three too, and has `metrics`."""

    _metrics: Metrics

    def __new__(
        cls, loss: Tensor, valid_mask: Tensor, ce_per_head: Tensor, metrics: Metrics
    ) -> Any:
        made = super().__new__(cls, loss, valid_mask, ce_per_head)
        made._metrics = metrics
        return made

    @property
    def metrics(self) -> Metrics:
        return self._metrics


class OfRows(NamedTuple):
    """The metrics that a kernel makes, [B, S, H] each."""

    lse: Tensor
    entropy: Tensor
    correct: Tensor


def measured(
    loss: MTPLoss, rows: OfRows, weights: Tensor, valid: Tensor, terms: Terms
) -> MeasuredLoss:
    """The loss with its metrics.

    Args:
        weights: [B, S, H], the final ones.
        valid: [B, S, H] bool.
        terms: of the loss.
    """
    weights = weights.detach()
    divisor = denominator(weights, loss.valid_mask, terms)
    return MeasuredLoss(*loss, Metrics(*rows, weights, valid, divisor))


pytree.register_pytree_node(
    MeasuredLoss,
    lambda loss: ([*loss, loss.metrics], None),
    lambda values, _: MeasuredLoss(*values),
    serialized_type_name="wmtp.MeasuredLoss",
)
