"""Less for later heads, whatever they predict: a prior over heads.

    w[k] = beta^k / sum_j beta^j

The step weights of FastMTP (arXiv 2509.18362, eq. 4). H heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from wmtp import checks
from wmtp.labels import Targets
from wmtp.weightings.base import Weighting


@dataclass(frozen=True, eq=False)
class Decay(Weighting):
    """w[b, t, k] = beta^k / sum_j beta^j: `head_prior`, by a number; alone, or in a product.

    Attributes:
        beta: > 0; 1 is uniform.

    Raises, with the loss:
        ValueError: beta <= 0, or not finite; a `head_prior` beside it.

    >>> Decay(0.5).prior(3)
    tensor([0.5714, 0.2857, 0.1429])
    """

    beta: float = 0.8

    known = at_most_one = True

    def prior(self, heads: int, device: torch.device | str = "cpu") -> Tensor:
        """[H] float32."""
        powers = float(self.beta) ** torch.arange(heads, dtype=torch.float64, device=device)
        return (powers / powers.sum()).float()

    def weights(self, ce: Tensor, valid: Tensor) -> Tensor:
        return torch.where(valid, self.prior(ce.shape[-1], ce.device).to(ce.dtype), 0.0)

    def check(self, name: str, scores: Tensor, targets: Targets) -> None:
        checks.check_above_0("beta", self.beta)
