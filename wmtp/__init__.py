"""Weighted multi-token-prediction losses, fused: Triton on GPUs, C++ on CPUs.

from wmtp import fused_weighted_mtp_loss
loss, valid_mask, ce_per_head = fused_weighted_mtp_loss(logits, target_ids)
"""

from wmtp import weightings
from wmtp.backends.gradient_memory import release_memory
from wmtp.cross_entropy import mtp_cross_entropy, next_token_cross_entropy
from wmtp.denominator import loss_denominator
from wmtp.documents import documents_from_cu_seqlens, documents_from_position_ids
from wmtp.linear import fused_linear_weighted_mtp_loss, linear_next_token_cross_entropy
from wmtp.loss import fused_weighted_mtp_loss
from wmtp.metrics import MTPLoss, Summary, summarize
from wmtp.weightings.critic import td_head_weights
from wmtp.weightings.excess import excess_head_weights

__version__ = "0.1.0"
__all__ = [
    "MTPLoss",
    "Summary",
    "documents_from_cu_seqlens",
    "documents_from_position_ids",
    "excess_head_weights",
    "fused_linear_weighted_mtp_loss",
    "fused_weighted_mtp_loss",
    "linear_next_token_cross_entropy",
    "loss_denominator",
    "mtp_cross_entropy",
    "next_token_cross_entropy",
    "release_memory",
    "summarize",
    "td_head_weights",
    "weightings",
]
