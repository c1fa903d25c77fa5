"""What is known of the loss before the first logit is read: weights, and what divides their sum.

    w[b,t,k]    = 1  |  head_weights[b,t,k]                          0 where (t, k) is not valid
    row_scalar  = w / sum_k w  (token_mean; 0 where the sum is <= 1e-8), else w
    denominator = normalizer  |  number of tokens with sum_k w > 1e-8  |  sum w  |  1

Excess weights are not known yet, but they sum to 1 on every token that has a target. One program
goes over all tokens, in a fixed order: that is 20 bytes for each row, beside its V logits. All
arithmetic is float32.
"""

import triton
import triton.language as tl

from wmtp.kernels.heads import head_targets
from wmtp.kernels.rows import ONE_BINARY, rounded_product

UNIFORM, GIVEN, EXCESS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SUM, TOKEN_MEAN, WEIGHT_MEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
REDUCTIONS = {"sum": SUM, "token_mean": TOKEN_MEAN, "weight_mean": WEIGHT_MEAN}


@triton.jit(**ONE_BINARY)
def weights_kernel(
    target_ptr,  # [B, S] int64, unshifted
    weight_ptr,  # [B, S, H] head_weights, or unused
    normalizer_ptr,  # [], or unused
    row_scalar_ptr,  # [B, S, H]; excess weights: not written
    weight_sum_ptr,  # [B, S]
    valid_mask_ptr,  # [B, S] bool
    factors_ptr,  # [3]: 1 / denominator; what the gradient still needs, and what it has had
    tokens,
    seq_len,
    vocab_size,
    ignore_index,
    heads_share,  # 1 / H where one gradient row stands for H heads, else 1
    H: tl.constexpr,
    WEIGHTING: tl.constexpr,
    REDUCTION: tl.constexpr,
    HAS_NORMALIZER: tl.constexpr,
    SCALED: tl.constexpr,  # float16: the gradient is written times a power of two instead
    TOKENS: tl.constexpr,
):
    head = tl.arange(0, triton.next_power_of_2(H))[None, :]
    counted = tl.zeros((TOKENS,), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    largest = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS).to(tl.int64)
        real = token < tokens
        # Past the last token there is no position, so nothing is valid.
        t = tl.where(real, token % seq_len, seq_len)[:, None]
        _, valid, _ = head_targets(
            target_ptr, token[:, None], t, head, seq_len, vocab_size, ignore_index, H
        )
        row = token[:, None] * H + head
        w = tl.where(valid, 1.0, 0.0)
        if WEIGHTING == GIVEN:
            w = tl.where(valid, tl.load(weight_ptr + row, mask=valid, other=0.0), 0.0)
        weight_sum = tl.max(w, axis=1) if WEIGHTING == EXCESS else tl.sum(w, axis=1)
        counts = real & ((weight_sum > 1e-8) | (weight_sum != weight_sum))  # a NaN surfaces
        counted += tl.where(counts, 1.0, 0.0)
        total += weight_sum
        largest = tl.maximum(largest, tl.max(w, axis=1))
        if WEIGHTING != EXCESS:
            if REDUCTION == TOKEN_MEAN:
                w = tl.where(counts[:, None], w / weight_sum[:, None], 0.0)
            tl.store(row_scalar_ptr + row, w, mask=real[:, None] & (head < H))
        tl.store(weight_sum_ptr + token, weight_sum, mask=real)
        tl.store(valid_mask_ptr + token, counts, mask=real)

    denominator = 1.0
    if HAS_NORMALIZER:
        denominator = tl.load(normalizer_ptr)
    elif REDUCTION == TOKEN_MEAN:
        denominator = tl.maximum(tl.sum(counted, axis=0), 1.0)
    elif REDUCTION == WEIGHT_MEAN:
        denominator = tl.sum(total, axis=0)
        denominator = tl.where(denominator == 0, 1.0, denominator)
    inverse = 1.0 / denominator
    scale = inverse
    if SCALED:
        bound = tl.full((), 1.0, tl.float32)
        if REDUCTION != TOKEN_MEAN:
            bound = tl.max(largest, axis=0)
        scale = fp16_scale(bound)
    tl.store(factors_ptr, inverse)
    tl.store(factors_ptr + 1, inverse / scale if SCALED else 1.0)
    tl.store(factors_ptr + 2, scale * heads_share)


@triton.jit
def fp16_scale(largest):
    """The power of two that puts the largest possible gradient entry at 2^14 .. 2^15.

    1 / denominator would carry most of a float16 gradient below the smallest number before it
    meets the loss scale in backward.
    """
    largest = tl.maximum(largest, 1e-30)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    return ((14 - exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(**ONE_BINARY)
def finish_kernel(
    ce_ptr,  # [B, S, H]
    row_scalar_ptr,  # [B, S, H] d token_loss / d ce; becomes d loss / d ce
    factors_ptr,
    token_loss_ptr,  # [B, S]
    loss_ptr,  # []
    tokens,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
):
    head = tl.arange(0, triton.next_power_of_2(H))[None, :]
    inverse = tl.load(factors_ptr)
    losses = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS).to(tl.int64)
        row, real = token[:, None] * H + head, (token[:, None] < tokens) & (head < H)
        ce = tl.load(ce_ptr + row, mask=real, other=0.0)
        row_scalar = tl.load(row_scalar_ptr + row, mask=real, other=0.0)
        token_loss = tl.sum(rounded_product(row_scalar, ce), axis=1)
        losses += token_loss
        tl.store(token_loss_ptr + token, token_loss, mask=token < tokens)
        tl.store(row_scalar_ptr + row, rounded_product(row_scalar, inverse), mask=real)
    tl.store(loss_ptr, tl.sum(losses, axis=0) * inverse)
