"""Bytes that the Triton kernels move, counted lane by lane in Triton's interpreter: no GPU needed.

    python -m benchmarks.traffic [--vocab V] [--json FILE]

One line a weighting, tier and direction, in units of the valid logits (rows that have a target) for
what is read, and of all logits for what is written; `others` is everything else that is moved, in
units of the valid logits. The interpreter counts each lane of each access once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported

import torch
from torch import Tensor

from wmtp import fused_weighted_mtp_loss, kernels, td_head_weights
from wmtp.files import json_by_line
from wmtp.labels import has_target
from wmtp.records import RowSettings
from wmtp.weightings import Weighting

IGNORED = -100
SHAPE = (2, 6, 4)  # B, S, H
WEIGHTINGS = ("uniform", "given", "critic", "ref_ce", "ref_logits")
TIERS = ("token", "row", "online")
OPTIONS: dict[str, dict[str, Any]] = {
    "scaled": {"logit_scale": 0.5},
    "capped": {"softcap": 30.0},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-4},
    "metrics": {"metrics": True},
    "all of them": {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4, "metrics": True},
}
TITLE = "bytes moved, in units of the logits: read and others of the valid ones, written of all"


class Moved(NamedTuple):
    """In units of the logits."""

    read: float
    read_reference: float
    written: float
    others: float


class Traffic:
    """Bytes loaded from and stored to named tensors; lanes in none of them count as `elsewhere`."""

    def __init__(self, **tensors: Tensor):
        self._spans = {
            name: (
                begin := tensor.untyped_storage().data_ptr(),
                begin + tensor.untyped_storage().nbytes(),
            )
            for name, tensor in tensors.items()
        }
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()

    @contextlib.contextmanager
    def counted(self) -> Iterator[Traffic]:
        """What is launched inside is counted."""
        from triton.runtime.interpreter import InterpreterBuilder

        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._count(self.loaded, ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def counted_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._count(self.stored, ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        InterpreterBuilder.create_masked_load = counted_load
        InterpreterBuilder.create_masked_store = counted_store
        try:
            yield self
        finally:
            InterpreterBuilder.create_masked_load = load
            InterpreterBuilder.create_masked_store = store

    def _count(self, counter: Counter[str], ptrs: Any, mask: Any) -> None:
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        active = ptrs.data[mask.data]
        counted = 0
        for name, (begin, end) in self._spans.items():
            inside = int(((active >= begin) & (active < end)).sum())
            counter[name] += inside * width
            counted += inside
        counter["elsewhere"] += (active.size - counted) * width


def measure(
    weighting: str | Weighting,
    tier: str,
    gradient: bool,
    vocabulary: int,
    dtype: torch.dtype = torch.bfloat16,
    inplace: bool = False,
    shared: bool = False,
    **options: Any,
) -> Moved:
    """Forward, or forward + backward, of random logits with ignored labels.

    Args:
        weighting: of WEIGHTINGS, or a rule.
        tier: of TIERS, or "" for what the library chooses by itself.
        shared: one row of logits for all heads.
        options: of the loss.
    """
    batch, length, heads = SHAPE
    target_ids = torch.randint(vocabulary, (batch, length))
    target_ids[:, 2] = IGNORED
    rows = torch.randn(batch, length, 1 if shared else heads, vocabulary).to(dtype)
    rows.requires_grad_(gradient)
    # An in-place loss wants logits that are no leaf, as a model's are.
    logits = (rows * 1 if inplace else rows).expand(-1, -1, heads, -1)
    weights = _weights(weighting, target_ids, heads, vocabulary, dtype)
    tensors = {"logits": logits}
    if weighting == "ref_logits":
        tensors["reference"] = weights["ref_logits"]
    traffic = Traffic(**tensors)
    with _forced(tier), traffic.counted():
        loss = fused_weighted_mtp_loss(
            logits, target_ids, **weights, **options, inplace=inplace, backend="triton"
        ).loss
        grad = torch.autograd.grad(loss, rows)[0] if gradient else None
    # The gradient did not exist before: what is stored elsewhere is it, and per-token numbers.
    valid = has_target(target_ids, heads, IGNORED)
    live = int((valid.any(-1) if shared else valid).sum())
    unit = vocabulary * dtype.itemsize
    written = 0 if grad is None else rows.numel() * dtype.itemsize
    stored = traffic.stored.total()
    others = traffic.loaded["elsewhere"] + stored - written
    del grad
    return Moved(
        traffic.loaded["logits"] / (live * unit),
        traffic.loaded["reference"] / (int(valid[..., 0].sum()) * unit),
        stored / (rows.numel() * dtype.itemsize),
        others / (live * unit),
    )


@contextlib.contextmanager
def _forced(tier: str) -> Iterator[None]:
    before = os.environ.get("WMTP_TRITON_TIER")
    os.environ["WMTP_TRITON_TIER"] = tier
    try:
        yield
    finally:
        del os.environ["WMTP_TRITON_TIER"]
        if before is not None:
            os.environ["WMTP_TRITON_TIER"] = before


def measure_chunk(tier: str, gradient: bool, vocabulary: int) -> Moved:
    """What the linear op's kernel does with a chunk of bf16 logits."""
    logits = torch.randn(24, vocabulary).bfloat16()
    target_ids = torch.randint(vocabulary, (24,))
    row_scalar = torch.rand(24) if gradient else None
    traffic = Traffic(logits=logits)
    with _forced(tier), traffic.counted():
        settings = RowSettings(ignore_index=-100, backend="triton")
        kernels.rows_ce_(logits, target_ids, row_scalar, settings)
    return Moved(
        traffic.loaded["logits"] / logits.nbytes,
        0.0,
        traffic.stored["logits"] / logits.nbytes,
        (traffic.loaded["elsewhere"] + traffic.stored["elsewhere"]) / logits.nbytes,
    )


