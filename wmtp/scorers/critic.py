"""Weights from the rise of a learned value (algorithm critic-wmtp)."""

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from wmtp.reference import td_head_weights
from wmtp.registry import scorer_registry


class CriticInputs(TypedDict):
    """hidden_states [B, S, D] of the trunk, target_ids [B, S] unshifted."""

    hidden_states: Tensor
    target_ids: Tensor


class CriticScores(TypedDict):
    """weights [B, S, H] (sum to 1 over a token's valid heads), values [B, S]."""

    weights: Tensor
    values: Tensor


@scorer_registry.register("critic-td", category="scorer", version="2.0.0")
class CriticScorer:
    """softmax over the heads of the value's rise / temperature; see `wmtp.td_head_weights`.

    Weights and values are constants: the value head learns from its own loss, not from this one.

    Args:
        value_head: hidden_states [B, S, D] -> values [B, S].
        horizon: H.
        discount: of the earlier value in the rise.
        temperature: > 0, in units of the values.
        ignore_index: targets of this id get no weight.

        >>> scorer = CriticScorer(lambda hidden: hidden[..., 0], 2, discount=1.0, temperature=1.0)
        >>> scores = scorer.run({
        ...     "hidden_states": torch.tensor([[[0.0], [1.0], [3.0]]]),
        ...     "target_ids": torch.tensor([[5, 6, 7]])})
        >>> scores["weights"][0, 0]                        # softmax(1, 2)
        tensor([0.2689, 0.7311])
    """

    def __init__(
        self,
        value_head: Callable[[Tensor], Tensor],
        horizon: int,
        discount: float = 0.95,
        temperature: float = 0.7,
        ignore_index: int = -100,
    ) -> None:
        self.value_head = value_head
        self.horizon = horizon
        self.discount = discount
        self.temperature = temperature
        self.ignore_index = ignore_index

    @torch.no_grad()
    def run(self, inputs: CriticInputs) -> CriticScores:
        """Score one batch; raises as `wmtp.td_head_weights` does."""
        values = self.value_head(inputs["hidden_states"])
        weights = td_head_weights(
            values,
            inputs["target_ids"],
            self.horizon,
            self.discount,
            self.temperature,
            self.ignore_index,
        )
        return {"weights": weights, "values": values}
