"""More for what the model already finds likely (dynamic fine-tuning).

    w[b, t, k] = p[b, t, k] = exp(-ce[b, t, k]), a constant of the optimisation

Wu et al. 2025, arXiv 2508.05629, eq. 9. B batch, S sequence, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wmtp.weightings.base import Weighting

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True, eq=False)
class DFT(Weighting):
    """w[b, t, k] = exp(-ce[b, t, k]); its loss is divided by a count of pairs ("pair_mean").

    >>> DFT().weights(torch.tensor([[[0.0, 0.6931]]]), torch.tensor([[[True, True]]]))
    tensor([[[1.0000, 0.5000]]])
    """

    reduction = "pair_mean"
    at_most_one = True
    case = "dft"

    def weights(self, ce: Tensor, valid: Tensor) -> Tensor:
        return torch.where(valid, torch.exp(-_not_negative(ce)), 0.0)

    @property
    def device(self) -> Callable[..., Any]:
        return _probability


def _not_negative(ce: Tensor) -> Tensor:
    """Without what rounding leaves of a cross entropy of 0, so that p <= 1."""
    return ce.clamp(min=0)


# Triton reads its source, and would read annotations as its own.
def _probability(ce, valid, ref_ce, entropy, numbers_ptr):  # type: ignore[no-untyped-def]
    return tl.where(valid, tl.exp(-tl.where(ce < 0.0, 0.0, ce)), 0.0)
