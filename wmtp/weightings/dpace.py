"""More for heads whose predecessors are likely to be accepted (D-PACE).

    s[k]   = (1 - alpha) exp(-ce[k]) + alpha    of valid k >= first, else 1
    P[k]   = product of s[i] over i <= k        the chance that a draft gets so far, smoothed
    w[k]   = sum of P[j] over valid j >= k      of valid k >= first; 1 of other valid heads

of each token, a constant of the optimisation: what the drafts to come gain when head k does.
arXiv 2605.18810. B batch, S sequence, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wmtp import checks
from wmtp.kinds import check_whole
from wmtp.labels import Targets
from wmtp.weightings.base import Weighting, as_tensor

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True, eq=False)
class DPace(Weighting):
    """w[b, t, k] = sum over j >= k of the products of s[i], i <= j; divided by a count.

    Weights may be larger than 1: float16 logits are read twice, for the gradient's scale.

    Attributes:
        alpha: in (0, 1], a number or a 0-d tensor: how far a rejection is smoothed; 1 counts heads.
        first: the first head that is a draft's; those before it weigh 1.

    Raises, with the loss:
        ValueError: alpha outside (0, 1], first < 0.

    >>> ce = torch.tensor([[[0.6931, 0.6931]]])                  # p = 1/2, so that s = 3/4
    >>> DPace(alpha=0.5).weights(ce, torch.tensor([[[True, True]]]))
    tensor([[[1.3125, 0.5625]]])
    """

    alpha: Tensor | float = 0.5
    first: int = 0

    scope = "token"
    reduction = "pair_mean"
    numbers = ("alpha", "first")
    case = "dpace"

    def weights(self, ce: Tensor, valid: Tensor) -> Tensor:
        alpha, first = as_tensor(self.alpha).to(ce), as_tensor(self.first).to(ce.device)
        drafts = valid & (torch.arange(ce.shape[-1], device=ce.device) >= first)
        step = torch.where(drafts, (1 - alpha) * torch.exp(-ce.clamp(min=0)) + alpha, 1.0)
        reached = torch.where(drafts, step.cumprod(-1), 0.0)
        later = reached.flip(-1).cumsum(-1).flip(-1)
        return torch.where(drafts, later, valid.to(ce.dtype))

    @property
    def device(self) -> Callable[..., Any]:
        return _dpace

    def check(self, name: str, scores: Tensor, targets: Targets) -> None:
        checks.check_share("alpha", self.alpha)
        check_whole("first", self.first, 0, "it is the index of a head")


# Triton reads its source, and would read annotations as its own.
def _dpace(ce, valid, ref_ce, entropy, numbers_ptr):  # type: ignore[no-untyped-def]
    alpha, first = tl.load(numbers_ptr), tl.load(numbers_ptr + 1)
    head = tl.arange(0, ce.shape[0])
    drafts = valid & (head >= first)
    p = tl.exp(-tl.where(ce < 0.0, 0.0, ce))
    log_step = tl.where(drafts, tl.log((1.0 - alpha) * p + alpha), 0.0)
    before = head[None, :] <= head[:, None]  # [HEADS, HEADS], and so the next
    reached = tl.exp(tl.sum(tl.where(before, log_step[None, :], 0.0), axis=1))
    reached = tl.where(drafts, reached, 0.0)
    later = tl.sum(tl.where(head[None, :] >= head[:, None], reached[None, :], 0.0), axis=1)
    return tl.where(drafts, later, tl.where(valid, 1.0, 0.0))
