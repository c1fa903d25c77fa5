"""critic-wmtp: heads whose token raises a learned value count more."""

from torch import Tensor

from wmtp.data import Batch
from wmtp.models import MTPOutput, ValueHead
from wmtp.registry import trainer_registry
from wmtp.scorers import CriticInputs, CriticScorer
from wmtp.trainers.base import BaseWmtpTrainer
from wmtp.trainers.returns import gae_returns, same_document, token_mask, token_rewards
from wmtp.weightings import Given


@trainer_registry.register("critic-wmtp", category="trainer", version="2.0.0")
class CriticWmtpTrainer(BaseWmtpTrainer):
    """w[b, t, k] = softmax over k of (V[t+k+1] - discount V[t+k]) / temperature.

    V is a value head on the trunk's detached hidden states, trained beside the model by MSE
    towards GAE returns (see `returns.py`), and alone before it for `value_warmup_steps`.
    """

    def build_value_head(self) -> ValueHead:
        return ValueHead(self.config.dim)

    def compute_head_weights(self, batch: Batch, output: MTPOutput) -> Given:
        names = ("horizon", "discount", "temperature")
        settings = {name: getattr(self.config, name) for name in names}
        scorer = CriticScorer(settings, value_head=self.value_head)
        inputs: CriticInputs = {
            "hidden_states": output.hidden_states,
            "target_ids": batch["target_ids"],
        }
        if "document_ids" in batch:
            inputs["document_ids"] = batch["document_ids"]
        return Given(scorer.run(inputs)["weights"])

    def value_loss(self, batch: Batch, hidden_states: Tensor, ce_per_head: Tensor) -> Tensor:
        settings, targets = self.config, self.targets(batch)
        mask, predicts = token_mask(targets), targets.valid()[:, :, 0]
        values, reward = self.value_head(hidden_states), batch.get("reward")
        rewards = token_rewards(ce_per_head, mask, predicts, reward, self.processes.total)
        how = (settings.gamma, settings.gae_lambda, same_document(targets))
        returns = gae_returns(rewards, values, mask, *how)
        error = (values - returns).masked_fill(~mask, 0.0)
        return settings.value_coefficient * error.square().sum() / self.processes.share(mask.sum())
