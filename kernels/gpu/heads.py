"""What the loss kernels share: the targets of a token's heads, and their weights.

A program holds some heads of one token (b, t): head k's target stands at t target_stride + k of the
row b, valid when that is one of the row's `targets` and is not ignore_index. The stride is 1, or H
where each head has its own.
"""

import triton
import triton.language as tl

from wmtp.kernels.rows import rounded_product


@triton.jit
def position(token, seq_len):
    """(b, t) of a token. The division is in int32: in int64 it is a call, around which
    registers spill."""
    token = token.to(tl.int32)
    return (token // seq_len).to(tl.int64), (token % seq_len).to(tl.int64)


@triton.jit
def head_targets(target_ptr, target_stride_b, target_stride, targets, b, t, head, vocab_size,
                 ignore_index, H: tl.constexpr):  # fmt: skip
    """(target, valid, in_range), each of head's shape; target is int32, and -1 out of range."""
    place = t * target_stride + head
    inside = (head < H) & (place < targets)
    target = tl.load(target_ptr + b * target_stride_b + place, mask=inside, other=0)
    valid = inside & (target != ignore_index)
    in_range = (target >= 0) & (target < vocab_size)
    return tl.where(in_range, target, -1).to(tl.int32), valid, in_range


@triton.jit
def settle_heads(
    ce, m, log_s, head, valid, in_range, token, b, t, ref_ce_ptr, ref_stride_b, ref_stride,
    entropy, numbers_ptr, weight_ptr, factors_ptr, row_scalar_ptr, ce_ptr, row_max_ptr, log_sum_ptr,
    H: tl.constexpr, RULE: tl.constexpr, OTHER: tl.constexpr, OTHER_NUMBERS: tl.constexpr,
    COMPARES: tl.constexpr, MULTIPLIED: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """Finds the rule's weights, stores what is known of the heads, and returns what their rows'
    gradient is times, [HEADS]: 0 where a head has no weight, whatever its logits. Of a split row
    every part finds the same; the first stores it."""
    ce = tl.where(valid, ce, 0.0)
    head_ptr = token * H + head
    is_first = tl.program_id(1) == 0
    mine = tl.where(is_first, head < H, False)
    if RULE is not None:
        ref_ce = ce
        if COMPARES:
            ref_ce = tl.load(ref_ce_ptr + b * ref_stride_b + t * ref_stride + head, mask=valid)
        row_scalar = RULE(ce, valid, ref_ce, entropy, numbers_ptr)
        if OTHER is not None:
            factor = OTHER(ce, valid, ref_ce, entropy, numbers_ptr + OTHER_NUMBERS)
            row_scalar = weight_times(row_scalar, factor)
        if MULTIPLIED:
            factor = tl.load(weight_ptr + head_ptr, mask=valid, other=0.0)
            row_scalar = weight_times(row_scalar, factor)
        tl.store(row_scalar_ptr + head_ptr, row_scalar, mask=mine)
    else:
        row_scalar = tl.load(row_scalar_ptr + head_ptr, mask=head < H, other=0.0)
    tl.store(ce_ptr + head_ptr, ce, mask=mine)
    tl.store(row_max_ptr + head_ptr, tl.where(valid, m, 0.0), mask=mine)
    tl.store(log_sum_ptr + head_ptr, tl.where(valid, log_s, 0.0), mask=mine)
    scale = gradient_scale(factors_ptr, head, H, BY_HEAD)
    c = tl.where(in_range, rounded_product(row_scalar, scale), float("nan"))
    return tl.where(valid & (row_scalar != 0), c, 0.0)


@triton.jit
def weight_times(weight, factor):
    """0 where one is, whatever the other."""
    both = (weight != 0) & (factor != 0)
    return tl.where(both, rounded_product(weight, factor), 0.0)


@triton.jit
def gradient_scale(factors_ptr, head, H: tl.constexpr, BY_HEAD: tl.constexpr):
    """What a row scalar is times in the gradient: of all, or of each head."""
    if BY_HEAD:
        scale = tl.load(factors_ptr + 4 + head, mask=head < H, other=0.0)
    else:
        scale = tl.load(factors_ptr + 2)
    return scale


@triton.jit
def with_weight(row_scalar_ptr, factors_ptr, token, head, valid, c, H: tl.constexpr,
                RULE: tl.constexpr, SUMS_TO_ONE: tl.constexpr, BY_HEAD: tl.constexpr):  # fmt: skip
    """Which heads' c is not 0. Known weights are asked in memory: to ask c itself takes registers,
    and rows that are held in them would spill.

    Where a weight of those that sum to 1 is 0 its token's cross entropies are finite, so that its
    row times 0 is 0.
    """
    if SUMS_TO_ONE and not BY_HEAD:
        return valid
    if RULE is not None:
        return valid & (c != 0)
    row_scalar = tl.load(row_scalar_ptr + token * H + head, mask=valid, other=0.0)
    scale = gradient_scale(factors_ptr, head, H, BY_HEAD)
    return valid & (rounded_product(row_scalar, scale) != 0)


@triton.jit
def head_offset(row, stride_h, offset_ptr, H: tl.constexpr, LISTED: tl.constexpr):
    """Where the row of a head begins, from the lowest: heads that are listed say so."""
    if LISTED:
        return tl.load(offset_ptr + tl.minimum(row, H - 1))
    return row * stride_h


@triton.jit
def of_head(values, head, k):
    """The element of values [HEADS] that belongs to head k."""
    return tl.sum(tl.where(head == k, values, tl.zeros_like(values)), axis=0)


@triton.jit
def of_agreeing(target, values):
    """For each head the sum of the values [HEADS] of those that have the same target."""
    same = target[:, None] == target[None, :]
    return tl.sum(tl.where(same, values[None, :], 0.0), axis=1)
