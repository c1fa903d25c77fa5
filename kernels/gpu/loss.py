"""The loss over a whole batch, and its gradient if wanted: no wait for the device.

weights_kernel (what is known before) - register_kernel or online_kernel (tiers.py chooses; one read
and one write of the logits where a tier of registers serves the case) - finish_kernel (the sum, in
a fixed order).
"""

import torch

from wmtp.kernels.launch import Case, launch
from wmtp.kernels.tiers import machine, one_program
from wmtp.kernels.weights_kernel import (
    EXCESS,
    GIVEN,
    REDUCTIONS,
    UNIFORM,
    finish_kernel,
    tokens_a_step,
    weights_kernel,
)


def weighted_loss(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    head_weights: torch.Tensor | None,
    ref_ce: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    temperature: torch.Tensor | None,
    signed: bool,
    reduction: str,
    ignore_index: int,
    gradient: str,
    head_offsets: tuple[int, ...] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Launch. Arguments are taken as checked; see the op that calls this.

    Args:
        logits: [B, S, H, V] float32, bfloat16 or float16, last stride 1, other strides any;
            stride 0 along the heads reads the one row once.
        target_ids: [B, S] int64 contiguous, unshifted. Outside [0, V): that row's ce is NaN.
        head_weights: [B, S, H] float32 contiguous, or None.
        ref_ce: [B, S-1] float32 contiguous, or None; never both.
        normalizer: [], replaces the denominator, or None.
        temperature: [], of the excess softmax, nats; None without ref_ce.
        gradient: "none", "new" or "inplace" (over the logits).
        head_offsets: where head k begins, in elements from the lowest: for heads of memory of their
            own, the lowest of which is `logits`, expanded. None: by the strides.

    Returns:
        loss [], valid_mask [B, S] bool, ce [B, S, H], token_loss [B, S], weight_sum [B, S],
        row_scalar [B, S, H] = dloss / dce, row_max and log_sum [B, S, H], factors [2], grad: as
        wmtp.cpu's.
    """
    batch, seq_len, heads, vocab_size = logits.shape
    tokens = batch * seq_len
    shared_heads = head_offsets is None and heads > 1 and logits.stride(2) == 0
    rows = logits[:, :, :1] if shared_heads else logits

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return logits.new_empty(shape, dtype=dtype)

    row_scalar, ce, row_max, log_sum = (new(batch, seq_len, heads) for _ in range(4))
    weight_sum, token_loss = new(batch, seq_len), new(batch, seq_len)
    valid_mask = new(batch, seq_len, dtype=torch.bool)
    factors, loss = new(4), new()
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
    step, alone = tokens_a_step(heads), one_program(machine(logits.device)).options()
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
            int(normalizer is not None),
            int(logits.dtype == torch.float16),
            1 / heads if shared_heads else 1.0,
            H=heads,
            WEIGHTING=weighting,
            REDUCTION=REDUCTIONS[reduction],
            TOKENS=step,
            **alone,
        )
        if logits.numel():
            known = (factors, row_scalar, weight_sum)
            offsets = factors if head_offsets is None else _offsets(head_offsets, logits)
            reference = (factors, factors)
            if ref_ce is not None:
                reference = (ref_ce, _on_device(temperature, logits))
            case = Case(
                rows=rows,
                heads=heads,
                grad=None if gradient == "none" else grad,
                target_ids=target_ids,
                pointers=(*reference, *known, offsets, ce, row_max, log_sum),
                ignore_index=ignore_index,
                excess=ref_ce is not None,
                signed=signed,
                head_offsets=head_offsets,
            )
            launch(case)
        finish_kernel[(1,)](
            ce, row_scalar, factors, token_loss, loss, tokens,
            H=heads, TOKENS=step, **alone,
        )  # fmt: skip
    of_rows = (row_scalar, row_max, log_sum)
    return loss, valid_mask, ce, token_loss, weight_sum, *of_rows, factors[:2], grad


def _on_device(number: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """[] float32 beside the logits. One of the host is filled in there: a copy would wait."""
    if number.device == logits.device:
        return number.to(torch.float32)
    return logits.new_full((), number.item(), dtype=torch.float32)


def _offsets(head_offsets: tuple[int, ...], logits: torch.Tensor) -> torch.Tensor:
    """[H] int64 beside the logits; filled there: a copy would wait, and no graph would keep it."""
    offsets = logits.new_empty(len(head_offsets), dtype=torch.int64)
    for k, offset in enumerate(head_offsets):
        offsets[k].fill_(offset)
    return offsets
