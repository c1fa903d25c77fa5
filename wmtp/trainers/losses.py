"""From a model's hidden states to the training loss, in the way that `TrainConfig.loss` names.

    "linear"   the logits exist a chunk at a time: `wmtp.fused_linear_weighted_mtp_loss`
    "fused"    all logits, which their gradient overwrites: `wmtp.fused_weighted_mtp_loss`
    "eager"    all logits, and plain torch: the same with backend="eager"

The three differ in memory and speed; their numbers are equal to rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from wmtp.denominator import loss_denominator
from wmtp.labels import Targets
from wmtp.linear import fused_linear_weighted_mtp_loss
from wmtp.loss import fused_weighted_mtp_loss
from wmtp.reference import MTPLoss
from wmtp.weightings import Given, Uniform, Weighting

# Reductions, by what tells what they divide by.
OF_WEIGHTS, OF_LABELS = ("token_mean", "weight_mean"), ("pair_mean", "head_mean")


def training_loss(
    way: str,
    head_hidden_states: Tensor,
    unembed: nn.Linear,
    targets: Targets,
    weighting: Weighting = Uniform(),  # noqa: B008  (frozen)
    *,
    reduction: str = "token_mean",
    normalizer: Tensor | float | None = None,
    metrics: bool = False,
) -> MTPLoss:
    """The weighted loss of logits = unembed(head_hidden_states).

    Args:
        way: one of `wmtp.trainers.config.LOSSES`.
        head_hidden_states: [B, S, H, D].
        unembed: to V. Under autocast its product is of autocast's dtype, whichever the way.
        targets: unshifted ids, and their documents.
        weighting: of the algorithm.
        reduction, normalizer, metrics: see `wmtp.fused_weighted_mtp_loss`.

        >>> states, unembed = torch.randn(1, 4, 2, 3), nn.Linear(3, 5)
        >>> targets = Targets(torch.tensor([[0, 1, 2, 3]]), length=4, heads=2)
        >>> losses = [training_loss(way, states, unembed, targets).loss
        ...           for way in ("linear", "fused", "eager")]
        >>> torch.allclose(losses[0], losses[1]) and torch.allclose(losses[1], losses[2])
        True
    """
    how: dict[str, Any] = {
        "document_ids": targets.document_ids,
        "weighting": weighting,
        "reduction": reduction,
        "normalizer": normalizer,
        "metrics": metrics,
    }
    if way == "linear":
        return fused_linear_weighted_mtp_loss(
            head_hidden_states, unembed.weight, targets.ids, lm_head_bias=unembed.bias, **how
        )
    logits = unembed(head_hidden_states)
    return fused_weighted_mtp_loss(
        logits,
        targets.ids,
        inplace=logits.requires_grad,  # nothing reads the logits again
        backend=logits_backend(way),
        **how,
    )


def logits_backend(way: str) -> str:
    """The `backend` of losses that take logits."""
    return "eager" if way == "eager" else "auto"


def denominator(rule: Weighting, targets: Targets, reduction: str) -> Tensor:
    """[], or of each head [H]: what some rows add to what the step's loss is divided by."""
    return loss_denominator(
        targets.ids,
        targets.heads,
        length=targets.length,
        weighting=rule,
        document_ids=targets.document_ids,
        reduction=reduction,
    )


def denominator_of_weights(
    weighting: Weighting, weights: Tensor, targets: Targets, reduction: str
) -> Tensor:
    """[]: the same where it follows from the weights [B, S, H] that a rule has come to; else 1."""
    if reduction not in OF_WEIGHTS:
        return weights.new_ones((), dtype=torch.float64)
    # Exactly 1 a token, whatever rounding has made of the sum.
    rule = weighting if weighting.sums_to_one else Given(weights)
    return denominator(rule, targets, reduction)
