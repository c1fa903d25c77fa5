"""Loss and gradient from one read and one write of the logits: the rows stay in registers between.

A program holds the rows [ROWS, V] of a token, or one of them, and the heads they serve:

    tier    ROWS       heads      weights                    programs a token
    token   H          H          of any rule                1
    row     1          1          known, or of its own ce    H
    either  1          H          (shared heads)             1

    ce[b,t,k]          = logsumexp(x[b,t,k,:]) - x[b,t,k,target]     x: the logits, or numerics.py's
    row_scalar         = RULE(ce of the token's heads, or of the row), or as weights_kernel.py has
                         found it
    grad[b,t,k,v]      = scale row_scalar (softmax(x[b,t,k,:])[v] - [v == target]), or numerics.py's

A row without a valid target is not read; its gradient is 0, and so is that of a row without weight.
All arithmetic is float32.
"""

import triton
import triton.language as tl

from wmtp.kernels.heads import (
    head_offset,
    head_targets,
    of_agreeing,
    position,
    settle_heads,
    with_weight,
)
from wmtp.kernels.numerics import (
    MEASURED,
    entropy_of,
    exponentials,
    level_of,
    of_kept,
    of_target,
    point,
    row_scalars,
    settle_measures,
    steep,
)
from wmtp.kernels.rows import (
    ONE_BINARY,
    UNIT_BYTES,
    VECTOR_BYTES,
    cross_entropy,
    edge_columns,
    exp,
    first_unit,
    inner_part,
)
from wmtp.kernels.statistics import NOWHERE, first_of_vectors

LARGEST = tl.constexpr(3.4028234663852886e38)  # float32


