"""Weights that the caller has: `head_weights`. B batch, S sequence, H heads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wmtp.kinds import check_float_tensor
from wmtp.labels import Targets
from wmtp.weightings.base import Weighting


@dataclass(frozen=True, eq=False)
class Given(Weighting):
    """w[b, t, k] = head_weights[b, t, k]; the one rule through which a gradient flows.

    Attributes:
        head_weights: [B, S, H] float, or [H] for all tokens, finite; >= 0 but where the loss
            divides by no sum of them.

    >>> Given(torch.tensor([[[0.5, 2.0]]])).weights(
    ...     torch.zeros(1, 1, 2), torch.tensor([[[True, False]]]))
    tensor([[[0.5000, 0.0000]]])
    """

    head_weights: Tensor

    known = True
    case = "given"

    def weights(self, ce: Tensor, valid: Tensor) -> Tensor:
        return torch.where(valid, self.head_weights.to(ce.dtype), 0.0)

    def check(self, name: str, scores: Tensor, targets: Targets) -> None:
        axes, shape = "[B, S, H]", tuple(scores.shape[:3])
        if isinstance(self.head_weights, Tensor) and self.head_weights.dim() == 1:
            axes, shape = "[H]", shape[2:]
        remedy = "one weight per token and head"
        check_float_tensor("head_weights", self.head_weights, axes, shape, remedy)
