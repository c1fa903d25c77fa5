"""From a model's hidden states to the training loss, in the way that `TrainConfig.loss` names.

    "linear"   the logits exist a chunk at a time: `wmtp.fused_linear_weighted_mtp_loss`
    "fused"    all logits, which their gradient overwrites: `wmtp.fused_weighted_mtp_loss`
    "eager"    all logits, and plain torch: the same with backend="eager"

The three differ in memory and speed; their numbers are equal to rounding.
"""

from typing import Any

from torch import Tensor, nn

from wmtp.linear import fused_linear_weighted_mtp_loss
from wmtp.loss import fused_weighted_mtp_loss
from wmtp.reduction import counted_tokens
from wmtp.reference import MTPLoss
from wmtp.weightings import Uniform, Weighting


def training_loss(
    way: str,
    head_hidden_states: Tensor,
    unembed: nn.Linear,
    target_ids: Tensor,
    weighting: Weighting = Uniform(),  # noqa: B008  (frozen)
    *,
    reduction: str = "token_mean",
    normalizer: Tensor | float | None = None,
) -> MTPLoss:
    """The weighted loss of logits = unembed(head_hidden_states).

    Args:
        way: one of `wmtp.trainers.config.LOSSES`.
        head_hidden_states: [B, S, H, D].
        unembed: to V. Under autocast its product is of autocast's dtype, whichever the way.
        target_ids: [B, S], unshifted.
        weighting: of the algorithm.
        reduction, normalizer: see `wmtp.fused_weighted_mtp_loss`.

        >>> import torch
        >>> states, unembed = torch.randn(1, 4, 2, 3), nn.Linear(3, 5)
        >>> losses = [training_loss(way, states, unembed, torch.tensor([[0, 1, 2, 3]])).loss
        ...           for way in ("linear", "fused", "eager")]
        >>> torch.allclose(losses[0], losses[1]) and torch.allclose(losses[1], losses[2])
        True
    """
    how: dict[str, Any] = {
        "weighting": weighting,
        "reduction": reduction,
        "normalizer": normalizer,
    }
    if way == "linear":
        return fused_linear_weighted_mtp_loss(
            head_hidden_states, unembed.weight, target_ids, lm_head_bias=unembed.bias, **how
        )
    logits = unembed(head_hidden_states)
    return fused_weighted_mtp_loss(
        logits,
        target_ids,
        inplace=logits.requires_grad,  # nothing reads the logits again
        backend=logits_backend(way),
        **how,
    )


def logits_backend(way: str) -> str:
    """The `backend` of losses that take logits."""
    return "eager" if way == "eager" else "auto"


def denominator(weighting: Weighting, weights: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """[]: what this part of a batch adds to the number that the whole batch's loss is divided by.

    token_mean: its tokens with any weight. weight_mean: the sum of its weights.

    Args:
        weights: [B, S, H], the rule's.
        valid: [B, S, H] bool, where there is a target.

        >>> import torch
        >>> import torch
        >>> from wmtp.weightings import Given
        >>> weights, valid = torch.tensor([[[0.5], [0.0]]]), torch.ones(1, 2, 1) > 0
        >>> denominator(Given(weights), weights, valid, "token_mean").item()
        1.0
        >>> denominator(Given(weights), weights, valid, "weight_mean").item()
        0.5
    """
    # Exactly 1, whatever rounding has made of the sum.
    of_token = valid.any(-1).double() if weighting.sums_to_one else weights.double().sum(-1)
    if reduction == "token_mean":
        of_token = counted_tokens(of_token).double()
    return of_token.sum()
