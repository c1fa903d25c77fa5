"""Rules of somebody else's: a plain formula, and one with a Triton twin."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wmtp.weightings import Weighting

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True, eq=False)
class Likely(Weighting):
    """w = p: what the model already finds likely counts more (DFT, arXiv 2508.05629)."""

    at_most_one = True

    def weights(self, ce: Tensor, valid: Tensor) -> Tensor:
        return torch.where(valid, torch.exp(-ce), 0.0)

    @staticmethod
    def device(ce, valid, ref_ce, entropy, numbers_ptr):
        return tl.where(valid, tl.exp(-ce), 0.0)


@dataclass(frozen=True, eq=False)
class Sharp(Weighting):
    """w = softmax over valid heads of power x ce: of a whole token, with a number, and no twin."""

    power: Tensor | float = 1.0
    scope = "token"
    sums_to_one = at_most_one = True
    numbers = ("power",)

    def weights(self, ce: Tensor, valid: Tensor) -> Tensor:
        score = (self.power * ce).masked_fill(~valid, float("-inf"))
        return torch.where(valid, score.softmax(-1), 0.0)


@dataclass(frozen=True, eq=False)
class Large(Weighting):
    """w = ce^2, of any size."""

    def weights(self, ce: Tensor, valid: Tensor) -> Tensor:
        return torch.where(valid, ce.square(), 0.0)


RULES = {
    "likely": Likely(),
    "sharp": Sharp(0.5),
    "sharper": Sharp(torch.tensor(2.0)),
    "large": Large(),
}
