"""Cross entropies, weights and loss of each token: one program a token, one read of its logits.

    ce[b,t,k]  = logsumexp(logits[b,t,k,:]) - logits[b,t,k,target_ids[b,t+k+1]]
    w[b,t,k]   = 1  |  head_weights[b,t,k]  |  softmax over valid k of e / temperature,
                 e = |ce[b,t,k] - ref_ce[b,t+k]|, signed: without the bars
    row_scalar = w / sum_k w  (normalize; 0 where the sum is <= 1e-8), else w
    token_loss = sum_k row_scalar ce

(t, k) is valid when t + k + 1 < S and the target is not ignore_index; elsewhere all of it is 0 and
the logits are not read. All arithmetic is float32.
"""

import torch
import triton
import triton.language as tl

from wmtp.kernels.rows import aligned_base, cross_entropy, launch_shape, row_max_sum, warp_size

UNIFORM = tl.constexpr(0)
GIVEN = tl.constexpr(1)
EXCESS = tl.constexpr(2)


@triton.jit(do_not_specialize=["lead", "stride_b", "stride_s", "stride_h", "seq_len", "vocab_size",
                               "ignore_index"])  # fmt: skip
def token_loss_kernel(
    logits_ptr,  # 128-byte aligned, `lead` elements before logits[0, 0, 0, 0]
    target_ptr,  # [B, S] int64, unshifted
    weight_ptr,  # [B, S, H] head_weights, [B, S-1] ref_ce, or unused
    token_loss_ptr,  # [B, S]
    row_scalar_ptr,  # [B, S, H]
    weight_sum_ptr,  # [B, S]
    ce_ptr,  # [B, S, H]
    lse_ptr,  # [B, S, H]
    lead,
    stride_b,
    stride_s,
    stride_h,
    seq_len,
    vocab_size,
    ignore_index,
    temperature,
    H: tl.constexpr,
    SHARED_HEADS: tl.constexpr,  # one row of logits serves all heads
    WEIGHTING: tl.constexpr,
    SIGNED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    b = token // seq_len
    t = token % seq_len
    head = tl.arange(0, triton.next_power_of_2(H))
    ahead = (head < H) & (t + head + 1 < seq_len)
    target = tl.load(target_ptr + token + head + 1, mask=ahead, other=0)
    valid = ahead & (target != ignore_index)
    in_range = (target >= 0) & (target < vocab_size)

    begin = lead + b * stride_b + t * stride_s
    m = tl.zeros(head.shape, tl.float32)
    s = m + 1.0
    for row in range(1 if SHARED_HEADS else H):
        of_row = valid & (SHARED_HEADS | (head == row))
        if tl.max(of_row.to(tl.int32), axis=0) > 0:
            row_m, row_s = row_max_sum(
                logits_ptr, begin + row * stride_h.to(tl.int64), vocab_size, BLOCK
            )
            m = tl.where(of_row, row_m, m)
            s = tl.where(of_row, row_s, s)

    target_logit_ptr = logits_ptr + begin + head.to(tl.int64) * stride_h + target
    x_target = tl.load(target_logit_ptr, mask=valid & in_range).to(tl.float32)
    ce, lse = cross_entropy(m, s, x_target, in_range)
    ce = tl.where(valid, ce, 0.0)
    lse = tl.where(valid, lse, 0.0)

    if WEIGHTING == UNIFORM:
        w = tl.where(valid, 1.0, 0.0)
    elif WEIGHTING == GIVEN:
        w = tl.where(valid, tl.load(weight_ptr + token * H + head, mask=valid), 0.0)
    else:
        ref_ce = tl.load(weight_ptr + b * (seq_len - 1) + t + head, mask=valid)
        excess = (ce - ref_ce) if SIGNED else tl.abs(ce - ref_ce)
        score = tl.where(valid, excess / temperature, float("-inf"))
        w = tl.where(valid, tl.exp(score - tl.max(score, axis=0)), 0.0)
        w = w / tl.where(tl.max(valid.to(tl.int32), axis=0) > 0, tl.sum(w, axis=0), 1.0)
    weight_sum = tl.sum(w, axis=0)
    row_scalar = w
    if NORMALIZE:  # a NaN sum is not <= 1e-8, and surfaces
        row_scalar = w / tl.where(weight_sum <= 1e-8, float("inf"), weight_sum)

    real = head < H
    tl.store(row_scalar_ptr + token * H + head, row_scalar, mask=real)
    tl.store(ce_ptr + token * H + head, ce, mask=real)
    tl.store(lse_ptr + token * H + head, lse, mask=real)
    tl.store(weight_sum_ptr + token, weight_sum)
    tl.store(token_loss_ptr + token, tl.sum(row_scalar * ce, axis=0))


def token_loss(
    logits: torch.Tensor,
    target_ids: torch.Tensor,
    head_weights: torch.Tensor | None,
    ref_ce: torch.Tensor | None,
    temperature: float,
    signed: bool,
    normalize: bool,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch: one program a token. Arguments are taken as checked; see the op that calls this.

    Args:
        logits: [B, S, H, V] float32, bfloat16 or float16, last stride 1, other strides any;
            stride 0 along the heads reads the one row once.
        target_ids: [B, S] int64 contiguous, unshifted. Outside [0, V): that row's ce is NaN.
        head_weights: [B, S, H] float32 contiguous, or None.
        ref_ce: [B, S-1] float32 contiguous, or None; never both.

    Returns:
        token_loss [B, S], row_scalar [B, S, H], weight_sum [B, S], ce and lse [B, S, H]: float32.
    """
    batch, seq_len, heads, vocab_size = logits.shape
    tokens = [logits.new_empty((batch, seq_len), dtype=torch.float32) for _ in range(2)]
    rows = [logits.new_empty((batch, seq_len, heads), dtype=torch.float32) for _ in range(3)]
    (token_losses, weight_sum), (row_scalar, ce, lse) = tokens, rows
    if logits.numel():
        weighting, weights = UNIFORM, target_ids
        if head_weights is not None:
            weighting, weights = GIVEN, head_weights
        elif ref_ce is not None:
            weighting, weights = EXCESS, ref_ce
        block, num_warps = launch_shape(vocab_size, logits.element_size(), warp_size(logits.device))
        base, lead = aligned_base(logits)
        with torch.cuda.device_of(logits):
            token_loss_kernel[(batch * seq_len,)](
                base,
                target_ids,
                weights,
                token_losses,
                row_scalar,
                weight_sum,
                ce,
                lse,
                lead,
                *logits.stride()[:3],
                seq_len,
                vocab_size,
                ignore_index,
                temperature,
                H=heads,
                SHARED_HEADS=heads > 1 and logits.stride(2) == 0,
                WEIGHTING=weighting,
                SIGNED=signed,
                NORMALIZE=normalize,
                BLOCK=block,
                num_warps=num_warps,
            )
    return token_losses, row_scalar, weight_sum, ce, lse
