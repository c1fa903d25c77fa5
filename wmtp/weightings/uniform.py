"""Every pair counts the same (algorithm mtp-baseline).

    w[b, t, k] = 1

Gloeckle et al. 2024, arXiv 2404.19737. B batch, S sequence, H heads.
"""

from dataclasses import dataclass

from torch import Tensor

from wmtp.weightings.base import Weighting


@dataclass(frozen=True)
class Uniform(Weighting):
    """w[b, t, k] = 1.

    >>> import torch
    >>> Uniform().weights(torch.zeros(1, 1, 2), torch.tensor([[[True, False]]]))
    tensor([[[1., 0.]]])
    """

    at_most_one = known = True
    case = "uniform"

    def weights(self, ce: Tensor, valid: Tensor) -> Tensor:
        return valid.to(ce.dtype)
