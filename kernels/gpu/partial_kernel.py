"""Few rows of many logits: statistics.py's of each part of a row, one program a part, one read.

    partial[row, i] = (m, s),  m = max x,  s = sum exp(x - m)  over part i of SPLITS of the row
                      | (m, s, total, weighted, the largest logit, first)       as FORM wants
    l_target[b,t,k] = logits[b,t,k,target]

The online kernel puts the parts together, and writes the gradient part by part as well. What it
needs of the logits elsewhere in the row, the target's, is taken here: in place, another part may be
overwritten.
"""

import triton
import triton.language as tl

from wmtp.kernels.heads import head_offset, head_targets, position
from wmtp.kernels.numerics import MEASURED, SMOOTHED
from wmtp.kernels.rows import ONE_BINARY, UNIT_BYTES
from wmtp.kernels.statistics import NOWHERE, joined, row_statistics


def statistics_of(form: int) -> int:
    """How many numbers are kept of a part."""
    return 6 if form & (MEASURED.value | SMOOTHED.value) else 2


@triton.jit
def part_of_row(split, vocab_size, SPLITS: tl.constexpr, ITEMSIZE: tl.constexpr):
    """(first column, number of columns) of a part: whole units, the last may be short or empty."""
    UNIT: tl.constexpr = UNIT_BYTES // ITEMSIZE
    columns = (vocab_size + SPLITS * UNIT - 1) // (SPLITS * UNIT) * UNIT
    first = split * columns
    return first, tl.minimum(columns, vocab_size - first)


@triton.jit(**ONE_BINARY)
def partial_kernel(
    logits_ptr,  # 128-byte aligned, `lead` elements before logits[0, 0, 0, 0]
    target_ptr,  # int64, see heads.py
    offset_ptr,  # [H] int64, where the heads begin, or unused
    partial_ptr,  # [rows, SPLITS, COUNT]
    l_target_ptr,  # [B, S, H]
    lead,
    stride_b: tl.int64,
    stride_s: tl.int64,
    stride_h: tl.int64,
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
    HEADS: tl.constexpr,  # that a row serves, a power of two
    ROWS: tl.constexpr,  # of a token
    LISTED: tl.constexpr,
    EVICT: tl.constexpr,
    FORM: tl.constexpr,  # of numerics.py
    COUNT: tl.constexpr,  # `statistics_of` it
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    numbers = (slope, offset, amplitude, center, z_loss, label_smoothing)
    ITEMSIZE: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth // 8
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    token = (tl.program_id(0) // ROWS).to(tl.int64)
    b, t = position(token, seq_len)
    first = (tl.program_id(0) % ROWS).to(tl.int64)
    head = first + tl.arange(0, HEADS)
    target, valid, in_range = head_targets(
        target_ptr, target_stride_b, target_stride, targets, b, t, head, vocab_size,
        ignore_index, H,
    )  # fmt: skip
    if tl.max(valid.to(tl.int32), axis=0) > 0:
        begin = lead + b * stride_b + t * stride_s
        begin += head_offset(first, stride_h, offset_ptr, H, LISTED)
        if split == 0:
            l_target = tl.load(logits_ptr + begin + target, mask=valid & in_range, other=0.0)
            tl.store(l_target_ptr + token * H + head, l_target.to(tl.float32), mask=head < H)
        column, columns = part_of_row(split, vocab_size, SPLITS, ITEMSIZE)
        m, s, total, weighted, peak, argmax = row_statistics(
            logits_ptr, begin + column, columns, numbers, FORM, BLOCK, EVICT
        )
        part_ptr = partial_ptr + (row * SPLITS + split) * COUNT
        tl.store(part_ptr, m)
        tl.store(part_ptr + 1, s)
        if SMOOTHED & FORM:
            tl.store(part_ptr + 2, total)
        if MEASURED & FORM:
            tl.store(part_ptr + 3, weighted)
            tl.store(part_ptr + 4, peak)
            argmax = tl.where(argmax == NOWHERE, argmax, argmax + column)
            tl.store(part_ptr + 5, argmax.to(tl.float32, bitcast=True))


@triton.jit
def whole_of_parts(partial_ptr, row, read, FORM: tl.constexpr, COUNT: tl.constexpr,
                   SPLITS: tl.constexpr):  # fmt: skip
    """(m, s, total, weighted, first) of rows [HEADS] from their parts; m 0 and s 1 where they were
    not read."""
    part_ptr = partial_ptr + (row[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]) * COUNT
    read_part = read[:, None]
    part_m = tl.load(part_ptr, mask=read_part, other=0.0)
    part_s = tl.load(part_ptr + 1, mask=read_part, other=1.0)
    m = tl.max(part_m, axis=1)
    total, weighted, first = m, part_s, row.to(tl.int32)
    if SMOOTHED & FORM:
        total = tl.sum(tl.load(part_ptr + 2, mask=read_part, other=0.0), axis=1)
    if MEASURED & FORM:
        weighted = tl.load(part_ptr + 3, mask=read_part, other=0.0)
        peak = tl.load(part_ptr + 4, mask=read_part, other=0.0)
        argmax = tl.load(part_ptr + 5, mask=read_part, other=0.0).to(tl.int32, bitcast=True)
        largest = peak == tl.max(peak, axis=1)[:, None]
        first = tl.min(tl.where(largest, argmax, NOWHERE), axis=1)
    s, weighted = joined(part_m, part_s, weighted, m, 1, FORM)
    return m, tl.where(read, s, 1.0), total, weighted, first
