"""mtp-baseline: every head counts the same."""

from wmtp.registry import trainer_registry
from wmtp.trainers.base import BaseWmtpTrainer


@trainer_registry.register("mtp-baseline", category="trainer", version="2.0.0")
class MtpBaselineTrainer(BaseWmtpTrainer):
    """w[b, t, k] = 1, the base's default: the loss of Gloeckle et al. 2024, arXiv 2404.19737."""
