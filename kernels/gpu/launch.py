"""How the kernel over the logits is launched: in the tier that `tiers.py` chooses, or below it."""

import warnings
from typing import Any, NamedTuple

import torch

from wmtp.kernels import tiers
from wmtp.kernels.online_kernel import online_kernel
from wmtp.kernels.partial_kernel import partial_kernel
from wmtp.kernels.register_kernel import register_kernel
from wmtp.kernels.rows import aligned_base, in_phase


class Case(NamedTuple):
    """What the kernel works on."""

    rows: torch.Tensor  # [B, S, H, V], or [B, S, 1, V] shared by the heads
    target_ids: torch.Tensor  # [B, S] int64; or [1, T]: T > S where the logits stop before
    heads: int
    grad: torch.Tensor | None  # wanted there; `rows` itself: in place
    pointers: tuple[torch.Tensor, ...]  # the kernels' own, between target_ptr and grad_ptr
    ignore_index: int
    excess: bool
    signed: bool
    head_offsets: tuple[int, ...] | None


class Call(NamedTuple):
    """A kernel and everything it is called with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


_without_clusters: set[torch.device] = set()  # where a launch with clusters has failed


def launch(case: Case) -> None:
    """Launch; where one with clusters fails, without them from then on, saying so once a device."""
    device = case.rows.device
    machine = tiers.machine(device)
    alone = machine._replace(most_ctas=1)
    chosen = choose(case, alone if device in _without_clusters else machine)
    if chosen.num_ctas == 1 or tiers.forced_tier():
        return launch_as(chosen, case)
    try:
        launch_as(chosen, case)
    except Exception as error:  # the driver's, the compiler's, the assembler's
        launch_as(choose(case, alone), case)
        _without_clusters.add(device)
        warnings.warn(
            f"a launch in clusters of {chosen.num_ctas} blocks failed on {device} "
            f"({type(error).__name__}: {error}): there the loss does without them from now on, "
            f"and may read its logits twice instead of once",
            RuntimeWarning,
            stacklevel=2,
        )


def choose(case: Case, machine: tiers.Machine) -> tiers.Launch:
    return tiers.choose(
        vocab_size=case.rows.shape[-1],
        heads=case.heads,
        rows=case.rows.shape[2],
        itemsize=case.rows.element_size(),
        excess=case.excess,
        gradient=case.grad is not None,
        machine=machine,
        forced=tiers.forced_tier(),
    )


def launch_as(chosen: tiers.Launch, case: Case) -> None:
    for call in prepare(chosen, case):
        call.kernel[call.grid](*call.arguments, **call.constants, **chosen.options())


def prepare(chosen: tiers.Launch, case: Case) -> list[Call]:
    """One call; online, for few rows, two."""
    rows, target = case.rows, case.rows if case.grad is None else case.grad
    batch, seq_len, count, vocab_size = rows.shape
    listed = case.head_offsets is not None
    base, lead = aligned_base(rows)
    grad_base, grad_lead = aligned_base(target)
    same = target is rows or in_phase(rows, target, (lead, grad_lead), case.head_offsets)
    constants = {
        **tiers.constants(chosen, case.heads, count, case.excess),
        "H": case.heads,
        "LISTED": listed,
        "GRAD_LISTED": listed and target is rows,
        "EXCESS": case.excess,
        "SIGNED": case.signed,
        "IN_PHASE": same,
        "BLOCK": chosen.block,
    }
    strides = (lead, *rows.stride()[:3])
    sizes = (case.target_ids.shape[1], vocab_size, case.ignore_index)
    numbers = (*strides, grad_lead, *target.stride()[:3], *sizes)
    programs = batch * seq_len * constants["PROGRAMS"]
    if chosen.tier != "online":
        arguments = (base, case.target_ids, *case.pointers, grad_base, *numbers)
        return [Call(register_kernel, (programs,), arguments, constants)]

    machine = tiers.machine(rows.device)
    splits = tiers.splits(vocab_size, rows.element_size(), programs, machine)
    constants |= {"GRAD": case.grad is not None, "SPLITS": splits}
    *inputs, offsets, ce, row_max, log_sum = case.pointers
    scratch, calls = (offsets, offsets), []
    if splits > 1:
        all_rows = batch * seq_len * count
        scratch = (
            rows.new_empty((all_rows, splits, 2), dtype=torch.float32),
            rows.new_empty((batch, seq_len, case.heads), dtype=torch.float32),
        )
        of_parts = {
            "H": case.heads,
            "HEADS": constants["HEADS"] if count < case.heads else 1,
            "ROWS": count,
            "LISTED": listed,
            "EVICT": "evict_last" if case.grad is not None else "evict_first",
            "SPLITS": splits,
            "BLOCK": chosen.block,
        }
        arguments = (base, case.target_ids, offsets, *scratch, *strides, *sizes)
        calls = [Call(partial_kernel, (all_rows, splits), arguments, of_parts)]
    inputs = (case.target_ids, *inputs)
    outputs = (ce, row_max, log_sum, grad_base)
    arguments = (base, *inputs, offsets, *scratch, *outputs, *numbers)
    return [*calls, Call(online_kernel, (programs, splits), arguments, constants)]
