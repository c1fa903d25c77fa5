"""The contestants: every way to compute the weighted loss that is timed or profiled.

Each maps (logits [B, S, H, V], target_ids [B, S], head_weights [B, S, H]) to the scalar loss.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wmtp import fused_weighted_mtp_loss
from wmtp.labels import IGNORE_INDEX, has_target, shift_to_heads


def eager(logits: Tensor, target_ids: Tensor, head_weights: Tensor) -> Tensor:
    """What one writes in a trainer: torch's own cross entropy in the logits' dtype."""
    targets = shift_to_heads(target_ids, logits.shape[2], IGNORE_INDEX)
    ce = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
    weights = head_weights * has_target(target_ids, logits.shape[2])
    weight_sum = weights.sum(-1)
    token_loss = (weights * ce.view(targets.shape)).sum(-1) / weight_sum.clamp(min=1e-8)
    return token_loss.sum() / (weight_sum > 1e-8).sum()


def eager_float(logits: Tensor, target_ids: Tensor, head_weights: Tensor) -> Tensor:
    """The same after `.float()`, as Hugging Face's losses do."""
    return eager(logits.float(), target_ids, head_weights)


def fused(logits: Tensor, target_ids: Tensor, head_weights: Tensor) -> Tensor:
    return fused_weighted_mtp_loss(logits, target_ids, head_weights).loss


def fused_inplace(logits: Tensor, target_ids: Tensor, head_weights: Tensor) -> Tensor:
    return fused_weighted_mtp_loss(logits, target_ids, head_weights, inplace=True).loss


PROVIDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "eager": eager,
    "eager_float": eager_float,
    "fused": fused,
    "fused_inplace": fused_inplace,
}


def make_arguments(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Random logits (a leaf that requires grad), target_ids and head_weights."""
    batch, length, heads, vocabulary = shape
    logits = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    target_ids = torch.randint(vocabulary, (batch, length), device=device)
    return logits, target_ids, torch.rand(batch, length, heads, device=device) + 0.1
