"""From a model's hidden states to the training loss, in the way that `TrainConfig.loss` names.

    "linear"   the logits exist a chunk at a time: `wmtp.fused_linear_weighted_mtp_loss`
    "fused"    all logits, which their gradient overwrites: `wmtp.fused_weighted_mtp_loss`
    "eager"    all logits, and plain torch: the same with backend="eager"

The three differ in memory and speed; their numbers are equal to rounding.
"""

from typing import TypedDict, Unpack

from torch import Tensor, nn

from wmtp.linear import fused_linear_weighted_mtp_loss
from wmtp.loss import fused_weighted_mtp_loss
from wmtp.reference import MTPLoss


class LossArguments(TypedDict, total=False):
    """What an algorithm adds to the loss; see `wmtp.fused_weighted_mtp_loss`."""

    head_weights: Tensor
    ref_ce: Tensor
    temperature: float
    excess: str


def weighted_loss(
    way: str,
    head_hidden_states: Tensor,
    unembed: nn.Linear,
    target_ids: Tensor,
    normalizer: Tensor | None = None,
    **arguments: Unpack[LossArguments],
) -> MTPLoss:
    """The weighted loss of logits = unembed(head_hidden_states).

    Args:
        way: one of `wmtp.trainers.config.LOSSES`.
        head_hidden_states: [B, S, H, D].
        unembed: to V. Under autocast its product is of autocast's dtype, whichever the way.
        target_ids: [B, S], unshifted.
        normalizer: [], see `wmtp.fused_weighted_mtp_loss`.
        arguments: of the algorithm.

        >>> import torch
        >>> states, unembed = torch.randn(1, 4, 2, 3), nn.Linear(3, 5)
        >>> losses = [weighted_loss(way, states, unembed, torch.tensor([[0, 1, 2, 3]])).loss
        ...           for way in ("linear", "fused", "eager")]
        >>> torch.allclose(losses[0], losses[1]) and torch.allclose(losses[1], losses[2])
        True
    """
    if way == "linear":
        return fused_linear_weighted_mtp_loss(
            head_hidden_states,
            unembed.weight,
            target_ids,
            lm_head_bias=unembed.bias,
            normalizer=normalizer,
            **arguments,
        )
    logits = unembed(head_hidden_states)
    return fused_weighted_mtp_loss(
        logits,
        target_ids,
        normalizer=normalizer,
        inplace=logits.requires_grad,  # nothing reads the logits again
        backend=logits_backend(way),
        **arguments,
    )


def logits_backend(way: str) -> str:
    """The `backend` of losses that take logits."""
    return "eager" if way == "eager" else "auto"
