"""Cross entropies of rows alone: no weights, no loss.

    rows_ce_       ce[r]       = logsumexp(logits[r,:]) - logits[r,target]
                   logits[r]   = row_scalar[r] (softmax(logits[r,:]) - onehot(target))   if wanted
    next_token_ce  ref_ce[b,t] = logsumexp(logits[b,t,:]) - logits[b,t,target_ids[b,t]]

Rows are tokens of one head to the loss's kernels: one read, and one write in the register tiers.
"""

import torch
from torch import Tensor

from wmtp.kernels.launch import Case, OfHeads, Rule, launch
from wmtp.kernels.options import refuse_options
from wmtp.records import RowOutputs, RowSettings


def rows_ce_(
    logits: Tensor, target_ids: Tensor, row_scalar: Tensor | None, settings: RowSettings
) -> RowOutputs:
    """Launch. A target outside [0, V): that row's ce and gradient are NaN."""
    refuse_options(settings)
    rows = logits[None, :, None]
    grad = None if row_scalar is None else rows
    ce = _cross_entropy(rows, target_ids[None], row_scalar, grad, settings.ignore_index)
    return RowOutputs(ce.flatten(), *(ce.new_empty(0),) * 5)


def next_token_ce(logits: Tensor, target_ids: Tensor, settings: RowSettings) -> Tensor:
    """Launch. A target outside [0, V): that position's ce is NaN."""
    refuse_options(settings)
    rows = logits[:, :, None]
    if not rows.numel():
        return logits.new_zeros(logits.shape[:2], dtype=torch.float32)
    return _cross_entropy(rows, target_ids, None, None, settings.ignore_index)


def _cross_entropy(
    rows: Tensor,
    target_ids: Tensor,
    row_scalar: Tensor | None,
    grad: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """[B, S] of rows [B, S, 1, V]."""
    tokens = rows.shape[:2]
    ce, row_max, log_sum = (rows.new_empty(tokens, dtype=torch.float32) for _ in range(3))
    ones = rows.new_ones(max(ce.numel(), 4), dtype=torch.float32)
    of_heads = OfHeads(
        ref_ce_ptr=ones,
        weight_ptr=ones,
        numbers_ptr=ones,
        factors_ptr=ones,
        row_scalar_ptr=ones if row_scalar is None else row_scalar,
        offset_ptr=ones,
        ce_ptr=ce,
        row_max_ptr=row_max,
        log_sum_ptr=log_sum,
    )
    with torch.cuda.device_of(rows):
        launch(Case(rows, target_ids, 1, grad, of_heads, ignore_index, Rule()))
    return ce


def new_rows(count: int, weight: Tensor) -> Tensor:
    return weight.new_empty((count, len(weight)))
