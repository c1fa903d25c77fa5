"""Everything about a training run that decides its numbers, in one frozen record."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from wmtp.models import MTPConfig

PRECISIONS = ("fp32", "bf16")
LOSSES = ("linear", "fused", "eager")


class ConfigError(ValueError):
    """A setting cannot be; says what is wanted."""


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run.

    Attributes:
        algo: a name in `trainer_registry`.
        steps: of the model; the critic's value head has value_warmup_steps before them.
        batch_size: B, rows a step over all processes together.
        seq_len: S. horizon: H.
        dim, trunk_layers, attention_heads: of the `MTPTransformer`.
        seed: of weights and batches.
        lr: the model's peak learning rate: reached after a twentieth of the steps, then a cosine
            down to a tenth. weight_decay: of matrices, not of norms.
        max_grad_norm: the gradient is scaled down to this norm.
        precision: "fp32", or "bf16" for autocast around the models.
        loss: how it is computed, "linear", "fused" or "eager"; see `wmtp.trainers.losses`.
        temperature, excess: of the head weights. discount: of the critic's rise in value.
        value_warmup_steps, value_lr, value_coefficient, gamma, gae_lambda: of the value head.
        eval_batches: validation batches, at start and end.
        save_every: steps between checkpoints. keep_last: how many stay.
        reference: what rho1-wmtp compares with, a folder; None: a model trained first.

        >>> TrainConfig(algo="mtp-baseline", steps=0)
        Traceback (most recent call last):
            ...
        wmtp.trainers.config.ConfigError: steps must be at least 1, got 0
    """

    algo: str
    steps: int = 2000
    batch_size: int = 16
    seq_len: int = 512
    horizon: int = 4
    dim: int = 512
    trunk_layers: int = 6
    attention_heads: int = 8
    seed: int = 0
    lr: float = 6e-4
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    loss: str = "linear"
    temperature: float = 0.7
    excess: str = "abs"
    discount: float = 0.95
    value_warmup_steps: int = 100
    value_lr: float = 1e-3
    value_coefficient: float = 0.1
    gamma: float = 0.99
    gae_lambda: float = 0.95
    eval_batches: int = 16
    save_every: int = 200
    keep_last: int = 2
    reference: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "horizon", "eval_batches", "save_every", "keep_last"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("seq_len", self.seq_len >= 2, "at least 2: a token and its successor")
        self._require("horizon", self.horizon < self.seq_len, f"below seq_len {self.seq_len}")
        self._require("seed", self.seed >= 0, "at least 0")
        self._require("value_warmup_steps", self.value_warmup_steps >= 0, "at least 0")
        for name in ("lr", "value_lr", "max_grad_norm", "temperature"):
            self._require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        self._require("precision", self.precision in PRECISIONS, f"one of {PRECISIONS}")
        self._require("loss", self.loss in LOSSES, f"one of {LOSSES}")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)}")

    def model_config(self, vocab_size: int) -> MTPConfig:
        """The shape of the model for a vocabulary."""
        return MTPConfig(
            vocab_size=vocab_size,
            horizon=self.horizon,
            dim=self.dim,
            trunk_layers=self.trunk_layers,
            attention_heads=self.attention_heads,
        )

    def lr_factor(self, step: int) -> float:
        """What `lr` is multiplied with at the model's step 0, 1, ... steps - 1."""
        rise = max(1, self.steps // 20)
        if step < rise:
            return (step + 1) / rise
        progress = (step - rise) / max(1, self.steps - rise)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def identity(self) -> dict[str, Any]:
        """The settings that decide the numbers: all but how often and how many are saved."""
        settings = asdict(self)
        del settings["save_every"], settings["keep_last"]
        return settings
