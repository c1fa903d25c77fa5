"""A weighting rule of one's own: w = p (1 - p), most where the model is torn between two answers.

python examples/own_rule.py
"""

from dataclasses import dataclass

import torch

from wmtp import fused_weighted_mtp_loss
from wmtp.weightings import Weighting


@dataclass(frozen=True)
class Torn(Weighting):
    """w = p (1 - p). The formula is enough: such a loss reads its logits twice."""

    reduction = "pair_mean"
    at_most_one = True

    def weights(self, ce, valid):  # [B, S, H] each
        p = torch.exp(-ce)
        return torch.where(valid, p * (1 - p), 0.0)


@dataclass(frozen=True)
class FusedTorn(Torn):
    """The same with a Triton function: on a GPU it is part of the loss's one pass."""

    @staticmethod
    def device(ce, valid, ref_ce, entropy, numbers_ptr):  # no annotations: Triton reads its source
        p = tl.exp(-ce)  # noqa: F821  (`tl` is bound when the function is first needed)
        return tl.where(valid, p * (1 - p), 0.0)  # noqa: F821


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(2, 16, 4, 1000, device=device, requires_grad=True)
    target_ids = torch.randint(1000, (2, 16), device=device)
    for rule in (Torn(), FusedTorn()):
        result = fused_weighted_mtp_loss(logits, target_ids, weighting=rule, metrics=True)
        (gradient,) = torch.autograd.grad(result.loss, logits)
        name, weight = type(rule).__name__, result.metrics.weights.max()
        print(f"{name}: loss {result.loss:.6f}, gradient {gradient.norm():.6f}, w <= {weight:.4f}")


if __name__ == "__main__":
    main()
