"""What is measured: a model on unseen text, a step's weights, the memory used."""

import resource
import statistics
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypedDict

import torch
from torch import Tensor

from wmtp.data import Batch
from wmtp.metrics import Summary, summarize
from wmtp.models import MTPTransformer
from wmtp.trainers.config import TrainConfig
from wmtp.trainers.losses import training_loss
from wmtp.trainers.step import TRAIN, on_device, targets_of


class Evaluation(TypedDict):
    """ce_per_head [H] in nats per token, next_token_accuracy of head 0 in [0, 1], tokens read."""

    ce_per_head: list[float]
    next_token_accuracy: float
    tokens: int


@torch.no_grad()
def evaluate(model: MTPTransformer, batches: Iterable[Batch], device: torch.device) -> Evaluation:
    """Mean cross entropy of each head and accuracy of the first, over all tokens of the batches."""
    model.eval()
    horizon = model.config.horizon
    summaries, tokens = [], 0
    for batch in batches:
        here = on_device(batch, device)
        targets = targets_of(here, horizon)
        states = model(here["input_ids"], here.get("document_ids")).head_hidden_states
        measured = training_loss("linear", states, model.unembed, targets, metrics=True)
        summaries.append(summarize(measured))
        tokens += here["input_ids"].numel()
    model.train()
    whole = sum(summaries[1:], summaries[0])
    return {
        "ce_per_head": whole.mean_ce.tolist(),
        "next_token_accuracy": whole.accuracy[0].item(),
        "tokens": tokens,
    }


def step_statistics(
    summary: Summary, weights: Tensor, valid: Tensor, total: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """What a step records about its heads, each a 0-d tensor.

    Args:
        summary: of the loss over this part of the batch.
        weights: [B, S, H].
        valid: [B, S, H] bool, the pairs that count.
        total: of sums over this part of the batch, those over all of it.

    Returns:
        targets, how many pairs of token and head have one; ce_head_k, accuracy_head_k and
        entropy_head_k, the means of head k's pairs, in nats but for the second; weight_head_k, its
        mean share w / sum_k w over the tokens that have any weight and a target for every head
        (1 / H for uniform weights, 0 where there is no such token); weight_entropy, the mean
        entropy of those shares in nats (log H for uniform weights).
    """
    weights = weights.double()  # whose sum is in range
    weight_sum = weights.sum(-1, keepdim=True)
    whole = valid.all(-1, keepdim=True) & (weight_sum != 0)
    share = torch.where(whole, weights / weight_sum, 0.0)
    over_tokens = torch.stack((whole.sum(), -torch.xlogy(share, share).sum()))
    of_heads = (*summary.sums(), share.sum((0, 1)))
    sums = total(torch.cat((*of_heads, over_tokens)))
    *reduced, shares = sums[:-2].view(len(of_heads), -1)
    summary, tokens = Summary(*reduced), sums[-2].clamp(min=1)
    by_head = {
        "ce": summary.mean_ce,
        "accuracy": summary.accuracy,
        "entropy": summary.mean_entropy,
        "weight": shares / tokens,
    }
    return {
        "targets": summary.count.sum(),
        **{f"{name}_head_{k}": of[k] for name, of in by_head.items() for k in range(len(of))},
        "weight_entropy": sums[-1] / tokens,
    }


def run_result(
    config: TrainConfig,
    model: MTPTransformer,
    device: torch.device,
    records: list[dict[str, Any]],
    ends: dict[str, Any],
) -> dict[str, Any]:
    """What a finished run says of itself; `ends` are the evaluations at its start and end."""
    speeds = [record["tokens_per_s"] for record in records if record["stage"] == TRAIN]
    return {
        "algo": config.algo,
        "steps": config.steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": str(device),
        **ends,
        "tokens_per_s": statistics.median(speeds),
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def what_lacks(result: dict[str, Any]) -> str | None:
    """The first name of a run's result that is not there, or holds something else.

    >>> what_lacks({"start": {"ce_per_head": [1.0], "next_token_accuracy": 0.5}})
    'end'
    """
    for name in ("start", "end"):
        evaluation = result.get(name)
        if not isinstance(evaluation, dict):
            return name
        by_head = evaluation.get("ce_per_head")
        if not isinstance(by_head, list) or not by_head or not all(map(_is_number, by_head)):
            return f"{name}.ce_per_head"
        if not _is_number(evaluation.get("next_token_accuracy")):
            return f"{name}.next_token_accuracy"
    for name in ("tokens_per_s", "peak_memory_bytes"):
        if not _is_number(result.get(name)):
            return name
    return None if isinstance(result.get("metrics"), str) else "metrics"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def peak_memory_bytes(device: torch.device) -> int:
    """The device's peak allocation, or on the CPU the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
