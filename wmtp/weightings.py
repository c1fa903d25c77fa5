"""What a loss can be weighted by: records, which say what the weights are or are made from.

B batch, S sequence, H heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from wmtp.labels import IGNORE_INDEX, has_target
from wmtp.reference import excess_head_weights


@dataclass(frozen=True)
class Uniform:
    """w[b, t, k] = 1 (Gloeckle et al. 2024, arXiv 2404.19737)."""

    def weights(self, ce_per_head: Tensor, target_ids: Tensor) -> Tensor:
        """[B, S, H]: 1 where there is a target; see `Excess.weights`."""
        return has_target(target_ids, ce_per_head.shape[2]).to(ce_per_head.dtype)


@dataclass(frozen=True, eq=False)
class Given:
    """w[b, t, k] as they are.

    Attributes:
        head_weights: [B, S, H] float, finite and >= 0.
    """

    head_weights: Tensor

    def weights(self, ce_per_head: Tensor, target_ids: Tensor) -> Tensor:
        """[B, S, H], 0 where there is no target; see `Excess.weights`."""
        valid = has_target(target_ids, ce_per_head.shape[2])
        return torch.where(valid, self.head_weights.detach().to(ce_per_head.dtype), 0.0)


@dataclass(frozen=True, eq=False)
class Excess:
    """w[b, t, :] = softmax over valid k of |ce[b, t, k] - ref_ce[b, t + k]| / temperature.

    After Rho-1 (Lin et al. 2024, arXiv 2404.07965, eq. 3), which uses the signed form to select
    tokens. The loss forms them in its one pass.

    Attributes:
        ref_ce: [B, S - 1] float, nats: position t of the reference about `target_ids[t + 1]`.
        temperature: > 0, nats.
        excess: "abs", or "signed" for ce - ref_ce.
    """

    ref_ce: Tensor
    temperature: float | Tensor = 0.7
    excess: str = "abs"

    def weights(self, ce_per_head: Tensor, target_ids: Tensor) -> Tensor:
        """What the loss has used.

        Args:
            ce_per_head: [B, S, H] float, nats, as the loss returns them.
            target_ids: [B, S] integer, unshifted; -100 is no target.

        Returns:
            [B, S, H] of ce_per_head's dtype, without gradient; 0 where there is no target.

            >>> excess = Excess(ref_ce=torch.zeros(1, 2), temperature=1.0)
            >>> ce = torch.tensor([[[2.0, 5.0], [3.0, 0.0], [0.0, 0.0]]])
            >>> excess.weights(ce, torch.tensor([[0, 1, 2]]))[0, 0]
            tensor([0.0474, 0.9526])
        """
        return excess_head_weights(
            ce_per_head, self.ref_ce, target_ids, self.temperature, self.excess, IGNORE_INDEX
        )


Weighting = Uniform | Given | Excess
