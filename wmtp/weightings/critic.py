"""More for heads whose token raises a learned value (algorithm critic-wmtp).

    delta[b, t] = values[b, t] - discount * values[b, t - 1]      (values[b, -1] = 0)
    w[b, t, :]  = softmax over the valid k of delta[b, t + k + 1] / temperature

delta is the temporal difference (Sutton & Barto 2018, ch. 6.1) seen from the later state. B batch,
S sequence, H heads.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from wmtp import checks
from wmtp.kinds import check_same_device, check_scores, check_shape, check_whole
from wmtp.labels import has_target, shift_to_heads
from wmtp.weightings.base import Weighting, as_tensor, softmax_over_heads
from wmtp.weightings.given import Given


@dataclass(frozen=True, eq=False)
class Critic(Weighting):
    """w[b, t, :] = softmax over valid k of (V[t+k+1] - discount V[t+k]) / temperature.

    The labels tell the weights, so that the loss takes them as `Given`; no gradient reaches the
    values.

    Attributes:
        values: [B, S] float, one value per position.
        discount: lambda, in [0, 1].
        temperature: > 0, in units of the values, a number or a 0-d tensor.

    Raises, with the loss:
        ValueError: values of another shape, discount outside [0, 1], temperature <= 0.
        TypeError: values not floating point.

        >>> import torch
        >>> critic = Critic(torch.tensor([[0.0, 1.0, 3.0]]), discount=1.0, temperature=1.0)
        >>> critic.resolved(torch.tensor([[5, 6, 7]]), 2, -100).head_weights[0, 0]   # softmax(1, 2)
        tensor([0.2689, 0.7311])
    """

    values: Tensor
    discount: float = 0.95
    temperature: Tensor | float = 0.7

    sums_to_one = at_most_one = known = True
    numbers = ("temperature",)

    def check(self, name: str, scores: Tensor) -> None:
        check_scores("values", self.values, "[B, S]")
        remedy = f"one value for each position of {name}"
        check_shape("values", self.values, "[B, S]", tuple(scores.shape[:2]), remedy)
        checks.check_temperature(self.temperature)
        checks.check_discount(self.discount)

    def resolved(self, target_ids: Tensor, horizon: int, ignore_index: int) -> Given:
        how = (self.discount, self.temperature, ignore_index)
        return Given(td_head_weights(self.values, target_ids, horizon, *how))


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

        >>> import torch
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
