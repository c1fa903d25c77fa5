"""Less for what the model is already sure of (focal weights).

    w[b, t, k] = (1 - p[b, t, k])^gamma,    p = exp(-ce), a constant of the optimisation

The weight of Lin et al. 2017, arXiv 1708.02002, eq. 4, who differentiate it too. B batch,
S sequence, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wmtp import checks
from wmtp.labels import Targets
from wmtp.weightings.base import Weighting, as_tensor

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True, eq=False)
class Focal(Weighting):
    """w[b, t, k] = (1 - exp(-ce[b, t, k]))^gamma; its loss is divided by a count ("pair_mean").

    Attributes:
        gamma: >= 0, a number or a 0-d tensor; 0 is uniform.

    Raises, with the loss:
        ValueError: gamma < 0, or not finite.

    >>> Focal(2.0).weights(torch.tensor([[[0.6931, 20.0]]]), torch.tensor([[[True, True]]]))
    tensor([[[0.2500, 1.0000]]])
    """

    gamma: Tensor | float = 2.0

    reduction = "pair_mean"
    at_most_one = True
    numbers = ("gamma",)
    case = "focal"

    def weights(self, ce: Tensor, valid: Tensor) -> Tensor:
        unsure = -torch.expm1(-ce.clamp(min=0))
        return torch.where(valid, unsure ** as_tensor(self.gamma).to(ce), 0.0)

    @property
    def device(self) -> Callable[..., Any]:
        return _focal

    def check(self, name: str, scores: Tensor, targets: Targets) -> None:
        checks.check_at_least_0("gamma", self.gamma)


# Triton reads its source, and would read annotations as its own.
def _focal(ce, valid, ref_ce, entropy, numbers_ptr):  # type: ignore[no-untyped-def]
    gamma = tl.load(numbers_ptr)
    ce = tl.where(ce < 0.0, 0.0, ce)
    # 1 - exp(-ce), which near 0 would lose its digits: there by its Taylor polynomial.
    small = 1.0 - ce * (1 / 5) * (1.0 - ce * (1 / 6))
    small = 1.0 - ce * (1 / 2) * (1.0 - ce * (1 / 3) * (1.0 - ce * (1 / 4) * small))
    unsure = tl.where(ce < 0.3, ce * small, 1.0 - tl.exp(-ce))
    power = tl.exp2(gamma * tl.log2(unsure))
    power = tl.where(unsure == 0.0, tl.where(gamma == 0.0, 1.0, 0.0), power)
    return tl.where(valid, power, 0.0)
