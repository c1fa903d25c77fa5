"""What labels, masks and documents cost: loss + gradient of each form beside the plain call's.

    python -m benchmarks.forms [--json benchmarks/results/forms-cpu.json]

[1, 256, 4, 32000] logits with head_weights, fp32 and bf16. The forms take turns, in another order
each round; what is told is the median of ROUNDS over the plain call's.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmtp import fused_weighted_mtp_loss
from wmtp.benchmarks.report import environment

SHAPE, ROUNDS = (1, 256, 4, 32000), 80


def forms(shape: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """The arguments that say what is predicted, and what of it counts."""
    batch, length, heads, vocabulary = shape
    ids = torch.randint(vocabulary, (batch, length))
    longer = torch.randint(vocabulary, (batch, length + heads))
    own = torch.randint(vocabulary, (batch, length, heads))
    kept, documents = torch.ones(batch, length) > 0, torch.arange(length + heads)[None] // 64
    return {
        "plain": {"target_ids": ids},
        "T = S + H": {"target_ids": longer},
        "shifted": {"target_ids": ids, "shifted": True},
        "[B, S, H]": {"target_ids": own},
        "a list of H": {"target_ids": list(own.unbind(2))},
        "offsets": {"target_ids": ids, "offsets": (1, 2, 4, 8)},
        "document_ids": {"target_ids": ids, "document_ids": documents[:, :length]},
        "target_mask, bool": {"target_ids": ids, "target_mask": kept},
        "position_mask, bool": {"target_ids": ids, "position_mask": kept},
        "target_mask, float": {"target_ids": ids, "target_mask": torch.rand(batch, length) + 0.1},
        "documents and both masks": {
            **{"target_ids": longer, "document_ids": documents, "position_mask": kept},
            "target_mask": torch.rand(batch, length + heads) + 0.1,
        },
    }


def times(dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of each."""
    torch.manual_seed(0)
    logits = torch.randn(SHAPE, dtype=dtype, requires_grad=True)
    weights, calls = torch.rand(SHAPE[:3]), forms(SHAPE)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for how in calls.values():
        _step(logits, weights, how)
    for _ in range(ROUNDS):
        for name in random.sample(list(calls), len(calls)):
            start = time.perf_counter()
            _step(logits, weights, calls[name])
            found[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(taken) for name, taken in found.items()}


def _step(logits: Tensor, weights: Tensor, how: dict[str, Any]) -> None:
    loss = fused_weighted_mtp_loss(logits, head_weights=weights, reduction="pair_mean", **how).loss
    torch.autograd.grad(loss, logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path)
    file = parser.parse_args().json
    found = {
        str(dtype).removeprefix("torch."): times(dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    for dtype, taken in found.items():
        for name, ms in taken.items():
            print(f"{dtype:9} {name:25} {ms:6.2f} ms  {ms / taken['plain']:.3f}x")
    if file is not None:
        results = {
            "environment": environment(platform.processor()),
            "shape": SHAPE,
            "ms": found,
        }
        file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
