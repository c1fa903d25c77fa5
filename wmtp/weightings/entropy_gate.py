"""Less for pairs whose prediction is certain, right or wrong (entropy gates).

    w[b, t, k] = min(entropy[b, t, k] / ln 20, 1)^alpha, a constant of the optimisation

After EAFT (arXiv 2601.02151), which takes the entropy of the 20 largest probabilities,
renormalised; here it is that of the whole distribution, which the one read of the logits finds.
B batch, S sequence, H heads.
"""

import math
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
class EntropyGate(Weighting):
    """w[b, t, k] = min(entropy[b, t, k] / ln 20, 1)^alpha; divided by a count ("pair_mean").

    Attributes:
        alpha: >= 0, a number or a 0-d tensor; 0 is uniform.

    Raises, with the loss:
        ValueError: alpha < 0, or not finite.

    >>> import math
    >>> valid, entropy = torch.tensor([[[True, True]]]), torch.tensor([[[math.log(20) / 2, 9.0]]])
    >>> EntropyGate().weights(torch.zeros(1, 1, 2), valid, entropy=entropy)
    tensor([[[0.5000, 1.0000]]])
    """

    alpha: Tensor | float = 1.0

    reduction = "pair_mean"
    at_most_one = True
    needs = ("entropy",)
    numbers = ("alpha",)
    case = "entropy_gate"

    def weights(self, ce: Tensor, valid: Tensor, entropy: Tensor) -> Tensor:  # type: ignore[override]
        """Also: entropy [B, S, H], nats."""
        gate = (entropy.clamp(min=0) / math.log(20)).clamp(max=1)
        return torch.where(valid, gate ** as_tensor(self.alpha).to(ce), 0.0)

    @property
    def device(self) -> Callable[..., Any]:
        return _gate

    def check(self, name: str, scores: Tensor, targets: Targets) -> None:
        checks.check_at_least_0("alpha", self.alpha)


# Triton reads its source, and would read annotations as its own.
def _gate(ce, valid, ref_ce, entropy, numbers_ptr):  # type: ignore[no-untyped-def]
    alpha = tl.load(numbers_ptr)
    gate = entropy * (1 / 2.995732273553991)  # ln 20
    gate = tl.where(gate > 1.0, 1.0, tl.where(gate < 0.0, 0.0, gate))
    power = tl.exp2(alpha * tl.log2(gate))
    power = tl.where(gate == 0.0, tl.where(alpha == 0.0, 1.0, 0.0), power)
    return tl.where(valid, power, 0.0)