def _weights(
    weighting: str | Weighting, target_ids: Tensor, heads: int, vocabulary: int, dtype: torch.dtype
) -> dict[str, Any]:
    if isinstance(weighting, Weighting):
        return {"weighting": weighting}
    batch, length = target_ids.shape
    if weighting == "given":
        return {"head_weights": torch.rand(batch, length, heads)}
    if weighting == "critic":
        return {"head_weights": td_head_weights(torch.randn(batch, length), target_ids, heads)}
    if weighting == "ref_ce":
        return {"ref_ce": torch.rand(batch, length - 1)}
    if weighting == "ref_logits":
        return {"ref_logits": torch.randn(batch, length, vocabulary).to(dtype)}
    return {}


def serves(tier: str, weighting: str) -> bool:
    """A row alone does not know weights that follow from the token's other rows."""
    return not (tier == "row" and weighting.startswith("ref"))


def rows(vocabulary: int) -> Iterator[dict[str, Any]]:
    """The table's lines."""
    for weighting in WEIGHTINGS:
        moved = measure(weighting, "", False, vocabulary)
        yield {"weighting": weighting, "tier": "", "direction": "forward", **moved._asdict()}
        for tier in TIERS:
            if serves(tier, weighting):
                moved = measure(weighting, tier, True, vocabulary)
                line = {"weighting": weighting, "tier": tier, "direction": "forward+backward"}
                yield {**line, **moved._asdict()}
    for name, options in OPTIONS.items():
        moved = measure("uniform", "", False, vocabulary, **options)
        yield {"weighting": name, "tier": "", "direction": "forward", **moved._asdict()}
        for tier in ("row", "online"):
            moved = measure("uniform", tier, True, vocabulary, **options)
            line = {"weighting": name, "tier": tier, "direction": "forward+backward"}
            yield {**line, **moved._asdict()}
    moved = measure("uniform", "", True, vocabulary, shared=True)
    yield {
        "weighting": "one row for all heads",
        "tier": "",
        "direction": "forward+backward",
        **moved._asdict(),
    }
    for tier in ("row", "online", ""):
        moved = measure_chunk(tier, bool(tier), vocabulary)
        direction = "forward+backward" if tier else "forward"
        yield {"weighting": "linear", "tier": tier, "direction": direction, **moved._asdict()}


def main() -> None:
    """Print the table, or write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=8191, help="odd by default")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    torch.manual_seed(0)
    found = list(rows(options.vocab))
    if options.json is not None:
        options.json.write_text(json_by_line({"vocabulary": options.vocab, "rows": found}) + "\n")
        return
    from rich import box, print
    from rich.table import Table

    table = Table(title=TITLE, box=box.SIMPLE, caption=f"[2, 6, 4, {options.vocab}] bfloat16")
    for name in found[0]:
        table.add_column(name, justify="right" if name in Moved._fields else "left")
    for row in found:
        table.add_row(
            *(f"{value:.4f}" if isinstance(value, float) else value for value in row.values())
        )
    print(table)


if __name__ == "__main__":
    main()
