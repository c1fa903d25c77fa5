"""Cross entropies of the rows of a product that nobody else has seen: they may be overwritten.

    ce[r]     = logsumexp(logits[r,:]) - logits[r,target]
    logits[r] = scale (softmax(logits[r,:]) - onehot(target))                  unless scale is None

Rows are tokens of one head to the loss's kernels: one read and one write in the register tiers.
"""

import torch

from wmtp.kernels.launch import Case, launch

NO_ID = -1  # ignore_index where no target is to be ignored


def rows_ce_(logits: torch.Tensor, target_ids: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Launch. Arguments are taken as checked.

    Args:
        logits: [R, V] float32, bfloat16 or float16, last stride 1.
        target_ids: [1 + R] int64 contiguous: the first is not looked at, target_ids[1 + r] is row
            r's. Outside [0, V): that row's ce and gradient are NaN.
        scale: > 0.

    Returns:
        [R] float32, nats.
    """
    rows = logits[None, :, None]
    ce, lse, ones = (logits.new_ones(len(logits), dtype=torch.float32) for _ in range(3))
    factors = logits.new_full((3,), scale or 1.0, dtype=torch.float32)
    case = Case(
        rows=rows,
        heads=1,
        grad=None if scale is None else rows,
        target_ids=target_ids[None],
        pointers=(target_ids, factors, ones, ones, target_ids, ce, lse),
        ignore_index=NO_ID,
        temperature=1.0,
        excess=False,
        signed=False,
        head_offsets=None,
    )
    with torch.cuda.device_of(logits):
        launch(case)
    return ce
