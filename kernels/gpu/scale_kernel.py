"""Multiplies a gradient by the upstream gradient, which is mostly 1: then it moves no byte.

The kernel reads the factor on the device, so that no step waits for it. There are as many programs
as the device holds at once, not one a row, because mostly they have nothing to do. Each program
walks over blocks of rows; a contiguous gradient is one row.
"""

import torch
import triton
import triton.language as tl

from wmtp.kernels import tiers
from wmtp.kernels.rows import (
    ONE_BINARY,
    OPTIONS,
    UNIT_BYTES,
    aligned_base,
    edge_columns,
    first_unit,
    inner_part,
)

BLOCK_BYTES = 8192  # two 16-byte accesses of each of 256 threads
PROGRAMS_A_PROCESSOR = 4


@triton.jit(**ONE_BINARY)
def scale_kernel(
    grad_ptr,  # 128-byte aligned, `lead` elements before grad[0, 0, 0, 0]
    factor_ptr,  # [] float32
    lead,
    stride_b: tl.int64,
    stride_s: tl.int64,
    stride_h: tl.int64,
    seq_len,
    heads,
    vocab_size: tl.int64,  # or all of a contiguous gradient
    blocks: tl.int64,  # of all rows
    BLOCK: tl.constexpr,
):
    UNIT: tl.constexpr = UNIT_BYTES // (grad_ptr.dtype.element_ty.primitive_bitwidth // 8)
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        blocks_a_row = tl.cdiv(vocab_size, BLOCK)
        lane = tl.arange(0, 2 * UNIT)
        offset = tl.arange(0, BLOCK)
        for block in range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
            row = block // blocks_a_row
            start = block % blocks_a_row * BLOCK
            token = row // heads
            begin = lead + token // seq_len * stride_b + token % seq_len * stride_s
            begin += row % heads * stride_h
            peel, inner = inner_part(begin, vocab_size, UNIT)
            if start == 0:
                column = edge_columns(lane, peel, inner, UNIT)
                inside = (column >= 0) & (column < vocab_size)
                times(grad_ptr + begin + column, factor, inside, True)
            rest = offset < inner - start  # both multiples of UNIT: a vector is in or out
            times(grad_ptr + first_unit(begin, UNIT) + start + offset, factor, rest, False)


@triton.jit
def times(ptr, factor, mask, EDGES: tl.constexpr):
    """Times 0 even NaN and inf are 0: a loss that nobody wants leaves no gradient."""
    value = tl.load(ptr, mask=mask).to(tl.float32) * factor
    if EDGES:
        tl.debug_barrier()  # a lane of theirs is several threads', and all have read
    value = tl.where(factor == 0, 0.0, value)
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


def multiply_(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """grad *= factor, in float32 whatever grad's dtype; returns grad.

    Args:
        grad: [B, S, H, V] or a head's [B, S, V], last stride 1, other strides any.
        factor: [] float32, on the same device.
    """
    if not grad.numel():
        return grad
    rows = grad.unsqueeze(2) if grad.dim() == 3 else grad
    if grad.is_contiguous():
        rows = grad.view(1, 1, 1, -1)
    batch, seq_len, heads, vocab_size = rows.shape
    block = BLOCK_BYTES // grad.element_size()
    blocks = batch * seq_len * heads * triton.cdiv(vocab_size, block)
    programs = PROGRAMS_A_PROCESSOR * tiers.machine(grad.device).processors
    base, lead = aligned_base(rows)
    with torch.cuda.device_of(grad):
        scale_kernel[(min(blocks, programs),)](
            base, factor, lead, *rows.stride()[:3], seq_len, heads, vocab_size, blocks,
            BLOCK=block, num_warps=8, **OPTIONS,
        )  # fmt: skip
    return grad
