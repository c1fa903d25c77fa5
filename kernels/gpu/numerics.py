"""What logits are to the softmax, and what a loss averages: the device's side of wmtp/numerics.py.

    x        = l | slope l | center + amplitude tanh(slope l + offset)              of a logit l
    f        = ce | (1 - eps) ce + eps (max - mean x + log_sum) + z (max + log_sum)^2
    df/dl_v  = ((1 + 2 z lse) p_v - (1 - eps) [v == target] - eps / V) dx/dl_v,     p = softmax(x)

and, measured beside, the entropy log_sum - sum p (x - max), and whether the target is the first of
the largest l: x rises with l.

FORM is a constexpr, a sum of the options below: a binary has what its loss has, and of plain logits
it is the one that it would be without this file. `numbers` are the six of `Numerics`, in order.
"""

from typing import Any

import triton
import triton.language as tl

from wmtp.kernels.rows import LOG2_E, exp, rounded_product
from wmtp.numerics import Numerics

SCALED, CAPPED = tl.constexpr(1), tl.constexpr(2)
SMOOTHED, SQUARED = tl.constexpr(4), tl.constexpr(8)  # label_smoothing, z_loss
MEASURED = tl.constexpr(16)  # entropy and correct are wanted
MOST_NEGATIVE = tl.constexpr(-1e30)  # beside which e^x is 0, and 0 times it too


def form_of(numerics: Numerics, metrics: bool = False) -> int:
    """FORM."""
    options = {
        SCALED: not numerics.capped and numerics.slope != 1,
        CAPPED: numerics.capped,
        SMOOTHED: numerics.label_smoothing != 0,
        SQUARED: numerics.z_loss != 0,
        MEASURED: metrics,
    }
    return sum(option.value for option, wanted in options.items() if wanted)


def is_plain(form: int) -> bool:
    """Whether rows in registers take no more of them than those of plain logits."""
    return form & ~SCALED.value == 0


def is_capped(form: int) -> bool:
    return form & CAPPED.value != 0


def tiles_of(form: int) -> int:
    """How many times as many registers rows take there. A tanh has three numbers of each logit at
    once; smoothed, its slope is kept apart from the exponential."""
    if not is_capped(form):
        return 1
    return 4 if form & SMOOTHED.value and form & MEASURED.value else 2


def arguments(numerics: Numerics, metrics: bool = False) -> dict[str, Any]:
    """The kernels', of these names."""
    return {**numerics._asdict(), "FORM": form_of(numerics, metrics)}


