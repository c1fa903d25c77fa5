"""Loss, and gradient if wanted, of rows that do not fit the registers: two reads and one write.

    ce[b,t,k]          = logsumexp(x[b,t,k,:]) - x[b,t,k,target]     x: the logits, or numerics.py's
    row_scalar         = RULE(ce of the token's heads, or of the row), or as weights_kernel.py has
                         found it
    grad[b,t,k,v]      = scale row_scalar (softmax(x[b,t,k,:])[v] - [v == target]), or numerics.py's

A program goes over a row twice; where a rule needs all heads it goes over all rows of a token, and
then over them again. Where rows are too few to occupy the device each is split: partial_kernel.py
makes the first pass, and a program of this one the second over its part. The second read comes from
the L2 where (programs in flight) x (their bytes) fit it: what the first pass reads is marked to
stay, what the second reads to go. Without a gradient there is no second pass.
A row without a valid target is not read; its gradient is 0, and so is that of a row without weight.
All arithmetic is float32.
"""

import triton
import triton.language as tl

from wmtp.kernels.gradient_kernel import write_gradient
from wmtp.kernels.heads import (
    head_offset,
    head_targets,
    of_agreeing,
    of_head,
    position,
    settle_heads,
)
from wmtp.kernels.numerics import (
    MEASURED,
    SMOOTHED,
    entropy_of,
    level_of,
    of_target,
    point,
    row_scalars,
    settle_measures,
    steep,
)
from wmtp.kernels.partial_kernel import part_of_row, whole_of_parts
from wmtp.kernels.rows import ONE_BINARY, cross_entropy, exp
from wmtp.kernels.statistics import row_statistics


