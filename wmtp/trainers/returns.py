"""What the critic's value head learns: rewards per token and their generalised-advantage returns.

    delta_t = r_t + gamma V_{t+1} - V_t                 (V = 0 beyond the last token)
    A_t     = sum_{l >= 0} (gamma lambda)^l delta_{t+l}
    return_t = A_t + V_t

Schulman et al. 2016, arXiv 1506.02438, eq. 16. B batch, S sequence, H heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def token_mask(target_ids: Tensor, ignore_index: int = -100) -> Tensor:
    """[B, S] bool: positions up to the last token that is not ignored; the rest is padding."""
    counted = target_ids != ignore_index
    return counted.flip(1).cumsum(1).flip(1) > 0


def _alone(sums: Tensor) -> Tensor:
    return sums


def token_rewards(
    ce_per_head: Tensor,
    mask: Tensor,
    reward: Tensor | None,
    total: Callable[[Tensor], Tensor] = _alone,
) -> Tensor:
    """[B, S] rewards without gradient, 0 where the mask is False.

    Args:
        ce_per_head: [B, S, H], nats, of the model itself.
        mask: [B, S] bool, from `token_mask`.
        reward: [B], one per sequence, placed on its last token; None: the model's own next-token
            cross entropy, negated and whitened over the batch (mean 0, standard deviation 1).
        total: of sums over this part of the batch, those over all of it.
    """
    if reward is not None:
        is_last = mask & ~F.pad(mask[:, 1:], (0, 1))
        return torch.where(is_last, reward[:, None].to(ce_per_head.dtype), 0.0)
    # The last token predicts nothing: it has a value but no reward.
    predicts = F.pad(mask[:, 1:], (0, 1))
    raw = torch.where(predicts, -ce_per_head[:, :, 0].detach(), 0.0)
    raw_sum, count = total(torch.stack((raw.sum(), predicts.sum())))
    count = count.clamp(min=1)
    centred = torch.where(predicts, raw - raw_sum / count, 0.0)
    deviation = (total(centred.square().sum()) / count).sqrt()
    return centred / (deviation + 1e-8)


def gae_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 0.99, gae_lambda: float = 0.95
) -> Tensor:
    """Returns [B, S] for the values to learn, without gradient; 0 where the mask is False.

    Args:
        rewards, values: [B, S].
        mask: [B, S] bool, True up to a sequence's last token.
        gamma: discount of future rewards. gae_lambda: from 0 (one step) to 1 (the whole future).

        >>> rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
        >>> gae_returns(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.5)
        tensor([[2.3750, 1.7500, 2.0000]])
    """
    values = torch.where(mask, values.detach(), 0.0)
    delta = torch.where(mask, rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values, 0.0)
    return _discounted_sum(delta, gamma * gae_lambda) + values


def _discounted_sum(x: Tensor, factor: float) -> Tensor:
    """out_t = sum_{l >= 0} factor^l x_{t+l}, by doubling how far each position has summed."""
    span = 1
    while span < x.shape[1]:
        x = x + factor**span * F.pad(x[:, span:], (0, span))
        span *= 2
    return x