@triton.jit
def capped(logit, numbers):
    """(x, (1 - tanh^2) / 4) of logits l.

    With E = e^(-2 |u|) and r = 1 / (1 + E): tanh |u| = (1 - E) r, and 1 - tanh^2 = 4 E r^2, which
    keeps its digits where tanh is all but 1. A reciprocal of a square root takes one instruction,
    a division six.
    """
    u = tl.fma(logit, numbers[0] * (2 * LOG2_E), numbers[1] * (2 * LOG2_E))
    e = tl.exp2(-tl.abs(u))
    r = tl.rsqrt((1.0 + e) * (1.0 + e))
    t = (1.0 - e) * r
    sign = u.to(tl.int32, bitcast=True) & -2147483648
    t = (t.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.fma(t, numbers[2], numbers[3]), e * r * r


@triton.jit
def point(logit, numbers, FORM: tl.constexpr):
    """(x, what dx/dl is times `steep` 1) of logits l; the second is of no meaning without a cap."""
    if CAPPED & FORM:
        return capped(logit, numbers)
    if SCALED & FORM:
        x = tl.fma(logit, numbers[0], 0.0)  # rounded here: fused into x - max it would not be
        return x, x
    return logit, logit


@triton.jit
def steep(value, numbers, FORM: tl.constexpr):
    """Times what all dx/dl have in common."""
    if CAPPED & FORM:
        return value * (4 * numbers[0] * numbers[2])
    if SCALED & FORM:
        return value * numbers[0]
    return value


@triton.jit
def kept(e, slope, FORM: tl.constexpr):
    """What is to be held of exponentials e, for `of_kept`."""
    if ((CAPPED | SMOOTHED) & FORM) == CAPPED:
        return e * slope
    return e


@triton.jit
def of_kept(e, slope, scale, level, FORM: tl.constexpr):
    """The gradient, but for the target's column: (scale e - level) dx/dl."""
    if SMOOTHED & FORM:
        g = scale * e - level
        if CAPPED & FORM:
            g = g * slope
        return g
    return scale * e


@triton.jit
def of_target(e, slope, scale, level, onehot, FORM: tl.constexpr):
    """The gradient at a target's column, whose exponential is e: where f is ce and p is 1 it is
    exactly 0, because `scale` is `onehot` over 1 then."""
    g = scale * e - onehot
    if SMOOTHED & FORM:
        g = g - level
    if CAPPED & FORM:
        g = g * slope
    return g


@triton.jit
def row_scalars(c, lse, numbers, FORM: tl.constexpr):
    """(a, b) of heads [HEADS]: the gradient of c f has a times the softmax, less b at the target.
    Both are 0 where c is, whatever the lse."""
    a, b = c, c
    if SQUARED & FORM:
        a = rounded_product(c, 1.0 + 2.0 * numbers[4] * lse)
    if SMOOTHED & FORM:
        b = c * (1.0 - numbers[5])
    return a, steep(b, numbers, FORM)


@triton.jit
def level_of(c, vocab_size, numbers, FORM: tl.constexpr):
    """What smoothing takes from every column of a row, c being the sum over its heads."""
    if SMOOTHED & FORM:
        return steep(c * (numbers[5] / vocab_size), numbers, FORM)
    return c


@triton.jit
def exponentials(logit, inside, shift, numbers, FORM: tl.constexpr):
    """Of rows that are held in registers, [ROWS, N], -inf where not `inside`:

    (kept, slope, sum of e = e^(x - shift), of x, of e (x - shift)); the last two as FORM wants.
    """
    x, slope = point(logit, numbers, FORM)
    if CAPPED & FORM:  # of -inf it is not -inf
        x = tl.where(inside, x, float("-inf"))
    total = shift
    if SMOOTHED & FORM:
        total = tl.sum(tl.where(inside, x, 0.0), axis=1)
    below = x - shift[:, None]
    e = exp(below)
    s = tl.sum(e, axis=1)
    weighted = s
    if MEASURED & FORM:
        weighted = tl.sum(weighed(e, below), axis=1)
    return kept(e, slope, FORM), slope, s, total, weighted


@triton.jit
def weighed(e, below):
    """e below, rounded (see `rounded_product`); 0 where e is, and below is -inf."""
    return tl.fma(e, tl.maximum(below, MOST_NEGATIVE), 0.0)


@triton.jit
def entropy_of(m, s, log_s, weighted, FORM: tl.constexpr):
    """Of the heads [HEADS]; something, where FORM does not measure it."""
    entropy = log_s
    if MEASURED & FORM:
        finite = tl.abs(m + log_s) < float("inf")
        entropy = tl.where(finite, log_s - weighted / s, float("nan"))
    return entropy


@triton.jit
def settle_measures(
    ce, m, log_s, total, entropy, first, target, valid, vocab_size, token, head,
    row_loss_ptr, entropy_ptr, correct_ptr, numbers, H: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Stores what FORM wants to be known of the heads [HEADS]; `first` is the first column of their
    row's largest logit. Of a split row the first part stores it."""
    lse = m + log_s
    place = token * H + head
    is_first = tl.program_id(1) == 0
    mine = tl.where(is_first, head < H, False)
    if (SMOOTHED | SQUARED) & FORM:
        f = ce
        if SMOOTHED & FORM:
            smooth = (m - total / vocab_size) + log_s
            f = (1.0 - numbers[5]) * ce + numbers[5] * smooth
        if SQUARED & FORM:
            f += numbers[4] * lse * lse
        tl.store(row_loss_ptr + place, tl.where(valid, f, 0.0), mask=mine)
    if MEASURED & FORM:
        tl.store(entropy_ptr + place, tl.where(valid, entropy, 0.0), mask=mine)
        tl.store(correct_ptr + place, valid & (lse == lse) & (target == first), mask=mine)
