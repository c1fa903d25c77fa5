"""How a strided tensor lies in memory."""

from torch import Tensor


def heads_share_storage(logits: Tensor) -> bool:
    """One row of logits per token, seen H times: `logits[:, :, None].expand(-1, -1, H, -1)`."""
    return logits.shape[2] > 1 and logits.stride(2) == 0


def rows_overlap(logits: Tensor) -> bool:
    """Whether two elements share memory; heads of stride 0 are one row by design."""
    rows = logits[:, :, :1] if heads_share_storage(logits) else logits
    end = 1
    for stride, size in sorted(zip(rows.stride(), rows.shape, strict=True)):
        if size > 1:
            if stride < end:
                return True
            end += stride * (size - 1)
    return False


def extent(logits: Tensor) -> tuple[int, int]:
    """The bytes between its first element and its last, as addresses."""
    steps = zip(logits.shape, logits.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in steps)
    return logits.data_ptr(), logits.data_ptr() + elements * logits.element_size()