@triton.jit(**ONE_BINARY)
def register_kernel(
    logits_ptr,  # 128-byte aligned, `lead` elements before logits[0, 0, 0, 0]
    target_ptr,  # int64, see heads.py
    ref_ce_ptr,  # like target_ptr, or unused
    numbers_ptr,  # the rule's, or unused
    weight_ptr,  # [B, S, H], multiplies the rule's weights, or unused
    factors_ptr,  # [4], the third is the gradient's scale; BY_HEAD [4 + H], the last are
    row_scalar_ptr,  # [B, S, H]; read where the weights are known, else written
    offset_ptr,  # [H] int64, where the heads begin, or unused
    ce_ptr,  # [B, S, H]
    row_max_ptr,  # [B, S, H]
    log_sum_ptr,  # [B, S, H]
    row_loss_ptr,  # [B, S, H], and the next two: see numerics.py, or unused
    entropy_ptr,  # [B, S, H]
    correct_ptr,  # [B, S, H] bool
    grad_ptr,  # aligned like the logits; in place: logits_ptr itself
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
    ref_stride_b: tl.int64,
    ref_stride: tl.int64,
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
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    PROGRAMS: tl.constexpr,  # a token
    LISTED: tl.constexpr,  # heads of memory of their own: offset_ptr instead of stride_h,
    GRAD_LISTED: tl.constexpr,  # and the gradient, in place, too
    RULE: tl.constexpr,  # see Weighting.device, or None: the weights are known
    OTHER: tl.constexpr,  # a product's second rule, or None; its numbers begin at
    OTHER_NUMBERS: tl.constexpr,
    COMPARES: tl.constexpr,  # with ref_ce
    MULTIPLIED: tl.constexpr,  # the rule's weights by others
    BY_HEAD: tl.constexpr,  # the gradient has a scale for each head
    SUMS_TO_ONE: tl.constexpr,  # over a token's valid heads
    IN_PHASE: tl.constexpr,  # every row starts as far from a 128-byte boundary as its gradient
    FORM: tl.constexpr,  # of numerics.py
    BLOCK: tl.constexpr,  # >= V
):
    SHARED: tl.constexpr = HEADS != ROWS
    numbers = (slope, offset, amplitude, center, z_loss, label_smoothing)
    UNIT: tl.constexpr = UNIT_BYTES // (grad_ptr.dtype.element_ty.primitive_bitwidth // 8)
    token = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    first = tl.program_id(0) % PROGRAMS
    b, t = position(token, seq_len)
    head = first + tl.arange(0, HEADS)  # [HEADS]
    target, valid, in_range = head_targets(
        target_ptr, target_stride_b, target_stride, targets, b, t, head, vocab_size,
        ignore_index, H,
    )  # fmt: skip
    row = first + tl.arange(0, ROWS).to(tl.int64)  # [ROWS]
    real = (row < H)[:, None]  # [ROWS, 1]
    read = valid
    if SHARED:
        read = tl.max(read.to(tl.int32), axis=0) + tl.zeros((ROWS,), tl.int32) > 0
    begin = lead + b * stride_b + t * stride_s
    begin += head_offset(row, stride_h, offset_ptr, H, LISTED)  # [ROWS]
    grad_begin = grad_lead + b * grad_stride_b + t * grad_stride_s
    grad_begin += head_offset(row, grad_stride_h, offset_ptr, H, GRAD_LISTED)
    peel, inner = inner_part(grad_begin, vocab_size, UNIT)  # [ROWS]

    # In place, another thread of this program will overwrite it: see the barrier below.
    l_target = tl.load(logits_ptr + begin + target, mask=valid & in_range, other=0.0).to(tl.float32)
    lane = tl.arange(0, 2 * UNIT)[None, :]
    column = edge_columns(lane, peel[:, None], inner[:, None], UNIT)
    edge_inside = (column >= 0) & (column < vocab_size)
    edge_ptr = logits_ptr + begin[:, None] + column
    edge = tl.load(edge_ptr, mask=edge_inside & read[:, None], other=float("-inf"))
    edge = edge.to(tl.float32)  # [ROWS, 2 UNIT]
    inner_lane = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    inner_inside = inner_lane < inner[:, None]
    inner_begin = first_unit(begin, UNIT) if IN_PHASE else begin + peel
    inner_ptr = logits_ptr + inner_begin[:, None] + inner_lane
    x = tl.load(inner_ptr, mask=inner_inside & read[:, None], other=float("-inf"))
    x = x.to(tl.float32)  # [ROWS, BLOCK]

    peak = tl.maximum(tl.max(x, axis=1), tl.max(edge, axis=1))  # [ROWS]
    argmax = row
    if MEASURED & FORM:
        argmax = first_largest(
            x, edge, column, edge_inside, read, peak, peel, logits_ptr, begin, vocab_size
        )
    m, _ = point(peak, numbers, FORM)
    # Finite, so that -inf gives 0 and +inf gives inf, beside which all others are 0.
    shift = tl.where(m == float("-inf"), 0.0, tl.minimum(m, LARGEST))
    x, slopes, s, total, weighted = exponentials(
        x, inner_inside & read[:, None], shift, numbers, FORM
    )
    edge, edge_slopes, edge_s, edge_total, edge_weighted = exponentials(
        edge, edge_inside & read[:, None], shift, numbers, FORM
    )
    s, total, weighted = s + edge_s, total + edge_total, weighted + edge_weighted  # [ROWS]
    head_m, head_s = m, s
    if SHARED:
        all_heads = tl.zeros((HEADS,), tl.float32)
        head_m, head_s = m + all_heads, s + all_heads
        total, weighted, argmax = total + all_heads, weighted + all_heads, argmax + head * 0
    x_target, slope_target = point(l_target, numbers, FORM)
    ce, log_s = cross_entropy(head_m, head_s, x_target, in_range)
    entropy = entropy_of(head_m, head_s, log_s, weighted, FORM)
    c = settle_heads(
        ce, head_m, log_s, head, valid, in_range, token, b, t, ref_ce_ptr, ref_stride_b,
        ref_stride, entropy, numbers_ptr, weight_ptr, factors_ptr, row_scalar_ptr, ce_ptr,
        row_max_ptr, log_sum_ptr, H, RULE, OTHER, OTHER_NUMBERS, COMPARES, MULTIPLIED, BY_HEAD,
    )  # fmt: skip
    settle_measures(
        ce, head_m, log_s, total, entropy, argmax, target, valid, vocab_size,
        token, head, row_loss_ptr, entropy_ptr, correct_ptr, numbers, H, FORM,
    )  # fmt: skip
    # All threads have read before one writes. A row of several warps has passed barriers by then,
    # for its maximum and its sum; one that a single warp holds has not.
    tl.debug_barrier()
    target = tl.where(valid, target, -1)
    a, b = row_scalars(c, head_m + log_s, numbers, FORM)
    row_a, row_c = a, c
    live = with_weight(row_scalar_ptr, factors_ptr, token, head, valid, c, H, RULE,
                       SUMS_TO_ONE, BY_HEAD)  # fmt: skip
    if SHARED:
        live = tl.max(live.to(tl.int32), axis=0) + tl.zeros((ROWS,), tl.int32) > 0
        row_a = tl.sum(a, axis=0) + tl.zeros((ROWS,), tl.float32)
        row_c = tl.sum(c, axis=0) + tl.zeros((ROWS,), tl.float32)
    scale = steep(row_a / s, numbers, FORM)  # [ROWS]
    level = level_of(row_c, vocab_size, numbers, FORM)
    g = of_kept(edge, edge_slopes, scale[:, None], level[:, None], FORM)
    g = tl.where(live[:, None], g, 0.0).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + grad_begin[:, None] + column, g, mask=edge_inside & real)
    grad_ptr_inner = grad_ptr + first_unit(grad_begin, UNIT)[:, None] + inner_lane
    g_inner = of_kept(x, slopes, scale[:, None], level[:, None], FORM)
    g_inner = tl.where(live[:, None], g_inner, 0.0).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr_inner, g_inner, mask=inner_inside & real)
    if SHARED:
        b = of_agreeing(target, b)
    e_target = exp(x_target - shift)
    entry = of_target(e_target, slope_target, scale, level, b, FORM)  # [HEADS]
    tl.debug_barrier()  # another thread has stored there
    written = (target >= 0) & live
    tl.store(grad_ptr + grad_begin + target, entry.to(grad_ptr.dtype.element_ty), mask=written)


@triton.jit
def first_largest(
    inner, edge, column, edge_inside, read, peak, peel, logits_ptr, begin, vocab_size
):  # fmt: skip
    """[ROWS]: the first column of each row's largest logit, `peak`, where the row was read.

    inner: [ROWS, BLOCK], from the column `peel` on;  edge: [ROWS, 2 UNIT] at `column`.
    """
    VECTOR: tl.constexpr = VECTOR_BYTES // (logits_ptr.dtype.element_ty.primitive_bitwidth // 8)
    VECTORS: tl.constexpr = inner.shape[1] // VECTOR
    top = tl.max(tl.reshape(inner, (inner.shape[0], VECTORS, VECTOR)), axis=2)
    place = peel[:, None] + tl.arange(0, VECTORS)[None, :] * VECTOR
    place = tl.min(tl.where(top == peak[:, None], place, NOWHERE), axis=1)
    is_first = edge_inside & (edge == peak[:, None])
    place = tl.minimum(place, tl.min(tl.where(is_first, column, NOWHERE), axis=1))
    place = tl.where(read, place, NOWHERE)
    return first_of_vectors(logits_ptr + begin, place, peak, vocab_size, VECTOR)
