"""Rows alone, as a chunk of the linear op has them, or a reference model: no weights, no loss.

    rows_ce_       ce[r]       = logsumexp(x[r,:]) - x[r,target]
                   logits[r]   = row_scalar[r] (softmax(x[r,:]) - onehot(target))   if wanted
    next_token_ce  ref_ce[b,t] = logsumexp(x[b,t,:]) - x[b,t,target_ids[b,t]]

x are the logits, or what numerics.py makes of them and of the gradient. Rows are tokens of one head
to the loss's kernels: one read, and one write in the register tiers.
"""

from dataclasses import replace

import torch
from torch import Tensor

from wmtp.kernels.launch import Case, OfHeads, Rule, launch
from wmtp.records import Outputs, RowOutputs, RowSettings, new_outputs, rows_of

NO_ID = -1  # ignore_index where no target is to be ignored


def rows_ce_(
    logits: Tensor, target_ids: Tensor, row_scalar: Tensor | None, settings: RowSettings
) -> RowOutputs:
    """Launch. A target outside [0, V): that row's ce and gradient are NaN."""
    rows = logits[None, :, None]
    grad = None if row_scalar is None else rows
    settings = replace(settings, ignore_index=NO_ID)
    return rows_of(_of_rows(rows, target_ids[None], row_scalar, grad, settings))


def next_token_ce(logits: Tensor, target_ids: Tensor, settings: RowSettings) -> Tensor:
    """Launch. A target outside [0, V): that position's ce is NaN."""
    rows = logits[:, :, None, : settings.vocab_size]
    if not rows.numel():
        return logits.new_zeros(logits.shape[:2], dtype=torch.float32)
    return _of_rows(rows, target_ids, None, None, settings).ce[:, :, 0]


def _of_rows(
    rows: Tensor,
    target_ids: Tensor,
    row_scalar: Tensor | None,
    grad: Tensor | None,
    settings: RowSettings,
) -> Outputs:
    """Of rows [B, S, 1, V], of which all are launched; no loss is made of them."""
    out = new_outputs(rows, 1, settings)
    ones = rows.new_ones(max(out.ce.numel(), 4), dtype=torch.float32)
    terms, measured = settings.numerics.adds_terms, settings.metrics
    of_heads = OfHeads(
        ref_ce_ptr=ones,
        weight_ptr=ones,
        numbers_ptr=ones,
        factors_ptr=ones,
        row_scalar_ptr=ones if row_scalar is None else row_scalar,
        offset_ptr=ones,
        ce_ptr=out.ce,
        row_max_ptr=out.row_max,
        log_sum_ptr=out.log_sum,
        row_loss_ptr=out.row_loss if terms else ones,
        entropy_ptr=out.entropy if measured else ones,
        correct_ptr=out.correct if measured else ones,
    )
    with torch.cuda.device_of(rows):
        launch(Case(rows, target_ids, 1, grad, of_heads, settings, Rule()))
    return out


def new_rows(count: int, weight: Tensor) -> Tensor:
    return weight.new_empty((count, len(weight)))
