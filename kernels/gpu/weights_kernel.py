"""What is known of the loss before the first logit is read: weights, and what divides their sum.

    w[b,t,k]    = 1  |  head_weights[b,t,k]                          0 where (t, k) is not valid
    row_scalar  = w / sum_k w  (token_mean; 0 where w is, or the sum is <= 1e-8), else w
    denominator = normalizer  |  number of tokens with sum_k w > 1e-8  |  sum w  |  1
                  1 where nothing weighs, so that an empty batch has loss 0

Weights that follow from the cross entropies are not known yet. Either they sum to 1 on every token
that has a target, or nothing is divided by them; finish_kernel adds them up. BY_HEAD what a head
adds to the loss is times its head_scale. One program
goes over all tokens, in a fixed order: that is 20 bytes for each row, beside its V logits. All
arithmetic is float32: where the denominator, or its inverse, would leave its range, the weights are
stored in another unit, a power of two.
"""

import triton
import triton.language as tl

from wmtp.kernels.heads import head_targets, position
from wmtp.kernels.rows import ONE_BINARY, rounded_product

ONES, GIVEN, LATER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SUM, TOKEN_MEAN, WEIGHT_MEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
REDUCTIONS = {"sum": SUM, "token_mean": TOKEN_MEAN, "weight_mean": WEIGHT_MEAN}


def tokens_a_step(heads: int) -> int:
    return max(2048 // triton.next_power_of_2(heads), 1)


@triton.jit(**ONE_BINARY)
def weights_kernel(
    target_ptr,  # int64, see heads.py
    weight_ptr,  # [B, S, H] head_weights, or unused
    head_scale_ptr,  # [H], or unused
    normalizer_ptr,  # [], or unused
    row_scalar_ptr,  # [B, S, H], and the next two: written unless LATER
    weight_sum_ptr,  # [B, S]
    valid_mask_ptr,  # [B, S] bool
    factors_ptr,  # [4]: 1 / denominator; what the gradient still needs, and what it has had;
    # what row_scalar still needs. BY_HEAD [4 + H], what it has had of each head
    tokens,
    target_stride_b: tl.int64,
    target_stride: tl.int64,
    targets,
    seq_len,
    vocab_size,
    ignore_index,
    has_normalizer,  # no constexpr, nor the next: one binary serves all cases
    largest_gradient,  # float16, of row_scalar 1: it is written times a power of two; else 0
    heads_share,  # 1 / H where one gradient row stands for H heads, else 1
    H: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BY_HEAD: tl.constexpr,
    REDUCTION: tl.constexpr,
    TOKENS: tl.constexpr,
):
    OF_ANY_SIZE: tl.constexpr = (WEIGHTS == GIVEN) & (REDUCTION != TOKEN_MEAN)
    HEADS: tl.constexpr = triton.next_power_of_2(H)
    head = tl.arange(0, HEADS)[None, :]
    counted = tl.zeros((TOKENS,), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    largest = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)  # [TOKENS]
        real = token < tokens
        b, t = position(token, seq_len)
        # Past the last token there is no head, so nothing is valid.
        _, valid, _ = head_targets(
            target_ptr, target_stride_b, target_stride, targets, b[:, None], t[:, None],
            tl.where(real[:, None], head, H), vocab_size, ignore_index, H,
        )  # fmt: skip
        token = token.to(tl.int64)
        row = token[:, None] * H + head
        w = tl.where(valid, 1.0, 0.0)  # [TOKENS, HEADS]
        if WEIGHTS == GIVEN:
            w = tl.where(valid, tl.load(weight_ptr + row, mask=valid, other=0.0), 0.0)
        weight_sum = tl.max(w, axis=1) if WEIGHTS == LATER else tl.sum(tl.abs(w), axis=1)
        counts = real & has_weight(weight_sum)
        counted += tl.where(counts, 1.0, 0.0)
        total += weight_sum
        # Not the largest w: of a maximum over the heads LLVM's vectorizer dies (Triton 3.8, 3.9).
        largest = tl.maximum(largest, weight_sum)
        if WEIGHTS != LATER:
            if REDUCTION == TOKEN_MEAN:
                part = w * (1 / HEADS)  # their sum is finite
                shares = part / tl.sum(part, axis=1)[:, None]
                w = tl.where(counts[:, None] & (w != 0.0), shares, 0.0)
            tl.store(row_scalar_ptr + row, w, mask=real[:, None] & (head < H))
            tl.store(weight_sum_ptr + token, weight_sum, mask=real)
            tl.store(valid_mask_ptr + token, counts, mask=real)

    weighs = tl.sum(counted if REDUCTION == TOKEN_MEAN else total, axis=0)
    denominator = weighs
    if REDUCTION == SUM:
        denominator = 1.0
    if has_normalizer:
        denominator = tl.load(normalizer_ptr)
    denominator = tl.where(weighs == 0, 1.0, denominator)
    unit = 1.0
    bound = 1.0  # of row_scalar
    if OF_ANY_SIZE:
        unit = unit_of(tl.abs(denominator))
        bound = tl.max(largest, axis=0)
        denominator *= unit
        if unit != 1.0:
            weighs, bound = times_unit(row_scalar_ptr, unit, tokens, H, TOKENS)
            if REDUCTION == WEIGHT_MEAN:
                denominator = tl.where(has_normalizer == 0, weighs, denominator)
    inverse = 1.0 / denominator
    head_scale = tl.full(head.shape, 1.0, tl.float32)
    if BY_HEAD:
        head_scale = tl.load(head_scale_ptr + head, mask=head < H, other=0.0)
        bound *= tl.max(tl.max(head_scale, axis=1), axis=0)
    scale = inverse
    remaining = 1.0
    if largest_gradient != 0:
        scale = fp16_scale(bound * largest_gradient)
        remaining = inverse / scale
    tl.store(factors_ptr, inverse * unit)
    tl.store(factors_ptr + 1, remaining)
    tl.store(factors_ptr + 2, scale * heads_share)
    tl.store(factors_ptr + 3, inverse)
    if BY_HEAD:
        tl.store(factors_ptr + 4 + head, scale * heads_share * head_scale, mask=head < H)


@triton.jit
def has_weight(weight_sum):
    return (weight_sum > 1e-8) | (weight_sum != weight_sum)  # a NaN surfaces


@triton.jit
def unit_of(size):
    """1, or the power of two in which a denominator of this size has an inverse, and a sum that
    has overflowed is finite."""
    return tl.where(size < 2.0**-100, 2.0**100, tl.where(size > 2.0**100, 2.0**-64, 1.0))


@triton.jit
def times_unit(row_scalar_ptr, unit, tokens, H: tl.constexpr, TOKENS: tl.constexpr):
    """Stores the weights again, times unit: their sum, and the largest of a token's sums."""
    tl.debug_barrier()  # other threads have stored them
    head = tl.arange(0, triton.next_power_of_2(H))[None, :]
    total = tl.zeros((TOKENS,), tl.float32)
    largest = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS).to(tl.int64)
        row, real = token[:, None] * H + head, (token[:, None] < tokens) & (head < H)
        w = tl.load(row_scalar_ptr + row, mask=real, other=0.0) * unit
        tl.store(row_scalar_ptr + row, w, mask=real)
        total += tl.sum(w, axis=1)
        largest = tl.maximum(largest, tl.sum(tl.abs(w), axis=1))
    return tl.sum(total, axis=0), tl.max(largest, axis=0)


