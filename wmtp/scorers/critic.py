"""Weights from the rise of a learned value (algorithm critic-wmtp)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from wmtp.checks import check_temperature
from wmtp.labels import IGNORE_INDEX
from wmtp.registry import scorer_registry
from wmtp.scorers.config import with_config
from wmtp.weightings.critic import td_head_weights


class CriticInputs(TypedDict):
    """hidden_states [B, S, D] of the trunk, target_ids [B, T] unshifted, document_ids [B, T] of
    packed rows."""

    hidden_states: Tensor
    target_ids: Tensor
    document_ids: NotRequired[Tensor]


class CriticScores(TypedDict):
    """weights [B, S, H] (sum to 1 over a token's valid heads), values [B, S]."""

    weights: Tensor
    values: Tensor


@dataclass(frozen=True)
class CriticSettings:
    """horizon H; discount of the earlier value in the rise; temperature > 0, in units of the
    values; targets of the id ignore_index get no weight."""

    horizon: int = 4
    discount: float = 0.95
    temperature: float = 0.7
    ignore_index: int = IGNORE_INDEX


@scorer_registry.register("critic-wmtp", category="scorer", version="2.0.0")
class CriticScorer:
    """softmax over the heads of the value's rise / temperature; see `wmtp.td_head_weights`.

    Weights and values are constants: the value head learns from its own loss, not from this one.

    Args:
        config: settings of `CriticSettings` by name.
        value_head: hidden_states [B, S, D] -> values [B, S].

    Raises:
        ValueError: a setting that is unknown or out of its range.

        >>> config = {"horizon": 2, "discount": 1.0, "temperature": 1.0}
        >>> scorer = CriticScorer(config, value_head=lambda hidden: hidden[..., 0])
        >>> scores = scorer.run({
        ...     "hidden_states": torch.tensor([[[0.0], [1.0], [3.0]]]),
        ...     "target_ids": torch.tensor([[5, 6, 7]])})
        >>> scores["weights"][0, 0]                        # softmax(1, 2)
        tensor([0.2689, 0.7311])
    """

    def __init__(
        self, config: Mapping[str, Any] | None = None, *, value_head: Callable[[Tensor], Tensor]
    ) -> None:
        self.settings = with_config(CriticSettings(), config)
        check_temperature(self.settings.temperature)
        self.value_head = value_head

    @torch.no_grad()
    def run(self, inputs: CriticInputs) -> CriticScores:
        """Score one batch; raises as `wmtp.td_head_weights` does."""
        settings = self.settings
        values = self.value_head(inputs["hidden_states"])
        weights = td_head_weights(
            values,
            inputs["target_ids"],
            settings.horizon,
            settings.discount,
            settings.temperature,
            settings.ignore_index,
            document_ids=inputs.get("document_ids"),
        )
        return {"weights": weights, "values": values}
