"""What a loss knows of its pairs besides, for loggers. B batch, S sequence, H heads."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
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
    """An MTPLoss of `metrics=True`: it unpacks as three too, and has `metrics`.

    A copy has them, pickled or by `_replace`; what is made anew of the three has None.
    """

    # A list: where a tuple is, torch's pytrees see a named tuple and not what is registered below.
    _fields: ClassVar[Any] = list(MTPLoss._fields)  # type: ignore[misc]
    _metrics: Metrics | None = None

    def __new__(
        cls, loss: Tensor, valid_mask: Tensor, ce_per_head: Tensor, metrics: Metrics | None = None
    ) -> Any:
        made = super().__new__(cls, loss, valid_mask, ce_per_head)
        made._metrics = metrics
        return made

    def __getnewargs__(self) -> Any:
        return (*self, self._metrics)

    def _replace(self, **values: Any) -> Any:
        made = super()._replace(**values)
        made._metrics = self._metrics
        return made

    @property
    def metrics(self) -> Metrics | None:
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


@dataclass(frozen=True, eq=False, slots=True)
class Summary:
    """Sums over pairs that count, of each head: [H] float64 all. Summaries of micro-batches add up.

    Attributes:
        count: how many pairs count.
        ce: the sum of their cross entropies, nats.
        hits: how many are correct: the target is the largest logit, of equal ones the first.
        entropy: the sum of the entropies of their softmax(x), nats.
        weight: the sum of their weights in the loss, as `Metrics.weights` has them.
    """

    count: Tensor
    ce: Tensor
    hits: Tensor
    entropy: Tensor
    weight: Tensor

    def __add__(self, other: "Summary") -> "Summary":
        if not isinstance(other, Summary):
            return NotImplemented
        if self.count.shape != other.count.shape:
            heads = f"{len(self.count)} and of {len(other.count)}"
            raise ValueError(f"summaries must have as many heads to be added, got ones of {heads}")
        pairs = zip(self.sums(), other.sums(), strict=True)
        return Summary(*(ours + theirs for ours, theirs in pairs))

    def __radd__(self, other: int) -> "Summary":
        """Of 0, which `sum` starts with."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def sums(self) -> list[Tensor]:
        """Its values, in their order: what has to be added up over processes."""
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def mean_ce(self) -> Tensor:
        """[H] nats; 0 where no pair counts, and so the next two."""
        return self.ce / self.count.clamp(min=1)

    @property
    def accuracy(self) -> Tensor:
        """[H] in [0, 1]: which part of the pairs is correct."""
        return self.hits / self.count.clamp(min=1)

    @property
    def mean_entropy(self) -> Tensor:
        """[H] nats."""
        return self.entropy / self.count.clamp(min=1)

    @property
    def weight_share(self) -> Tensor:
        """[H]: of the weight of all heads; 0 where they have none together."""
        total = self.weight.sum()
        return torch.where(total == 0, 0.0, self.weight / total.masked_fill(total == 0, 1.0))


def summarize(result: MTPLoss, group: "dist.ProcessGroup | None" = None) -> Summary:
    """What loggers want of a loss, by heads: sums and counts that can be added and averaged.

    Args:
        result: of a loss that was called with `metrics=True`.
        group: the processes whose pairs are summed up, by one all_reduce of [5, H] float64, which
            all of them have to call; `torch.distributed.group.WORLD` is all processes. None: this
            process's own pairs, whether there are others or not.

    Returns:
        A Summary on the result's device, without gradient: `.count`, `.ce`, `.hits`, `.entropy`,
        `.weight`, and of these `.mean_ce`, `.accuracy`, `.mean_entropy`, `.weight_share`, [H]
        float64 each. NaN of the logits is NaN here; where no pair counts all is 0.

    Raises:
        ValueError: the result has no metrics.
        TypeError: it is no loss's result, as after unpacking.

    Example: uniform predictions over five tokens, the first of which is the hit.

        >>> import torch
        >>> from wmtp import fused_weighted_mtp_loss, summarize
        >>> logits, ids = torch.zeros(1, 4, 2, 5), torch.tensor([[3, 0, 1, 0]])
        >>> summary = summarize(fused_weighted_mtp_loss(logits, ids, metrics=True))
        >>> summary.count.tolist()
        [3.0, 2.0]
        >>> summary.mean_ce.tolist() == summary.mean_entropy.tolist()       # log 5, both
        True
        >>> summary.accuracy.tolist()
        [0.6666666666666666, 0.5]
        >>> sum([summary, summary]).count.tolist()                          # of two micro-batches
        [6.0, 4.0]
    """
    if not isinstance(result, MTPLoss):
        raise TypeError(
            f"result must be what a loss returned, got {type(result).__name__}: pass it whole, "
            "before it is unpacked"
        )
    metrics = result.metrics
    if metrics is None:
        raise ValueError("the result has no metrics: call the loss with metrics=True")
    of_pairs = (
        metrics.valid,
        result.ce_per_head.detach(),
        metrics.correct,
        metrics.entropy,
        metrics.weights,
    )
    sums = torch.stack([values.sum((0, 1), dtype=torch.float64) for values in of_pairs])
    if group is not None:
        dist.all_reduce(sums, group=group)
    return Summary(*sums.unbind())