@triton.jit
def fp16_scale(bound):
    """The power of two that puts the largest possible gradient entry at 2^15 at most.

    1 / denominator would carry most of a float16 gradient below the smallest number before it
    meets the loss scale in backward.
    """
    bound = tl.maximum(bound, 1e-30)
    exponent = (bound.to(tl.int32, bitcast=True) >> 23) - 127
    return ((14 - exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(**ONE_BINARY)
def finish_kernel(
    row_loss_ptr,  # [B, S, H] ce, or f of numerics.py
    row_scalar_ptr,  # [B, S, H] d token_loss / d f; becomes d loss / d f
    head_scale_ptr,  # [H], or unused
    factors_ptr,
    weight_sum_ptr,  # [B, S], and the next: written with LATER
    valid_mask_ptr,  # [B, S] bool
    token_loss_ptr,  # [B, S]
    loss_ptr,  # []
    tokens,
    H: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BY_HEAD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.arange(0, triton.next_power_of_2(H))[None, :]
    inverse = tl.load(factors_ptr + 3)
    losses = tl.zeros((TOKENS,), tl.float32)
    divided = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS).to(tl.int64)
        row, real = token[:, None] * H + head, (token[:, None] < tokens) & (head < H)
        row_loss = tl.load(row_loss_ptr + row, mask=real, other=0.0)
        row_scalar = tl.load(row_scalar_ptr + row, mask=real, other=0.0)
        if WEIGHTS == LATER:
            weight_sum = tl.sum(row_scalar, axis=1)
            tl.store(weight_sum_ptr + token, weight_sum, mask=token < tokens)
            tl.store(valid_mask_ptr + token, has_weight(weight_sum), mask=token < tokens)
        if BY_HEAD:
            head_scale = tl.load(head_scale_ptr + head, mask=head < H, other=0.0)
            row_scalar = rounded_product(row_scalar, head_scale)
        token_loss = tl.sum(rounded_product(row_scalar, row_loss), axis=1)
        losses += token_loss
        tl.store(token_loss_ptr + token, token_loss, mask=token < tokens)
        row_scalar = rounded_product(row_scalar, inverse)
        divided += tl.sum(rounded_product(row_scalar, row_loss), axis=1)
        tl.store(row_scalar_ptr + row, row_scalar, mask=real)
    # Undivided the sum may be out of float32's range, divided it loses what is below it.
    total = tl.sum(losses, axis=0)
    loss = tl.where(tl.abs(total) == float("inf"), tl.sum(divided, axis=0), total * inverse)
    tl.store(loss_ptr, loss)
