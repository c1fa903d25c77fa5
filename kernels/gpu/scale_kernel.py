"""A gradient times what came from above, which is mostly 1: then nothing is read or written.

The factor is looked at on the device, so that no step waits for it.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride_b", "stride_s", "stride_h", "seq_len", "vocab_size"])
def scale_kernel(
    grad_ptr,  # [B, S, H, V], last stride 1
    factor_ptr,  # [] float32
    stride_b,
    stride_s,
    stride_h,
    seq_len,
    vocab_size,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        row = tl.program_id(0).to(tl.int64)
        token = row // H
        row_ptr = grad_ptr + token // seq_len * stride_b + token % seq_len * stride_s
        row_ptr += row % H * stride_h
        for start in range(0, vocab_size, BLOCK):
            offset = start + tl.arange(0, BLOCK)
            inside = offset < vocab_size
            grad = tl.load(row_ptr + offset, mask=inside).to(tl.float32)
            tl.store(row_ptr + offset, (grad * factor).to(grad_ptr.dtype.element_ty), mask=inside)


def multiply_(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """grad *= factor, in float32 whatever grad's dtype; returns grad.

    Args:
        grad: [B, S, H, V] or a head's [B, S, V], last stride 1, other strides any.
        factor: [] float32, on the same device.
    """
    rows = grad.unsqueeze(2) if grad.dim() == 3 else grad
    batch, seq_len, heads, vocab_size = rows.shape
    if rows.numel():
        with torch.cuda.device_of(grad):
            scale_kernel[(batch * seq_len * heads,)](
                rows, factor, *rows.stride()[:3], seq_len, vocab_size,
                H=heads, BLOCK=4096, num_warps=8,
            )  # fmt: skip
    return grad
