"""rho1-wmtp: heads that are far from a reference model's loss count more."""

import torch
from torch import Tensor

from wmtp.data import Batch
from wmtp.models import MTPOutput
from wmtp.registry import trainer_registry
from wmtp.trainers.base import BaseWmtpTrainer
from wmtp.trainers.reference_model import reference_ce
from wmtp.weightings import Excess
from wmtp.weightings.excess import align_ref_ce


@trainer_registry.register("rho1-wmtp", category="trainer", version="2.0.0")
class Rho1WmtpTrainer(BaseWmtpTrainer):
    """w[b, t, k] = softmax over k of |ce[b, t, k] - ref_ce[b, t + k]| / temperature.

    The weights are formed inside the loss. Needs `reference`, see `reference_model.py`.
    """

    needs_reference = True

    def compute_head_weights(self, batch: Batch, output: MTPOutput) -> Excess:
        # It reads as far as the labels go: of what no reference reads there is no excess.
        length = batch["input_ids"].shape[1]
        ahead = batch["target_ids"][:, length:-1].clamp(min=0)
        read = torch.cat((batch["input_ids"], ahead), 1)
        ref_ce = self.compute_reference_ce(read, batch["target_ids"], batch.get("document_ids"))
        return Excess(ref_ce, self.config.temperature, self.config.excess)

    def compute_reference_ce(
        self, input_ids: Tensor, target_ids: Tensor, document_ids: Tensor | None = None
    ) -> Tensor:
        """The reference's cross entropy [B, T-1], nats: position t about target_ids[t + 1]."""
        with self.autocast():
            return reference_ce(
                self.reference, input_ids, target_ids, self.config.loss, document_ids
            )

    @staticmethod
    def align_ref_ce_to_mtp(ref_ce_all: Tensor, mtp_ce_heads: Tensor) -> Tensor:
        """[B, S, H], beside mtp_ce_heads: ref_ce_all [B, T-1] about the tokens of each head."""
        return align_ref_ce(ref_ce_all, *mtp_ce_heads.shape[1:])
