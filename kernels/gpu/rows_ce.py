"""Cross entropies of the rows of a product that nobody else has seen: they may be overwritten.

    ce[r]     = logsumexp(logits[r,:]) - logits[r,target]
    logits[r] = row_scalar[r] (softmax(logits[r,:]) - onehot(target))              if there is one

Rows are tokens of one head to the loss's kernels: one read and one write in the register tiers.
"""

import torch

from wmtp.kernels.launch import Case, launch

NO_ID = -1  # ignore_index where no target is to be ignored


def rows_ce_(
    logits: torch.Tensor, target_ids: torch.Tensor, row_scalar: torch.Tensor | None
) -> torch.Tensor:
    """Launch. Arguments are taken as checked.

    Args:
        logits: [R, V] float32, bfloat16 or float16, last stride 1.
        target_ids: [1 + R] int64 contiguous: the first is not looked at, target_ids[1 + r] is row
            r's. Outside [0, V): that row's ce and gradient are NaN.
        row_scalar: [R] float32 contiguous, of any sign, or None: the logits stay.

    Returns:
        [R] float32, nats.
    """
    rows = logits[None, :, None]
    outputs = tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))
    ones = logits.new_ones(max(len(logits), 3), dtype=torch.float32)
    scalars = ones if row_scalar is None else row_scalar
    case = Case(
        rows=rows,
        heads=1,
        grad=None if row_scalar is None else rows,
        target_ids=target_ids[None],
        pointers=(ones, ones, ones, scalars, ones, ones, *outputs),
        ignore_index=NO_ID,
        excess=False,
        signed=False,
        head_offsets=None,
    )
    with torch.cuda.device_of(logits):
        launch(case)
    return outputs[0]


def new_rows(count: int, weight: torch.Tensor) -> torch.Tensor:
    """[count, V] of weight's dtype, for a chunk's logits."""
    return weight.new_empty((count, len(weight)))
