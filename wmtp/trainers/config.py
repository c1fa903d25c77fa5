"""Everything about a training run that decides its numbers, in one frozen record.

A field says what it is, which values it takes, and so what the command line offers for it.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from wmtp.checks import EXCESSES, REDUCTIONS
from wmtp.data.batches import Rows
from wmtp.models import MTPConfig

PRECISIONS = ("fp32", "bf16")
LOSSES = ("linear", "fused", "eager")
LARGEST_WHOLE = 2**31 - 1


class ConfigError(ValueError):
    """A setting cannot be; says what is wanted."""


def setting(
    default: Any,
    about: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float | None = None,
    one_of: Sequence[str] = (),
) -> Any:
    """A field of `TrainConfig`, and the range that `range_of` words."""
    if most is None:
        most = LARGEST_WHOLE if isinstance(default, int) else math.inf
    limits = {"least": least, "above": above, "most": most, "one_of": tuple(one_of)}
    return field(default=default, metadata={"about": about, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; each says what it is, here and in `wmtp train --help`.

    Attributes:
        algo: a name in `trainer_registry`, or package.module:Class.
        settings: of the algorithm's own, by name.
        batch_size: B, rows a step over all processes together. seq_len: S. horizon: H.

    Raises:
        ConfigError: a value that is out of its range, or of another type.

        >>> TrainConfig(algo="mtp-baseline", steps=0)
        Traceback (most recent call last):
            ...
        wmtp.trainers.config.ConfigError: steps must be a whole number from 1 to 2147483647, got 0
    """

    algo: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = setting(2000, "Updates of the model.", least=1)
    batch_size: int = setting(16, "Sequences a step, over all processes.", least=1)
    grad_accum: int = setting(1, "Parts of a step's batch, one after another.", least=1)
    seq_len: int = setting(512, "Tokens a sequence.", least=2)
    pack: bool = setting(
        False, "Documents that share a row are strangers: labels, positions and attention end."
    )
    horizon: int = setting(4, "Heads: how many tokens ahead.", least=1)
    dim: int = setting(512, "Hidden size, a multiple of 2 x attention heads.", least=1)
    trunk_layers: int = setting(6, "Blocks before the heads.", least=0)
    attention_heads: int = setting(8, "Of every block.", least=1)
    seed: int = setting(0, "Of weights and batches.", least=0, most=2**32 - 1)
    lr: float = setting(6e-4, "Peak learning rate, after a twentieth of the steps.", above=0)
    weight_decay: float = setting(0.1, "Of matrices, not of norms.", least=0)
    max_grad_norm: float = setting(1.0, "The gradient is scaled down to this norm.", above=0)
    precision: str = setting("fp32", "bf16: autocast around the models.", one_of=PRECISIONS)
    loss: str = setting(
        "linear",
        "linear makes the logits a chunk at a time, fused all of them, eager all in plain torch; "
        "the same numbers to rounding.",
        one_of=LOSSES,
    )
    reduction: str = setting("token_mean", "Of the loss.", one_of=REDUCTIONS)
    temperature: float = setting(0.7, "Of critic's and rho1's head weights.", above=0)
    excess: str = setting("abs", "rho1-wmtp: signed for ce - ref.", one_of=EXCESSES)
    discount: float = setting(0.95, "critic-wmtp: of the earlier value in a rise.", least=0, most=1)
    value_warmup_steps: int = setting(
        100, "critic-wmtp: steps of the value head alone, before the model's.", least=0
    )
    value_lr: float = setting(1e-3, "critic-wmtp: learning rate of the value head.", above=0)
    value_coefficient: float = setting(0.1, "critic-wmtp: of the value head's loss.", above=0)
    gamma: float = setting(0.99, "critic-wmtp: discount of future rewards.", least=0, most=1)
    gae_lambda: float = setting(
        0.95, "critic-wmtp: 0 looks a step ahead, 1 to the end.", least=0, most=1
    )
    eval_batches: int = setting(16, "Validation batches.", least=1)
    eval_every: int = setting(0, "Steps between evaluations; 0: at start and end alone.", least=0)
    save_every: int = setting(200, "Steps between checkpoints.", least=1)
    keep_last: int = setting(2, "Checkpoints that stay.", least=1)
    reference: str | None = None

    def __post_init__(self) -> None:
        for each in adjustable():
            value = getattr(self, each.name)
            _require(
                each.name, value, _of_type(value, each) and _in_range(value, each), range_of(each)
            )
        _require(
            "horizon", self.horizon, self.horizon < self.seq_len, f"below seq_len {self.seq_len}"
        )
        pairs = 2 * self.attention_heads
        wanted = f"a multiple of 2 x attention_heads = {pairs}"
        _require("dim", self.dim, self.dim % pairs == 0, wanted)

    @property
    def rows(self) -> Rows:
        """What each row holds: the labels of every head, and, packed, whose they are."""
        return Rows(self.seq_len, self.horizon, self.pack)

    @property
    def longest(self) -> int:
        """How many tokens a reference reads at once: all that have a label after them."""
        return self.seq_len + self.horizon - 1

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
        """The settings that decide the numbers: not what is saved how often, nor where the
        reference model lies."""
        settings = asdict(self)
        del settings["save_every"], settings["keep_last"], settings["reference"]
        return settings


def adjustable() -> list[Field[Any]]:
    """The fields that the command line offers."""
    return [each for each in fields(TrainConfig) if "about" in each.metadata]


def range_of(each: Field[Any]) -> str:
    """The values a field takes, in words."""
    limits = each.metadata
    if limits["one_of"]:
        return f"one of {limits['one_of']}"
    if each.type is bool:
        return "True or False"
    if each.type is int:
        return f"a whole number from {limits['least']} to {limits['most']}"
    if limits["most"] < math.inf:
        return f"between {limits['least']} and {limits['most']}"
    return "positive and finite" if limits["above"] == 0 else "at least 0 and finite"


def _of_type(value: Any, each: Field[Any]) -> bool:
    if each.type in (str, bool):
        return isinstance(value, each.type)
    wanted = int if each.type is int else int | float
    return isinstance(value, wanted) and not isinstance(value, bool)


def _in_range(value: Any, each: Field[Any]) -> bool:
    limits = each.metadata
    if each.type is bool:
        return True
    if limits["one_of"]:
        return value in limits["one_of"]
    if abs(value) > sys.float_info.max:  # infinite, or a whole number that is no float
        return False
    return limits["above"] < value and limits["least"] <= value <= limits["most"]


def _require(name: str, value: Any, holds: bool, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {wanted}, got {value}")
