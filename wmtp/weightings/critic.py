"""More for heads whose token raises a learned value (algorithm critic-wmtp).

    delta[b, t] = values[b, t] - discount * values[b, t - 1]      (values[b, -1] = 0)
    w[b, t, :]  = softmax over the valid k of delta[b, t + k + 1] / temperature

delta is the temporal difference (Sutton & Barto 2018, ch. 6.1) seen from the later state. B batch,
S sequence, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from wmtp import checks, label_checks
from wmtp.kinds import check_flag, check_same_device, check_scores, check_shape, check_whole
from wmtp.labels import Targets
from wmtp.weightings.base import Weighting, as_tensor, softmax_over_heads
from wmtp.weightings.given import Given


@dataclass(frozen=True, eq=False)
class Critic(Weighting):
    """w[b, t, :] = softmax over valid k of (V[t+k+1] - discount V[t+k]) / temperature.

    The labels tell the weights, so that the loss takes them as `Given`; no gradient reaches the
    values. Pairs about a position at which there is no value do not count, nor in what pair_mean
    and head_mean divide by: with T > S, or shifted labels, these are not the losses of
    head_weights=td_head_weights(...), where such pairs count, with weight 0.

    Attributes:
        values: [B, S] float, one value per position.
        discount: lambda, in [0, 1].
        temperature: > 0, in units of the values, a number or a 0-d tensor; of their standard
            deviation with `standardize`.
        standardize: of the rises delta of all positions that a pair which counts asks for, each
            once, the mean is subtracted, and they are divided by their standard deviation + 1e-8.
        group: the processes over whose positions that is; None: this call's.

    Raises, with the loss:
        ValueError: values of another shape, discount outside [0, 1], temperature <= 0.
        TypeError: values not floating point.

        >>> import torch
        >>> critic = Critic(torch.tensor([[0.0, 1.0, 3.0]]), discount=1.0, temperature=1.0)
        >>> targets = Targets(torch.tensor([[5, 6, 7]]), length=3, heads=2)
        >>> critic.resolved(targets).head_weights[0, 0]                     # softmax(1, 2)
        tensor([0.2689, 0.7311])
    """

    values: Tensor
    discount: float = 0.95
    temperature: Tensor | float = 0.7
    standardize: bool = False
    group: "dist.ProcessGroup | None" = None

    sums_to_one = at_most_one = known = True
    numbers = ("temperature",)

    def check(self, name: str, scores: Tensor, targets: Targets) -> None:
        check_scores("values", self.values, "[B, S]")
        remedy = f"one value for each position of {name}"
        check_shape("values", self.values, "[B, S]", tuple(scores.shape[:2]), remedy)
        checks.check_temperature(self.temperature)
        checks.check_discount(self.discount)
        check_flag("standardize", self.standardize)

    def narrowed(self, targets: Targets) -> Targets:
        """Without the pairs whose target has no value."""
        return targets.within(targets.length)

    def resolved(self, targets: Targets) -> Given:
        valid = targets.valid()
        rise = _rise(self.values.detach(), self.discount, targets)
        if self.standardize:
            rise = _standardized(rise, targets.positions_asked(), self.group)
        score = targets.at_positions(rise, 0.0)
        return Given(softmax_over_heads(score, valid, as_tensor(self.temperature)))


def _rise(values: Tensor, discount: float, targets: Targets) -> Tensor:
    """[B, S]: delta at each position of the input."""
    length = values.shape[1]
    previous = F.pad(values, (1, 0))[:, :length]
    documents = targets.document_ids
    if documents is not None:
        begins = documents[:, 1:length] != documents[:, : length - 1]
        previous = previous.masked_fill(F.pad(begins, (1, 0)), 0.0)
    return values - float(discount) * previous


def _standardized(rise: Tensor, asked: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """[B, S]: less its mean over the positions that are asked for, over its population sd."""
    exact = rise.double().where(asked, 0.0)
    count, total = _summed(torch.stack((asked.double().sum(), exact.sum())), group)
    below = (rise - total / count.clamp(min=1)).double()
    squares = _summed(below.square().where(asked, 0.0).sum(), group)
    standardized: Tensor = below / ((squares / count.clamp(min=1)).sqrt() + 1e-8)
    return standardized.to(rise.dtype)


def _summed(sums: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """Over the processes of the group."""
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums


def td_head_weights(
    values: Tensor,
    target_ids: Tensor | Sequence[Tensor],
    horizon: int,
    discount: float = 0.95,
    temperature: Tensor | float = 0.7,
    ignore_index: int = -100,
    *,
    shifted: bool = False,
    offsets: Sequence[int] | None = None,
    document_ids: Tensor | None = None,
    target_mask: Tensor | None = None,
    position_mask: Tensor | None = None,
) -> Tensor:
    """Weights of the critic-wmtp algorithm: more for heads whose token raises the value.

        delta[b, t] = values[b, t] - discount * values[b, t - 1]      (values[b, -1] = 0)
        w[b, t, :] = softmax over the valid k of delta[b, t + k + 1] / temperature

    delta is the temporal difference (Sutton & Barto 2018, ch. 6.1) seen from the later state.

    Args:
        values: [B, S] float, one value per position.
        target_ids, ignore_index, shifted, offsets, document_ids, target_mask, position_mask: which
            pairs count, as in `fused_weighted_mtp_loss`; of these, those at whose input position,
            t + offset_k, there is a value. Before a document's first token the value is 0.
        horizon: H >= 1.
        discount: lambda, in [0, 1].
        temperature: > 0, in units of the values.

    Returns:
        [B, S, H] of the values' dtype, without gradient; 0 where a pair does not count.

    Raises:
        ValueError: wrong shapes, mixed devices, horizon < 1, discount outside [0, 1],
            temperature <= 0.
        TypeError: values not floating point, target_ids not integer.

        >>> import torch
        >>> values = torch.tensor([[0.0, 1.0, 3.0]])
        >>> w = td_head_weights(values, torch.tensor([[5, 6, 7]]), 2, discount=1.0, temperature=1.0)
        >>> w[0]                                       # softmax(1, 2); then one head; then none
        tensor([[0.2689, 0.7311],
                [1.0000, 0.0000],
                [0.0000, 0.0000]])
    """
    check_scores("values", values, "[B, S]")
    check_whole("horizon", horizon, 1, "it is the number of heads, H")
    targets = label_checks.targets_of(
        "values",
        values,
        horizon,
        target_ids,
        ignore_index=ignore_index,
        shifted=shifted,
        offsets=offsets,
        document_ids=document_ids,
        target_mask=target_mask,
        position_mask=position_mask,
    )
    rule = Critic(values, discount, temperature)
    rule.check("values", values, targets)
    check_same_device("values", values, temperature=temperature)
    return rule.resolved(rule.narrowed(targets)).head_weights
