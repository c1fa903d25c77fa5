"""Algorithms that are no part of the library, as users write them."""

from dataclasses import dataclass

import torch

from wmtp.trainers import BaseWmtpTrainer


@dataclass(frozen=True)
class FocalSettings:
    focus: float = 2.0


class FocalTrainer(BaseWmtpTrainer):
    settings_type = FocalSettings

    def compute_head_weights(self, batch, output):
        p = self.ce_per_head(batch, output).neg().exp()
        return (1 - p) ** self.settings.focus


class HeadZeroTrainer(BaseWmtpTrainer):
    """All weight on head 0."""

    def compute_head_weights(self, batch, output):
        weights = torch.zeros(output.head_hidden_states.shape[:3])
        weights[:, :, 0] = 1
        return weights


class SomeTokensTrainer(BaseWmtpTrainer):
    """No weight on tokens of an even id."""

    def compute_head_weights(self, batch, output):
        odd = (batch["input_ids"] % 2).float()
        heads = torch.arange(1, self.config.horizon + 1)
        return odd[:, :, None] * heads


class WordsTrainer(BaseWmtpTrainer):
    """Returns what is no weighting."""

    def compute_head_weights(self, batch, output):
        return "uniform"


bad = ""  # what the next returns


class BadTrainer(BaseWmtpTrainer):
    """Returns what no loss takes, or learns nothing from."""

    def compute_head_weights(self, batch, output):
        ones = torch.ones(output.head_hidden_states.shape[:3])
        return {
            "nan": lambda: ones * float("nan"),
            "inf": lambda: ones * float("inf"),
            "negative": lambda: -ones,
            "shape": lambda: ones[:, 1:],
            "integers": ones.long,
            "complex": lambda: ones * 1j,
            "none": lambda: None,
            "numpy": ones.numpy,
            "meta": lambda: ones.to("meta"),
            "raise": lambda: 1 / 0,
            "zero": lambda: ones * 0,
            "big": lambda: ones * 3e38,
        }[bad]()


class Unfinished(BaseWmtpTrainer):
    """Has no weights."""
