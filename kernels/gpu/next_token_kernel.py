"""Cross entropy of the next token, for a reference model: one program a position, one read.

    ref_ce[b,t] = logsumexp(logits[b,t,:]) - logits[b,t,target_ids[b,t+1]],  t < S - 1

0, and the logits not read, where the target is ignore_index. All arithmetic is float32.
"""

import torch
import triton
import triton.language as tl

from wmtp.kernels.heads import position
from wmtp.kernels.rows import (
    ONE_BINARY,
    OPTIONS,
    aligned_base,
    cross_entropy,
    launch_shape,
    row_max_sum,
    warp_size,
)


@triton.jit(**ONE_BINARY)
def next_token_ce_kernel(
    logits_ptr,  # 128-byte aligned, `lead` elements before logits[0, 0, 0]
    target_ptr,  # [B, S] int64, unshifted
    ref_ce_ptr,  # [B, S-1]
    lead,
    stride_b: tl.int64,
    stride_s: tl.int64,
    seq_len,
    vocab_size,
    ignore_index,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)  # of the reference cross entropy
    b, t = position(index, seq_len - 1)
    target = tl.load(target_ptr + index + b + 1)
    in_range = (target >= 0) & (target < vocab_size)
    ce = 0.0
    if target != ignore_index:
        begin = lead + b * stride_b + t * stride_s
        x_target = tl.load(logits_ptr + begin + target, mask=in_range).to(tl.float32)
        m, s = row_max_sum(logits_ptr, begin, vocab_size, BLOCK, "evict_first")
        ce, _log_s = cross_entropy(m, s, x_target, in_range)
    tl.store(ref_ce_ptr + index, ce)


def next_token_ce(
    logits: torch.Tensor, target_ids: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """Launch: one program a position. Arguments are taken as checked; see the op that calls this.

    Args:
        logits: [B, S, V] float32, bfloat16 or float16, last stride 1, other strides any.
        target_ids: [B, S] int64 contiguous, unshifted. Outside [0, V): that position's ce is NaN.

    Returns:
        ref_ce: [B, S-1] float32.
    """
    batch, seq_len, vocab_size = logits.shape
    ref_ce = logits.new_empty((batch, max(seq_len - 1, 0)), dtype=torch.float32)
    if ref_ce.numel():
        block, num_warps = launch_shape(vocab_size, logits.element_size(), warp_size(logits.device))
        base, lead = aligned_base(logits)
        with torch.cuda.device_of(logits):
            next_token_ce_kernel[(ref_ce.numel(),)](
                base,
                target_ids,
                ref_ce,
                lead,
                *logits.stride()[:2],
                seq_len,
                vocab_size,
                ignore_index,
                BLOCK=block,
                num_warps=num_warps,
                **OPTIONS,
            )
    return ref_ce
