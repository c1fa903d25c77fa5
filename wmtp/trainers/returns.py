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

from wmtp.labels import Targets


def token_mask(targets: Targets) -> Tensor:
    """[B, S] bool: positions up to the last token that is not ignored; the rest is padding."""
    counted = targets.ids[:, : targets.length] != targets.ignore_index
    return counted.flip(1).cumsum(1).flip(1) > 0


def same_document(targets: Targets) -> Tensor:
    """[B, S - 1] bool: whether the next position is of the same document."""
    documents = targets.document_ids
    if documents is None:
        return torch.ones_like(targets.ids[:, : targets.length - 1], dtype=torch.bool)
    return documents[:, 1 : targets.length] == documents[:, : targets.length - 1]


def _alone(sums: Tensor) -> Tensor:
    return sums


def token_rewards(
    ce_per_head: Tensor,
    mask: Tensor,
    predicts: Tensor,
    reward: Tensor | None,
    total: Callable[[Tensor], Tensor] = _alone,
) -> Tensor:
    """[B, S] rewards without gradient, 0 where the mask is False.

    Args:
        ce_per_head: [B, S, H], nats, of the model itself.
        mask: [B, S] bool, from `token_mask`.
        predicts: [B, S] bool, whether head 0 has a target.
        reward: [B], one per sequence, placed on its last token; None: the model's own next-token
            cross entropy, negated and whitened over the batch (mean 0, standard deviation 1).
        total: of sums over this part of the batch, those over all of it.
    """
    if reward is not None:
        is_last = mask & ~F.pad(mask[:, 1:], (0, 1))
        return torch.where(is_last, reward[:, None].to(ce_per_head.dtype), 0.0)
    # What predicts nothing has a value but no reward.
    raw = torch.where(predicts, -ce_per_head[:, :, 0].detach(), 0.0)
    raw_sum, count = total(torch.stack((raw.sum(), predicts.sum())))
    count = count.clamp(min=1)
    centred = torch.where(predicts, raw - raw_sum / count, 0.0)
    deviation = (total(centred.square().sum()) / count).sqrt()
    return centred / (deviation + 1e-8)


def gae_returns(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    goes_on: Tensor | None = None,
) -> Tensor:
    """Returns [B, S] for the values to learn, without gradient; 0 where the mask is False.

    Args:
        rewards, values: [B, S].
        mask: [B, S] bool, True up to a sequence's last token.
        gamma: discount of future rewards. gae_lambda: from 0 (one step) to 1 (the whole future).
        goes_on: [B, S - 1] bool, from `same_document`: no return reaches over a document's end.

        >>> rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
        >>> gae_returns(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.5)
        tensor([[2.3750, 1.7500, 2.0000]])
    """
    values = torch.where(mask, values.detach(), 0.0)
    on = torch.ones_like(mask[:, 1:]) if goes_on is None else goes_on
    following = torch.where(on, values[:, 1:], 0.0)
    delta = torch.where(mask, rewards + gamma * F.pad(following, (0, 1)) - values, 0.0)
    return _discounted_sum(delta, gamma * gae_lambda, F.pad(on, (0, 1))) + values


def _discounted_sum(x: Tensor, factor: float, on: Tensor) -> Tensor:
    """out_t = sum_{l >= 0} factor^l x_{t+l}, as far as on [B, S] is True between them, by doubling
    how far each position has summed."""
    span = 1
    while span < x.shape[1]:
        x = x + torch.where(on, factor**span * F.pad(x[:, span:], (0, span)), 0.0)
        on = on & F.pad(on[:, span:], (0, span))
        span *= 2
    return x
