"""What every loss kernel here shares: the targets of a token's heads, and weights from their
excess.

A program holds some heads of one token (b, t): head k's target is target_ids[b, t + k + 1], valid
when that position exists and is not ignore_index.
"""

import triton
import triton.language as tl


@triton.jit
def head_targets(target_ptr, token, t, head, seq_len, vocab_size, ignore_index, H: tl.constexpr):
    """(target, valid, in_range), each of head's shape; target is 0 where no position follows."""
    ahead = (head < H) & (t + head + 1 < seq_len)
    target = tl.load(target_ptr + token + head + 1, mask=ahead, other=0)
    valid = ahead & (target != ignore_index)
    return target, valid, (target >= 0) & (target < vocab_size)


@triton.jit
def excess_weights(ce, ref_ce, valid, temperature, SIGNED: tl.constexpr):
    """w = softmax over valid heads of excess / temperature; all 0 where none is valid."""
    excess = (ce - ref_ce) if SIGNED else tl.abs(ce - ref_ce)
    score = tl.where(valid, excess / temperature, float("-inf"))
    w = tl.where(valid, tl.exp(score - tl.max(score, axis=0)), 0.0)
    return w / tl.where(tl.max(valid.to(tl.int32), axis=0) > 0, tl.sum(w, axis=0), 1.0)


@triton.jit
def head_offset(row, stride_h, offset_ptr, H: tl.constexpr, LISTED: tl.constexpr):
    """Where the row of a head begins, from the first's: heads of memory of their own have a
    list."""
    if LISTED:
        return tl.load(offset_ptr + tl.minimum(row, H - 1))
    return row * stride_h


@triton.jit
def of_head(values, head, k):
    """The element of values [HEADS] that belongs to head k."""
    return tl.sum(tl.where(head == k, values, tl.zeros_like(values)), axis=0)
