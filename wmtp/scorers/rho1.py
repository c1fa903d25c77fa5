"""Weights from the distance to a reference model's loss (algorithm rho1-wmtp)."""

from typing import TypedDict

import torch
from torch import Tensor

from wmtp.labels import has_target
from wmtp.reference import excess_head_weights, excess_loss
from wmtp.registry import scorer_registry


class Rho1Inputs(TypedDict):
    """base_ce [B, S, H], ref_ce [B, S-1] (both nats), target_ids [B, S] unshifted."""

    base_ce: Tensor
    ref_ce: Tensor
    target_ids: Tensor


class Rho1Scores(TypedDict):
    """weights [B, S, H] (sum to 1 over a token's valid heads), excess [B, S, H] in nats."""

    weights: Tensor
    excess: Tensor


@scorer_registry.register("rho1-excess", category="scorer", version="2.0.0")
class Rho1ExcessScorer:
    """softmax over the heads of excess / temperature; see `wmtp.excess_head_weights`.

    Args:
        temperature: > 0, in nats.
        excess: "abs" for |ce - ref|, "signed" for ce - ref.
        ignore_index: targets of this id get no weight.

        >>> scorer = Rho1ExcessScorer(temperature=1.0)
        >>> scores = scorer.run({
        ...     "base_ce": torch.tensor([[[2.0, 5.0], [3.0, 0.0], [0.0, 0.0]]]),
        ...     "ref_ce": torch.tensor([[1.0, 1.0]]),
        ...     "target_ids": torch.tensor([[0, 1, 2]])})
        >>> scores["excess"][0].tolist()
        [[1.0, 4.0], [2.0, 0.0], [0.0, 0.0]]
        >>> scores["weights"][0, 0]                        # softmax(1, 4)
        tensor([0.0474, 0.9526])
    """

    def __init__(
        self, temperature: float = 0.7, excess: str = "abs", ignore_index: int = -100
    ) -> None:
        self.temperature = temperature
        self.excess = excess
        self.ignore_index = ignore_index

    def compute_excess_loss(self, base_ce: Tensor, ref_ce: Tensor, target_ids: Tensor) -> Tensor:
        """How far head k at t, about token t + k + 1, is from the reference about that token.

        Args:
            base_ce: [B, S, H], nats.
            ref_ce: [B, S-1], nats: position t is about token t + 1.
            target_ids: [B, S], unshifted.

        Returns:
            [B, S, H], nats, without gradient; 0 where there is no target.
        """
        valid = has_target(target_ids, base_ce.shape[2], self.ignore_index)
        return torch.where(valid, excess_loss(base_ce, ref_ce, self.excess), 0.0)

    def run(self, inputs: Rho1Inputs) -> Rho1Scores:
        """Score one batch; raises as `wmtp.excess_head_weights` does."""
        base_ce, ref_ce, target_ids = inputs["base_ce"], inputs["ref_ce"], inputs["target_ids"]
        weights = excess_head_weights(
            base_ce, ref_ce, target_ids, self.temperature, self.excess, self.ignore_index
        )
        excess = self.compute_excess_loss(base_ce, ref_ce, target_ids)
        return {"weights": weights, "excess": excess}