@triton.jit(**ONE_BINARY)
def online_kernel(
    logits_ptr,  # 128-byte aligned, `lead` elements before logits[0, 0, 0, 0]
    target_ptr,  # int64, see heads.py
    ref_ce_ptr,  # like target_ptr, or unused
    numbers_ptr,  # the rule's, or unused
    weight_ptr,  # [B, S, H], multiplies the rule's weights, or unused
    factors_ptr,  # [4], the third is the gradient's scale; BY_HEAD [4 + H], the last are
    row_scalar_ptr,  # [B, S, H]; read where the weights are known, else written
    offset_ptr,  # [H] int64, where the heads begin, or unused
    partial_ptr,  # [rows, SPLITS, COUNT] and
    l_target_ptr,  # [B, S, H], from partial_kernel.py; unused with SPLITS 1
    ce_ptr,  # [B, S, H]
    row_max_ptr,  # [B, S, H]
    log_sum_ptr,  # [B, S, H]
    row_loss_ptr,  # [B, S, H], and the next two: see numerics.py, or unused
    entropy_ptr,  # [B, S, H]
    correct_ptr,  # [B, S, H] bool
    grad_ptr,  # aligned like the logits; in place: logits_ptr itself; unused without GRAD
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
    ROWS: tl.constexpr,  # a program's: 1, or the token's
    HEADS: tl.constexpr,  # that they serve, a power of two
    PROGRAMS: tl.constexpr,  # a token
    SHARED: tl.constexpr,
    LISTED: tl.constexpr,  # heads of memory of their own: offset_ptr instead of stride_h,
    GRAD_LISTED: tl.constexpr,  # and the gradient, in place, too
    RULE: tl.constexpr,  # see Weighting.device, or None: the weights are known
    OTHER: tl.constexpr,  # a product's second rule, or None; its numbers begin at
    OTHER_NUMBERS: tl.constexpr,
    COMPARES: tl.constexpr,  # with ref_ce
    MULTIPLIED: tl.constexpr,  # the rule's weights by others
    BY_HEAD: tl.constexpr,  # the gradient has a scale for each head
    GRAD: tl.constexpr,
    IN_PHASE: tl.constexpr,
    FORM: tl.constexpr,  # of numerics.py
    COUNT: tl.constexpr,  # of a part's statistics
    SPLITS: tl.constexpr,  # of a row, a program for each; partial_kernel has read them
    BLOCK: tl.constexpr,
):
    numbers = (slope, offset, amplitude, center, z_loss, label_smoothing)
    ITEMSIZE: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth // 8
    EVICT: tl.constexpr = "evict_last" if GRAD else "evict_first"
    token = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    first = tl.program_id(0) % PROGRAMS
    b, t = position(token, seq_len)
    head = first + tl.arange(0, HEADS)  # [HEADS]
    target, valid, in_range = head_targets(
        target_ptr, target_stride_b, target_stride, targets, b, t, head, vocab_size,
        ignore_index, H,
    )  # fmt: skip
    begin = lead + b * stride_b + t * stride_s
    grad_begin = grad_lead + b * grad_stride_b + t * grad_stride_s

    if SPLITS > 1:
        rows = token + tl.zeros((HEADS,), tl.int64) if SHARED else token * H + head
        read = valid  # a shared row was read if any head has a target
        if SHARED:
            read = tl.max(valid.to(tl.int32), axis=0) + tl.zeros((HEADS,), tl.int32) > 0
        m, s, total, weighted, argmax = whole_of_parts(partial_ptr, rows, read, FORM, COUNT, SPLITS)
        l_target = tl.load(l_target_ptr + token * H + head, mask=valid, other=0.0)
    else:
        # First of all: in place, another thread of this program will overwrite it.
        head_begin = begin + head_offset(head.to(tl.int64), stride_h, offset_ptr, H, LISTED)
        target_logit_ptr = logits_ptr + head_begin + target
        l_target = tl.load(target_logit_ptr, mask=valid & in_range, other=0.0).to(tl.float32)
        m = tl.zeros((HEADS,), tl.float32)  # [HEADS], and the next
        s, total, weighted, argmax = m + 1.0, m, m, head * 0
        for row in range(first, first + ROWS):
            of_row = SHARED | (head == row)
            if tl.max((valid & of_row).to(tl.int32), axis=0) > 0:
                index = first.to(tl.int64) + (row - first)
                row_begin = begin + head_offset(index, stride_h, offset_ptr, H, LISTED)
                row_m, row_s, row_total, row_weighted, _, row_argmax = row_statistics(
                    logits_ptr, row_begin, vocab_size, numbers, FORM, BLOCK, EVICT
                )
                m = tl.where(of_row, row_m, m)
                s = tl.where(of_row, row_s, s)
                if SMOOTHED & FORM:
                    total = tl.where(of_row, row_total, total)
                if MEASURED & FORM:
                    weighted = tl.where(of_row, row_weighted, weighted)
                    argmax = tl.where(of_row, row_argmax, argmax)
    x_target, slope_target = point(l_target, numbers, FORM)
    ce, log_s = cross_entropy(m, s, x_target, in_range)

    entropy = entropy_of(m, s, log_s, weighted, FORM)
    c = settle_heads(
        ce, m, log_s, head, valid, in_range, token, b, t, ref_ce_ptr, ref_stride_b,
        ref_stride, entropy, numbers_ptr, weight_ptr, factors_ptr, row_scalar_ptr, ce_ptr,
        row_max_ptr, log_sum_ptr, H, RULE, OTHER, OTHER_NUMBERS, COMPARES, MULTIPLIED, BY_HEAD,
    )  # fmt: skip

    settle_measures(
        ce, m, log_s, total, entropy, argmax, target, valid, vocab_size, token, head,
        row_loss_ptr, entropy_ptr, correct_ptr, numbers, H, FORM,
    )  # fmt: skip

    if GRAD:
        a, b = row_scalars(c, m + log_s, numbers, FORM)
        column, columns = part_of_row(tl.program_id(1), vocab_size, SPLITS, ITEMSIZE)
        target = tl.where(valid & in_range, target - column, -1)
        for row in range(first, first + ROWS):
            of_row = SHARED | (head == row)
            row_target, row_c = tl.where(of_row, target, -1), tl.where(of_row, c, 0.0)
            row_a, row_b = tl.where(of_row, a, 0.0), tl.where(of_row, b, 0.0)
            live = tl.max((row_c != 0).to(tl.int32), axis=0) > 0
            row_m = of_head(m, head, row)
            scale = steep(tl.sum(row_a, axis=0) / of_head(s, head, row), numbers, FORM)  # []
            level = level_of(tl.sum(row_c, axis=0), vocab_size, numbers, FORM)
            onehot, e_target = of_agreeing(row_target, row_b), exp(x_target - row_m)
            entry = of_target(e_target, slope_target, scale, level, onehot, FORM)
            index = first.to(tl.int64) + (row - first)
            row_begin = begin + head_offset(index, stride_h, offset_ptr, H, LISTED)
            row_grad = grad_begin + head_offset(index, grad_stride_h, offset_ptr, H, GRAD_LISTED)
            write_gradient(
                logits_ptr, row_begin + column, grad_ptr, row_grad + column, columns, live,
                row_m, scale, level, row_target, entry, numbers, FORM, IN_PHASE, BLOCK,
            )  # fmt: skip
