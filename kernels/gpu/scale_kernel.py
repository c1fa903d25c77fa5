"""A gradient times what came from above, which is mostly 1: then nothing is read or written.

The factor is looked at on the device, so that no step waits for it.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def scale_kernel(grad_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, step):
            offset = start + tl.arange(0, BLOCK)
            inside = offset < count
            grad = tl.load(grad_ptr + offset, mask=inside)
            product = (grad.to(tl.float32) * factor).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + offset, product, mask=inside)


def multiply_(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """grad *= factor [] float32, on the device of both; returns grad."""
    if not grad.is_contiguous():  # rows with gaps: in place in a larger tensor
        return grad.mul_(factor)
    block = 4096
    programs = min(triton.cdiv(grad.numel(), block), 4096)
    if programs:
        with torch.cuda.device_of(grad):
            scale_kernel[(programs,)](grad, factor, grad.numel(), BLOCK=block, num_warps=8)
    return grad
