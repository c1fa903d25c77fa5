"""What a step is made of: its stage, the parts of its batch, their weights, and finite numbers."""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from wmtp.data import Batch
from wmtp.labels import Targets
from wmtp.metrics import Summary
from wmtp.trainers.config import TrainConfig
from wmtp.weightings import Given, Uniform, Weighting

TRAIN, VALUE_WARMUP = "train", "value_warmup"
# The value head's warm-up has batches of its own: step i of the model is the same for all.
STREAMS = {TRAIN: 0, VALUE_WARMUP: 1}


class NonFiniteError(RuntimeError):
    """A step came out as NaN or infinity; nothing was updated."""


class Part(NamedTuple):
    """What a step keeps of a micro-batch, without gradients."""

    hidden_states: Tensor  # [B, S, D]
    ce_per_head: Tensor  # [B, S, H]
    weights: Tensor  # [B, S, H]
    summary: Summary
    loss: Tensor  # []
    denominator: Tensor  # []


def targets_of(batch: Batch, heads: int) -> Targets:
    """What the heads are asked for."""
    return Targets(
        batch["target_ids"],
        batch["input_ids"].shape[1],
        heads,
        document_ids=batch.get("document_ids"),
    )


def on_device(batch: Batch, device: torch.device, rows: slice = slice(None)) -> Batch:
    """Some of its rows there."""
    tensors = cast(dict[str, Tensor], batch)
    return cast(Batch, {name: tensor[rows].to(device) for name, tensor in tensors.items()})


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """So many parts of equal rows."""
    rows = len(batch["input_ids"]) // count
    tensors = cast(dict[str, Tensor], batch)
    parts = {name: tensor.split(rows) for name, tensor in tensors.items()}
    return [
        cast(Batch, dict(zip(parts, of_part, strict=True)))
        for of_part in zip(*parts.values(), strict=True)
    ]


def as_weighting(weights: Any, trainer: str) -> Weighting:
    """What a trainer's `compute_head_weights` returned, as a record.

    Raises:
        TypeError: it is none, nor a tensor.
    """
    if isinstance(weights, Tensor):
        return Given(weights)
    if not isinstance(weights, Weighting):
        raise TypeError(
            f"{trainer}.compute_head_weights must return weights [B, S, H] or a rule of "
            f"wmtp.weightings, got {type(weights).__name__}"
        )
    return weights


def what_cancels(weighting: Weighting, config: TrainConfig) -> str | None:
    """Why the weights of these settings change nothing, and what to do."""
    if config.horizon > 1 or isinstance(weighting, Uniform):
        return None
    if weighting.sums_to_one:
        return (
            f"with horizon 1 the weights of {config.algo} are all 1, for a token's sum to 1: it "
            "trains as mtp-baseline does; pass --horizon 2 or more"
        )
    if config.reduction != "token_mean":
        return None
    return (
        f"with horizon 1 token_mean divides a token's weight out again: {config.algo} trains as "
        "mtp-baseline does, but on the tokens whose weight is not 0; pass --reduction weight_mean, "
        "or --horizon 2 or more"
    )


def what_is_masked(record: dict[str, Any]) -> str | None:
    """Why a step has learned nothing, and what to do."""
    if record["targets"]:
        return None
    return (
        "a step had no target at all: its loss is 0 and nothing was learned from it; pass text "
        "that is longer than --horizon tokens"
    )


def check_finite(record: dict[str, Any], sequence_ids: Tensor) -> None:
    """Raises NonFiniteError where a number of the step's record is NaN or infinite."""
    bad = {
        name: value
        for name, value in record.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    if bad:
        raise NonFiniteError(
            f"step {record['step']}: {', '.join(f'{k} is {v}' for k, v in bad.items())}; "
            f"sequences {sequence_ids.tolist()} of the training data; nothing was updated: lower "
            "--lr, or look at these sequences"
        )
