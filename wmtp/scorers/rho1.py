"""Weights from the distance to a reference model's loss (algorithm rho1-wmtp)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from wmtp.checks import EXCESSES, check_ref_ce, check_temperature
from wmtp.kinds import check_choice, check_same_device, check_scores
from wmtp.label_checks import targets_of
from wmtp.labels import IGNORE_INDEX, Targets
from wmtp.registry import scorer_registry
from wmtp.scorers.config import with_config
from wmtp.weightings.base import as_tensor, softmax_over_heads
from wmtp.weightings.excess import align_ref_ce, difference


class Rho1Inputs(TypedDict):
    """What is compared, in nats.

    base_ce [B, S, H]; ref_ce [B, S, H] about the same tokens, or [B, T-1], position t about token
    t + 1; target_ids [B, T] unshifted, where some tokens are no targets or T > S; document_ids
    [B, T] of packed rows.
    """

    base_ce: Tensor
    ref_ce: Tensor
    target_ids: NotRequired[Tensor]
    document_ids: NotRequired[Tensor]


class Rho1Scores(TypedDict):
    """weights [B, S, H] (sum to 1 over a token's valid heads), excess [B, S, H] in nats."""

    weights: Tensor
    excess: Tensor


@dataclass(frozen=True)
class Rho1Settings:
    """temperature > 0, nats; excess "abs" for |ce - ref|, "signed" for ce - ref; ignore_index."""

    temperature: float = 0.7
    excess: str = "abs"
    ignore_index: int = IGNORE_INDEX


@scorer_registry.register("rho1-wmtp", category="scorer", version="2.0.0")
class Rho1ExcessScorer:
    """w[b, t, :] = softmax over the valid heads of excess[b, t, :] / temperature.

    Which heads are valid: those whose target is no `ignore_index`; without `target_ids` those whose
    token is in the sequence, or, where ref_ce is [B, S, H] and so aligned already, all.

    Args:
        config: settings of `Rho1Settings` by name.

    Raises:
        ValueError: a setting that is unknown or out of its range.

        >>> scorer = Rho1ExcessScorer(config={"temperature": 1.0})
        >>> scores = scorer.run({
        ...     "base_ce": torch.tensor([[[2.0, 5.0], [3.0, 0.0]]]),
        ...     "ref_ce": torch.ones(1, 2, 2)})
        >>> scores["excess"][0].tolist()
        [[1.0, 4.0], [2.0, 1.0]]
        >>> scores["weights"][0, 0]                        # softmax(1, 4)
        tensor([0.0474, 0.9526])
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.settings = with_config(Rho1Settings(), config)
        check_temperature(self.settings.temperature)
        check_choice("excess", self.settings.excess, EXCESSES)

    def compute_excess_loss(self, base_ce: Tensor, ref_ce: Tensor) -> Tensor:
        """How far head k at t, about token t + k + 1, is from the reference about that token.

        Args:
            base_ce: [B, S, H], nats.
            ref_ce: [B, S, H], or [B, T-1] and aligned here, nats.

        Returns:
            [B, S, H], nats, without gradient; beyond the sequence against a reference of 0.

        Raises:
            ValueError: of other shapes. TypeError: not floating point.
        """
        batch, length, heads = check_scores("base_ce", base_ce, "[B, S, H]")
        if ref_ce.shape == base_ce.shape:
            check_scores("ref_ce", ref_ce, "[B, S, H]")
        else:
            tokens = max(length, ref_ce.shape[1] + 1) if ref_ce.dim() == 2 else length
            every = torch.zeros((), dtype=torch.long, device=base_ce.device).expand(batch, tokens)
            check_ref_ce(ref_ce, Targets(every, length, heads))
            ref_ce = align_ref_ce(ref_ce, length, heads)
        check_same_device("base_ce", base_ce, ref_ce=ref_ce)
        aligned = ref_ce.detach().to(base_ce.dtype)
        return difference(base_ce.detach(), aligned, self.settings.excess)

    def run(self, inputs: Rho1Inputs) -> Rho1Scores:
        """Score one batch; raises as `compute_excess_loss` does."""
        excess = self.compute_excess_loss(inputs["base_ce"], inputs["ref_ce"])
        valid = self._valid(inputs)
        weights = softmax_over_heads(excess, valid, as_tensor(self.settings.temperature))
        return {"weights": weights, "excess": torch.where(valid, excess, 0.0)}

    def _valid(self, inputs: Rho1Inputs) -> Tensor:
        base_ce, ref_ce, target_ids = inputs["base_ce"], inputs["ref_ce"], inputs.get("target_ids")
        if target_ids is None and ref_ce.shape == base_ce.shape:
            return torch.ones_like(base_ce, dtype=torch.bool)
        if target_ids is None:
            shape = (len(base_ce), ref_ce.shape[1] + 1)
            target_ids = torch.zeros(shape, dtype=torch.long, device=base_ce.device)
        return targets_of(
            "base_ce",
            base_ce,
            base_ce.shape[2],
            target_ids,
            ignore_index=self.settings.ignore_index,
            document_ids=inputs.get("document_ids"),
        ).valid()
