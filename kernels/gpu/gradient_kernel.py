"""Gradient of the rows: one program a row, one read and one write, no probability tensor.

    grad[b,t,k,v] = c (exp(x[b,t,k,v] - m - log s) - [v == target]),  c = row_scalar[b,t,k]

where x are the logits, or what numerics.py makes of them and of this. Shared heads (one row of
logits for all k) get the sum over k: (sum_k c) softmax - sum_k c onehot_k.
A row without a valid target, or with c = 0, is not read; its gradient is 0. All arithmetic is
float32.

This is the gradient of whatever is made of the rows' losses; that of the loss itself is written
with the loss (register_kernel.py, online_kernel.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wmtp.kernels.heads import head_targets, of_agreeing, position
from wmtp.kernels.numerics import (
    MEASURED,
    arguments,
    kept,
    level_of,
    of_kept,
    of_target,
    point,
    row_scalars,
    steep,
)
from wmtp.kernels.rows import (
    ONE_BINARY,
    OPTIONS,
    UNIT_BYTES,
    aligned_base,
    edge_columns,
    exp,
    first_unit,
    in_phase,
    inner_part,
    launch_shape,
    strides,
    targets,
    warp_size,
)
from wmtp.layout import heads_share_storage
from wmtp.records import RowInputs, RowSettings


@triton.jit
def write_gradient(
    logits_ptr,
    begin,
    grad_ptr,
    grad_begin,
    vocab_size,
    live,
    shift,
    scale,
    level,
    target,
    entry,
    numbers,
    FORM: tl.constexpr,
    IN_PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad[v] = scale exp(logits[v] - shift), but entry_i where v == target_i; 0 unless live. What
    numerics.py has besides comes in `of_softmax`.

    The entries are written last: to hold every column against every target takes registers that
    there are not. A head that has no part in the row has a target of -1.
    """
    UNIT: tl.constexpr = UNIT_BYTES // (grad_ptr.dtype.element_ty.primitive_bitwidth // 8)
    peel, inner = inner_part(grad_begin, vocab_size, UNIT)
    row_ptr = logits_ptr + begin
    inner_ptr = logits_ptr + (first_unit(begin, UNIT) if IN_PHASE else begin + peel)
    grad_row_ptr = grad_ptr + grad_begin
    grad_inner_ptr = grad_ptr + first_unit(grad_begin, UNIT)

    lane = tl.arange(0, 2 * UNIT)
    offset = tl.arange(0, BLOCK)
    column = edge_columns(lane, peel, inner, UNIT)
    inside = (column >= 0) & (column < vocab_size)
    full = inner // BLOCK * BLOCK
    rest = offset < inner - full  # both multiples of UNIT: a vector is in or out as a whole
    if live:
        edge = tl.load(row_ptr + column, mask=inside)
        edge = of_softmax(edge, shift, scale, level, numbers, FORM)
        tl.debug_barrier()  # in place: a lane of the edges is several threads', and all have read
        tl.store(grad_row_ptr + column, edge, mask=inside)
        for start in range(0, full, BLOCK):
            x = tl.load(inner_ptr + start + offset, eviction_policy="evict_first")
            x = of_softmax(x, shift, scale, level, numbers, FORM)
            tl.store(grad_inner_ptr + start + offset, x, eviction_policy="evict_first")
        if full < inner:
            x = tl.load(inner_ptr + full + offset, mask=rest, eviction_policy="evict_first")
            x = of_softmax(x, shift, scale, level, numbers, FORM)
            tl.store(grad_inner_ptr + full + offset, x, mask=rest, eviction_policy="evict_first")
        tl.debug_barrier()  # another thread has stored there
        written = (target >= 0) & (target < vocab_size)
        tl.store(grad_row_ptr + target, entry.to(grad_ptr.dtype.element_ty), mask=written)
    else:
        if MEASURED & FORM:
            tl.debug_barrier()  # in place: all have read where the largest logit is
        tl.store(grad_row_ptr + column, tl.zeros(lane.shape, tl.float32), mask=inside)
        zeros = tl.zeros(offset.shape, tl.float32)
        for start in range(0, full, BLOCK):
            tl.store(grad_inner_ptr + start + offset, zeros)
        tl.store(grad_inner_ptr + full + offset, zeros, mask=rest)


@triton.jit
def of_softmax(logit, shift, scale, level, numbers, FORM: tl.constexpr):
    """scale exp(logit - shift), in the logits' dtype, or what numerics.py makes of it."""
    x, slope = point(logit.to(tl.float32), numbers, FORM)
    e = kept(exp(x - shift), slope, FORM)
    return of_kept(e, slope, scale, level, FORM).to(logit.dtype)


