"""How the kernel over the logits is launched, in the tier that `tiers.py` chooses."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wmtp.kernels import numerics, tiers
from wmtp.kernels.online_kernel import online_kernel
from wmtp.kernels.partial_kernel import partial_kernel, statistics_of
from wmtp.kernels.register_kernel import register_kernel
from wmtp.kernels.rows import aligned_base, in_phase, strides, targets
from wmtp.records import RowSettings


class Case(NamedTuple):
    """What the kernel works on."""

    rows: Tensor  # [B, S, H, V], or [B, S, 1, V] shared by the heads; without padding
    target_ids: Tensor  # see records.LossInputs
    heads: int
    grad: Tensor | None  # wanted there, likewise; `rows` itself: in place
    of_heads: "OfHeads"
    settings: RowSettings
    rule: "Rule"
    head_offsets: tuple[int, ...] | None = None
    by_head: bool = False


class OfHeads(NamedTuple):
    """The small tensors, as the kernels name them; `unused` stands for what a case has not."""

    ref_ce_ptr: Tensor  # float32, like target_ids
    weight_ptr: Tensor  # [B, S, H] float32
    numbers_ptr: Tensor  # float32, the rule's
    factors_ptr: Tensor  # [4] float32, the third is the gradient's scale; [4 + H]: the last are
    row_scalar_ptr: Tensor  # [B, S, H] float32
    offset_ptr: Tensor  # [H] int64, the head_offsets
    ce_ptr: Tensor  # [B, S, H] float32, and so the next two
    row_max_ptr: Tensor
    log_sum_ptr: Tensor
    row_loss_ptr: Tensor
    entropy_ptr: Tensor
    correct_ptr: Tensor  # [B, S, H] bool


class Rule(NamedTuple):
    """What the kernels know of a rule."""

    function: Any = None  # None: the weights are known
    other: Any = None  # that of a second rule, by whose weights these are multiplied;
    other_numbers: int = 0  # where its numbers begin
    compares: bool = False
    sums_to_one: bool = False
    whole_token: bool = False
    multiplied: bool = False


class Call(NamedTuple):
    """A kernel and everything it is called with, by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


def launch(case: Case) -> None:
    for call in prepare(choose(case), case):
        call.kernel[call.grid](**call.arguments, **call.options)


def choose(case: Case) -> tiers.Launch:
    return tiers.choose(
        vocab_size=case.rows.shape[-1],
        heads=case.heads,
        rows=case.rows.shape[2],
        itemsize=case.rows.element_size(),
        whole_token=case.rule.whole_token,
        gradient=case.grad is not None,
        machine=tiers.machine(case.rows.device),
        forced=tiers.forced_tier(),
        form=form_of(case),
    )


def form_of(case: Case) -> int:
    return numerics.form_of(case.settings.numerics, case.settings.metrics)


def prepare(chosen: tiers.Launch, case: Case) -> list[Call]:
    """One call, or two."""
    rows, target = case.rows, case.rows if case.grad is None else case.grad
    batch, seq_len, count, vocab_size = rows.shape
    listed = case.head_offsets is not None
    base, lead = aligned_base(rows)
    grad_base, grad_lead = aligned_base(target)
    same = target is rows or in_phase(rows, target, (lead, grad_lead), case.head_offsets)
    if chosen.tier == "online" and not same:
        machine = tiers.machine(rows.device)
        chosen = tiers.out_of_phase(vocab_size, rows.element_size(), machine, form_of(case))
    divided = tiers.constants(chosen, case.heads, count, case.rule.whole_token)
    programs = batch * seq_len * divided["PROGRAMS"]
    where = {
        "logits_ptr": base,
        **targets(case.target_ids),
        "lead": lead,
        **strides("stride", rows),
        "seq_len": seq_len,
        "vocab_size": vocab_size,
        "ignore_index": case.settings.ignore_index,
        **numerics.arguments(case.settings.numerics, case.settings.metrics),
        "H": case.heads,
        "LISTED": listed,
        "BLOCK": chosen.block,
    }
    arguments = {
        **where,
        **case.of_heads._asdict(),
        "grad_ptr": grad_base,
        "grad_lead": grad_lead,
        **strides("grad_stride", target),
        **divided,
        "GRAD_LISTED": listed and target is rows,
        "RULE": case.rule.function,
        "OTHER": case.rule.other,
        "OTHER_NUMBERS": case.rule.other_numbers,
        "ref_stride_b": case.of_heads.ref_ce_ptr.stride(0),
        "ref_stride": case.of_heads.ref_ce_ptr.stride(1) if case.rule.compares else 0,
        "COMPARES": case.rule.compares,
        "MULTIPLIED": case.rule.multiplied,
        "BY_HEAD": case.by_head,
        "IN_PHASE": same,
    }
    if chosen.tier == "online":
        return _online_calls(chosen, case, programs, where, arguments)
    arguments["SUMS_TO_ONE"] = case.rule.sums_to_one and not case.rule.multiplied
    return [Call(register_kernel, (programs,), arguments, chosen.options())]


def _online_calls(
    chosen: tiers.Launch,
    case: Case,
    programs: int,
    where: dict[str, Any],
    arguments: dict[str, Any],
) -> list[Call]:
    """One call; for few rows two, over parts of rows."""
    rows, machine = case.rows, tiers.machine(case.rows.device)
    batch, seq_len, rows_a_token, vocab_size = rows.shape
    splits = tiers.splits(vocab_size, rows.element_size(), programs, machine)
    count = statistics_of(where["FORM"])
    parts, calls = Parts(case.of_heads.offset_ptr, case.of_heads.offset_ptr), []
    if splits > 1:
        chosen = tiers.in_steps(vocab_size, rows.element_size(), machine, form_of(case))
        where = {**where, "BLOCK": chosen.block}
        all_rows = batch * seq_len * rows_a_token
        parts = Parts(
            rows.new_empty((all_rows, splits, count), dtype=torch.float32),
            rows.new_empty((batch, seq_len, case.heads), dtype=torch.float32),
        )
        of_parts = {
            **where,
            **parts._asdict(),
            "offset_ptr": case.of_heads.offset_ptr,
            "HEADS": arguments["HEADS"] if rows_a_token < case.heads else 1,
            "ROWS": rows_a_token,
            "EVICT": "evict_last" if case.grad is not None else "evict_first",
            "COUNT": count,
            "SPLITS": splits,
        }
        calls = [Call(partial_kernel, (all_rows, splits), of_parts, chosen.options())]
    last = {**arguments, **where, **parts._asdict(), "COUNT": count, "SPLITS": splits}
    last["GRAD"] = case.grad is not None
    return [*calls, Call(online_kernel, (programs, splits), last, chosen.options())]


class Parts(NamedTuple):
    """What partial_kernel leaves to online_kernel."""

    partial_ptr: Tensor  # [rows, SPLITS, COUNT] float32
    l_target_ptr: Tensor  # [B, S, H] float32
