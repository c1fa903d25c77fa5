"""One pass over a row in memory: what is known of it afterwards, read once.

    m         max x                          total     sum x                    as FORM wants it,
    s         sum e^(x - m)                  weighted  sum e^(x - m) (x - m)    else of no meaning
    first     the first column of the largest logit

x is what numerics.py makes of the logits l. While it runs there is a state for every VECTOR columns
of a step, which one thread has, so that nothing crosses threads until the row ends:
(m, s, total, weighted, the largest l, the first column of the VECTOR where that was found).
"""

import triton
import triton.language as tl

from wmtp.kernels.numerics import MEASURED, MOST_NEGATIVE, SMOOTHED, point, weighed
from wmtp.kernels.rows import (
    UNIT_BYTES,
    VECTOR_BYTES,
    edge_columns,
    exp,
    finite_or_zero,
    first_unit,
    inner_part,
    rounded_product,
)

NOWHERE = tl.constexpr(2**31 - 1)  # behind every column


@triton.jit
def fold(state, logit, column, inside, numbers, FORM: tl.constexpr, MASKED: tl.constexpr,
         VECTOR: tl.constexpr):  # fmt: skip
    """One step of the online log-sum-exp (Milakov & Gimelshein 2018).

    state: [BLOCK / VECTOR] each;  l: [BLOCK] float32, of `column` [BLOCK / VECTOR] and the next.
    NaN: maxima drop it, exp(NaN - m) carries it into s.
    """
    m, s, total, weighted, peak, place = state
    STATES: tl.constexpr = logit.shape[0] // VECTOR
    x, _ = point(logit, numbers, FORM)
    if MASKED:
        x = tl.where(inside, x, float("-inf"))
    x = tl.reshape(x, (STATES, VECTOR))
    new_m = tl.maximum(m, tl.max(x, axis=1))
    shift = finite_or_zero(new_m)
    rescale = exp(m - shift)
    e = exp(x - shift[:, None])
    if MEASURED & FORM:
        moved = weighted + weighed(s, m - shift)
        below = tl.maximum(x - shift[:, None], MOST_NEGATIVE)  # one thread's: see `weighed`
        weighted = moved * rescale + tl.sum(e * below, axis=1)
        if MASKED:
            logit = tl.where(inside, logit, float("-inf"))
        top = tl.max(tl.reshape(logit, (STATES, VECTOR)), axis=1)
        place = tl.where((top > peak) | ((top == peak) & (column < place)), column, place)
        peak = tl.maximum(peak, top)
    if SMOOTHED & FORM:
        if MASKED:
            x = tl.where(tl.reshape(inside, (STATES, VECTOR)), x, 0.0)
        total += tl.sum(x, axis=1)
    s = s * rescale + tl.sum(e, axis=1)
    return new_m, s, total, weighted, peak, place


@triton.jit
def row_statistics(base_ptr, begin, vocab_size, numbers, FORM: tl.constexpr, BLOCK: tl.constexpr,
                   EVICT: tl.constexpr):  # fmt: skip
    """(m, s, total, weighted, the largest logit, first) of the row at base_ptr + begin.

    s is NaN if the row holds NaN; m = -inf, s = 0 for a row of -inf; m = s = inf with a +inf.
    EVICT: "evict_last" when the row is read again soon, else "evict_first".
    """
    ITEMSIZE: tl.constexpr = base_ptr.dtype.element_ty.primitive_bitwidth // 8
    UNIT: tl.constexpr = UNIT_BYTES // ITEMSIZE
    VECTOR: tl.constexpr = VECTOR_BYTES // ITEMSIZE
    peel, inner = inner_part(begin, vocab_size, UNIT)

    # The edges are the first values of the running state, so they cost no reduction of their own.
    lane = tl.arange(0, BLOCK // VECTOR)
    column = edge_columns(lane, peel, inner, UNIT)
    inside = (lane < 2 * UNIT) & (column >= 0) & (column < vocab_size)
    edge = tl.load(base_ptr + begin + column, mask=inside).to(tl.float32)
    x, _ = point(edge, numbers, FORM)
    m = tl.where(inside, x, float("-inf"))
    s = tl.where(inside, exp(x - finite_or_zero(x)), 0.0)
    total, weighted, peak, place = m, m, m, lane
    if SMOOTHED & FORM:
        total = tl.where(inside, x, 0.0)
    if MEASURED & FORM:
        weighted = tl.zeros_like(m)
        peak = tl.where(inside, edge, float("-inf"))
        place = tl.where(inside, column, NOWHERE)
    state = (m, s, total, weighted, peak, place)

    inner_ptr = base_ptr + first_unit(begin, UNIT)
    offset = tl.arange(0, BLOCK)
    full = inner // BLOCK * BLOCK
    column = peel + lane * VECTOR
    for start in range(0, full, BLOCK):
        logit = tl.load(inner_ptr + start + offset, eviction_policy=EVICT).to(tl.float32)
        state = fold(state, logit, column + start, offset, numbers, FORM, False, VECTOR)
    if full < inner:
        rest = offset < inner - full  # both multiples of UNIT: a vector is in or out as a whole
        logit = tl.load(inner_ptr + full + offset, mask=rest, eviction_policy=EVICT).to(tl.float32)
        state = fold(state, logit, column + full, rest, numbers, FORM, True, VECTOR)
    return whole_of(state, base_ptr + begin, vocab_size, FORM, VECTOR)


@triton.jit
def whole_of(state, row_ptr, vocab_size, FORM: tl.constexpr, VECTOR: tl.constexpr):
    """A row's statistics from its states."""
    m, s, total, weighted, peak, place = state
    row_m = tl.max(m, axis=0)
    row_s, row_weighted = joined(m, s, weighted, row_m, 0, FORM)
    row_total, row_peak, first = row_s, row_m, 0
    if SMOOTHED & FORM:
        row_total = tl.sum(total, axis=0)
    if MEASURED & FORM:
        row_peak = tl.max(peak, axis=0)
        place = tl.min(tl.where(peak == row_peak, place, NOWHERE), axis=0)
        one = tl.zeros((1,), tl.int32)
        first = first_of_vectors(row_ptr + one, place + one, row_peak + one, vocab_size, VECTOR)
        first = tl.min(first, axis=0)
    return row_m, row_s, row_total, row_weighted, row_peak, first


@triton.jit
def joined(m, s, weighted, whole_m, AXIS: tl.constexpr, FORM: tl.constexpr):
    """(s, weighted) of what has m, s and weighted along AXIS, from the maximum of all."""
    shift = finite_or_zero(whole_m)
    if AXIS == 1:
        shift = shift[:, None]
    factor = exp(m - shift)
    whole_s = tl.sum(rounded_product(s, factor), axis=AXIS)
    whole_weighted = whole_s
    if MEASURED & FORM:
        moved = weighted + weighed(s, m - shift)
        whole_weighted = tl.sum(rounded_product(factor, moved), axis=AXIS)
    return whole_s, whole_weighted


@triton.jit
def first_of_vectors(row_ptr, place, peak, vocab_size, VECTOR: tl.constexpr):
    """[N]: of rows [N] the first column, from `place` on, whose logit is the row's largest, where
    that is one of VECTOR columns. These 16 bytes are read once more, instead of a column being kept
    for every logit."""
    column = tl.minimum(place, vocab_size)[:, None] + tl.arange(0, VECTOR)[None, :]
    inside = column < vocab_size
    logit = tl.load(row_ptr[:, None] + column, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.min(tl.where(inside & (logit == peak[:, None]), column, NOWHERE), axis=1)