@triton.jit(**ONE_BINARY)
def row_gradient_kernel(
    logits_ptr,  # 128-byte aligned, `lead` elements before logits[0, 0, 0, 0]
    target_ptr,  # int64, see heads.py
    row_max_ptr,  # [B, S, H]
    log_sum_ptr,  # [B, S, H]
    c_ptr,  # [B, S, H]
    grad_ptr,  # likewise aligned
    lead,
    stride_b: tl.int64,
    stride_s: tl.int64,
    stride_h: tl.int64,
    grad_lead,
    grad_stride_b: tl.int64,
    grad_stride_s: tl.int64,
    grad_stride_h: tl.int64,
    target_stride_b: tl.int64,
    target_stride: tl.int64,
    targets,
    seq_len,
    vocab_size,
    ignore_index,
    slope,  # these six: see numerics.py
    offset,
    amplitude,
    center,
    z_loss,
    label_smoothing,
    H: tl.constexpr,
    SHARED_HEADS: tl.constexpr,
    FORM: tl.constexpr,  # of numerics.py
    IN_PHASE: tl.constexpr,  # every row starts as far from a 128-byte boundary as its gradient
    BLOCK: tl.constexpr,
):
    numbers = (slope, offset, amplitude, center, z_loss, label_smoothing)
    ROWS: tl.constexpr = 1 if SHARED_HEADS else H
    HEADS: tl.constexpr = triton.next_power_of_2(H) if SHARED_HEADS else 1
    token = (tl.program_id(0) // ROWS).to(tl.int64)
    row = (tl.program_id(0) % ROWS).to(tl.int64)
    b, t = position(token, seq_len)
    begin = lead + b * stride_b + t * stride_s + row * stride_h
    grad_begin = grad_lead + b * grad_stride_b + t * grad_stride_s + row * grad_stride_h

    head = row + tl.arange(0, HEADS)  # [HEADS]
    target, valid, in_range = head_targets(
        target_ptr, target_stride_b, target_stride, targets, b, t, head, vocab_size,
        ignore_index, H,
    )  # fmt: skip
    head_ptr = token * H + head
    c = tl.load(c_ptr + head_ptr, mask=valid, other=0.0)  # [HEADS]
    live = tl.max((c != 0).to(tl.int32), axis=0) > 0
    # Shared heads share both, but for the NaN of a target out of range: that stays.
    head_m = tl.load(row_max_ptr + head_ptr, mask=valid, other=float("-inf"))
    m = tl.max(head_m, axis=0)
    log_s = tl.load(log_sum_ptr + head_ptr, mask=valid, other=float("-inf"))
    a, b = row_scalars(c, head_m + log_s, numbers, FORM)
    bad = tl.sum(tl.where(log_s == log_s, 0.0, log_s), axis=0)
    scale = steep(tl.sum(a, axis=0), numbers, FORM) * exp(-(tl.max(log_s, axis=0) + bad))
    level = level_of(tl.sum(c, axis=0), vocab_size, numbers, FORM)
    target = tl.where(valid, target, -1)
    l_target = tl.load(logits_ptr + begin + target, mask=valid & in_range, other=0.0)
    x_target, slope_target = point(l_target.to(tl.float32), numbers, FORM)
    onehot = of_agreeing(target, b)
    entry = of_target(exp(x_target - m), slope_target, scale, level, onehot, FORM)
    write_gradient(
        logits_ptr, begin, grad_ptr, grad_begin, vocab_size, live, m, scale, level, target, entry,
        numbers, FORM, IN_PHASE, BLOCK,
    )  # fmt: skip


def row_gradient(rows: RowInputs, settings: RowSettings) -> Tensor:
    """Launch: one program a row."""
    logits = rows.logits
    shared_heads = heads_share_storage(logits)
    padded = logits[:, :, :1] if shared_heads else logits
    grad = torch.empty_like(padded, memory_format=torch.contiguous_format)
    if not logits.numel():
        return grad
    read = padded[..., : settings.vocab_size]
    _, seq_len, _, vocab_size = read.shape
    warp = warp_size(logits.device)
    block, num_warps = launch_shape(vocab_size, logits.element_size(), warp)
    base, lead = aligned_base(read)
    grad_base, grad_lead = aligned_base(grad)
    with torch.cuda.device_of(logits):
        row_gradient_kernel[(read.shape[0] * read.shape[1] * read.shape[2],)](
            logits_ptr=base,
            **targets(rows.target_ids),
            row_max_ptr=rows.row_max,
            log_sum_ptr=rows.log_sum,
            c_ptr=rows.row_scalar,
            grad_ptr=grad_base,
            lead=lead,
            **strides("stride", read),
            grad_lead=grad_lead,
            **strides("grad_stride", grad),
            seq_len=seq_len,
            vocab_size=vocab_size,
            ignore_index=settings.ignore_index,
            H=logits.shape[2],
            SHARED_HEADS=shared_heads,
            **arguments(settings.numerics),
            IN_PHASE=in_phase(read, grad, (lead, grad_lead)),
            BLOCK=block,
            num_warps=num_warps,
            **OPTIONS,
        )
    return grad
