"""rho1-wmtp: heads that are far from a reference model's loss count more."""

from torch import Tensor

from wmtp.data import Batch
from wmtp.models import MTPOutput
from wmtp.registry import trainer_registry
from wmtp.scorers import Rho1ExcessScorer
from wmtp.trainers.base import BaseWmtpTrainer
from wmtp.trainers.losses import LossArguments
from wmtp.trainers.reference_model import reference_ce


@trainer_registry.register("rho1-wmtp", category="trainer", version="2.0.0")
class Rho1WmtpTrainer(BaseWmtpTrainer):
    """w[b, t, k] = softmax over k of |ce[b, t, k] - ref_ce[b, t + k]| / temperature.

    The weights are formed inside the loss; the scorer forms them again from the [B, S, H] cross
    entropies for the record. Needs `reference`, see `reference_model.py`.
    """

    needs_reference = True

    def loss_arguments(self, batch: Batch, output: MTPOutput) -> LossArguments:
        settings = self.config
        with self.autocast():
            ref_ce = reference_ce(
                self.reference, batch["input_ids"], batch["target_ids"], settings.loss
            )
        return {
            "ref_ce": ref_ce,
            "temperature": settings.temperature,
            "excess": settings.excess,
        }

    def compute_head_weights(
        self, batch: Batch, ce_per_head: Tensor, arguments: LossArguments
    ) -> Tensor:
        scorer = Rho1ExcessScorer(arguments["temperature"], arguments["excess"])
        return scorer.run(
            {
                "base_ce": ce_per_head,
                "ref_ce": arguments["ref_ce"],
                "target_ids": batch["target_ids"],
            }
        )["weights"]
