"""The loss over a whole batch, and its gradient if wanted: four launches, no wait for the device.

weights_kernel (what is known before) - register_kernel or online_kernel (tiers.py chooses; one read and
one write of the logits where a tier of registers serves the case) - finish_kernel (the sum, in a fixed
order).
"""

import warnings

import torch
import triton

from wmtp.kernels import tiers
from wmtp.kernels.online_kernel import online_kernel
from wmtp.kernels.register_kernel import register_kernel
from wmtp.kernels.rows import aligned_base, in_phase
from wmtp.kernels.weights_kernel import (
    EXCESS,
    GIVEN,
    REDUCTIONS,
    UNIFORM,
    finish_kernel,
    weights_kernel,
)


def weighted_loss(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    head_weights: torch.Tensor | None,
    ref_ce: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    temperature: float,
    signed: bool,
    reduction: str,
    ignore_index: int,
    gradient: str,
) -> tuple[torch.Tensor, ...]:
    """Launch. Arguments are taken as checked; see the op that calls this.

    Args:
        logits: [B, S, H, V] float32, bfloat16 or float16, last stride 1, other strides any;
            stride 0 along the heads reads the one row once.
        target_ids: [B, S] int64 contiguous, unshifted. Outside [0, V): that row's ce is NaN.
        head_weights: [B, S, H] float32 contiguous, or None.
        ref_ce: [B, S-1] float32 contiguous, or None; never both.
        normalizer: [], replaces the denominator, or None.
        gradient: "none", "new" or "inplace" (over the logits).

    Returns:
        loss [], valid_mask [B, S] bool, ce [B, S, H], token_loss [B, S], weight_sum [B, S],
        row_scalar [B, S, H] = dloss / dce, lse [B, S, H], factors [2], grad: as wmtp.cpu's.
    """
    batch, seq_len, heads, vocab_size = logits.shape
    tokens = batch * seq_len
    shared_heads = heads > 1 and logits.stride(2) == 0
    rows = logits[:, :, :1] if shared_heads else logits

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return logits.new_empty(shape, dtype=dtype)

    row_scalar, ce, lse = (new(batch, seq_len, heads) for _ in range(3))
    weight_sum, token_loss = new(batch, seq_len), new(batch, seq_len)
    valid_mask = new(batch, seq_len, dtype=torch.bool)
    factors, loss = new(3), new()
    grad = {
        "none": lambda: logits.new_empty(0),
        "new": lambda: torch.empty_like(rows, memory_format=torch.contiguous_format),
        "inplace": lambda: rows,
    }[gradient]()
    weighting, weights = UNIFORM, target_ids
    if head_weights is not None:
        weighting, weights = GIVEN, head_weights
    elif ref_ce is not None:
        weighting = EXCESS
    tokens_a_step = max(2048 // triton.next_power_of_2(heads), 1)
    with torch.cuda.device_of(logits):
        weights_kernel[(1,)](
            target_ids,
            weights,
            factors if normalizer is None else _on_device(normalizer, logits),
            row_scalar,
            weight_sum,
            valid_mask,
            factors,
            tokens,
            seq_len,
            vocab_size,
            ignore_index,
            1 / heads if shared_heads else 1.0,
            H=heads,
            WEIGHTING=weighting,
            REDUCTION=REDUCTIONS[reduction],
            HAS_NORMALIZER=normalizer is not None,
            SCALED=logits.dtype == torch.float16,
            TOKENS=tokens_a_step,
            num_warps=8,
        )
        if logits.numel():
            pointers = (target_ids, target_ids if ref_ce is None else ref_ce, factors)
            pointers = (*pointers, row_scalar, weight_sum, ce, lse)
            options = (ignore_index, temperature, ref_ce is not None, signed)
            _launch(rows, heads, None if gradient == "none" else grad, pointers, *options)
        finish_kernel[(1,)](
            ce, row_scalar, factors, token_loss, loss, tokens,
            H=heads, TOKENS=tokens_a_step, num_warps=8,
        )  # fmt: skip
    return loss, valid_mask, ce, token_loss, weight_sum, row_scalar, lse, factors[:2], grad


def _on_device(normalizer: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """[] float32 beside the logits. A number is filled in there: a copy would wait."""
    if normalizer.device == logits.device:
        return normalizer.to(torch.float32)
    return logits.new_full((), normalizer.item(), dtype=torch.float32)


_unschedulable: set[tiers.Launch] = set()


def _launch(
    rows: torch.Tensor,
    heads: int,
    grad: torch.Tensor | None,
    pointers: tuple[torch.Tensor, ...],
    ignore_index: int,
    temperature: float,
    excess: bool,
    signed: bool,
) -> None:
    """The kernel over the logits: rows [B, S, H, V], or [B, S, 1, V] shared by the heads."""
    _, _, count, vocab_size = rows.shape
    machine = tiers.machine(rows.device)
    launch = tiers.choose(
        vocab_size, heads, count, rows.element_size(), excess, grad is not None, machine,
        tiers.forced_tier(),
    )  # fmt: skip
    arguments = (rows, heads, grad, pointers, ignore_index, temperature, excess, signed)
    if launch not in _unschedulable:
        try:
            return _launch_as(launch, *arguments)
        except RuntimeError as error:
            if launch.num_ctas == 1 or "cluster" not in str(error):
                raise
            _unschedulable.add(launch)
            warnings.warn(
                f"this device does not schedule clusters of {launch.num_ctas} blocks ({error}): "
                f"the loss reads its logits twice instead of once",
                RuntimeWarning,
                stacklevel=2,
            )
    _launch_as(tiers.online(vocab_size, rows.element_size(), machine), *arguments)


def _launch_as(
    launch: tiers.Launch,
    rows: torch.Tensor,
    heads: int,
    grad: torch.Tensor | None,
    pointers: tuple[torch.Tensor, ...],
    ignore_index: int,
    temperature: float,
    excess: bool,
    signed: bool,
) -> None:
    batch, seq_len, count, vocab_size = rows.shape
    constants = tiers.constants(launch, heads, count, excess)
    target = rows if grad is None else grad
    base, lead = aligned_base(rows)
    grad_base, grad_lead = aligned_base(target)
    kernel = register_kernel
    if launch.tier == "online":
        kernel = online_kernel
        constants = {**constants, "GRAD": grad is not None}
    kernel[(batch * seq_len * constants["PROGRAMS"],)](
        base,
        *pointers,
        grad_base,
        lead,
        *rows.stride()[:3],
        grad_lead,
        *target.stride()[:3],
        seq_len,
        vocab_size,
        ignore_index,
        temperature,
        H=heads,
        EXCESS=excess,
        SIGNED=signed,
        IN_PHASE=in_phase(rows, target),
        BLOCK=launch.block,
        num_warps=launch.num_warps,
        num_ctas=launch.num_ctas,
        maxnreg=launch.max_registers,
        **constants,
    )
