"""mtp-baseline: every head counts the same."""

from wmtp.data import Batch
from wmtp.models import MTPOutput
from wmtp.registry import trainer_registry
from wmtp.trainers.base import BaseWmtpTrainer
from wmtp.weightings import Uniform


@trainer_registry.register("mtp-baseline", category="trainer", version="2.0.0")
class MtpBaselineTrainer(BaseWmtpTrainer):
    """w[b, t, k] = 1: the loss of Gloeckle et al. 2024, arXiv 2404.19737."""

    def compute_head_weights(self, batch: Batch, output: MTPOutput) -> Uniform:
        return Uniform()
