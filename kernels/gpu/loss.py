"""The loss over a whole batch, and its gradient if wanted: no wait for the device.

weights_kernel (what is known before) - register_kernel or online_kernel (tiers.py chooses; one read
and one write of the logits where a tier of registers serves the case) - finish_kernel (the sum, in
a fixed order).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wmtp.kernels.launch import Case, OfHeads, Rule, launch
from wmtp.kernels.rows import targets
from wmtp.kernels.rules import device_function
from wmtp.kernels.tiers import machine, one_program
from wmtp.kernels.weights_kernel import (
    GIVEN,
    LATER,
    ONES,
    REDUCTIONS,
    finish_kernel,
    tokens_a_step,
    weights_kernel,
)
from wmtp.layout import as_rows, heads_share_storage
from wmtp.records import Inputs, Outputs, Settings, new_outputs
from wmtp.weightings.base import rule_of


def weighted_loss(inputs: Inputs, settings: Settings) -> Outputs:
    """Launch; see `wmtp.backends.protocol`. A target outside [0, V): that row's ce is NaN."""
    logits, head_offsets = as_rows(inputs.logits)
    numerics, padded = settings.numerics, logits
    logits = padded[..., : settings.vocab_size]
    batch, seq_len, heads, vocab_size = logits.shape
    tokens = batch * seq_len
    shared_heads = head_offsets is None and heads_share_storage(logits)
    rows = logits[:, :, :1] if shared_heads else logits
    by_head = inputs.head_scale is not None
    factors = logits.new_empty(4 + heads * by_head, dtype=torch.float32)
    out, unused, grad = new_outputs(logits, heads, settings), factors, None
    if settings.gradient == "inplace":
        out, grad = out._replace(grad=rows), rows
    elif settings.gradient == "new":
        padded = padded[:, :, : rows.shape[2]]
        out = out._replace(grad=torch.empty_like(padded, memory_format=torch.contiguous_format))
        grad = out.grad[..., : settings.vocab_size]
    rule = _rule(settings.rule, inputs)
    weights = ONES if inputs.head_weights is None else GIVEN
    alike = {
        "row_scalar_ptr": out.row_scalar,
        "weight_sum_ptr": out.weight_sum,
        "valid_mask_ptr": out.valid_mask,
        "head_scale_ptr": inputs.head_scale if by_head else unused,
        "factors_ptr": factors,
        "tokens": tokens,
        "H": heads,
        "BY_HEAD": by_head,
        "WEIGHTS": LATER if rule.function is not None else weights,
        "TOKENS": tokens_a_step(heads),
        **one_program(machine(logits.device)).options(),
    }
    with torch.cuda.device_of(logits):
        weights_kernel[(1,)](
            **targets(inputs.target_ids),
            weight_ptr=unused if inputs.head_weights is None else inputs.head_weights,
            normalizer_ptr=_on_device(inputs.normalizer, logits),
            seq_len=seq_len,
            vocab_size=vocab_size,
            ignore_index=settings.ignore_index,
            has_normalizer=int(inputs.normalizer is not None),
            largest_gradient=numerics.largest_gradient * (logits.dtype == torch.float16),
            heads_share=1 / heads if shared_heads else 1.0,
            REDUCTION=REDUCTIONS[settings.reduction],
            **alike,
        )
        if logits.numel():
            of_heads = OfHeads(
                ref_ce_ptr=unused if inputs.ref_ce is None else inputs.ref_ce,
                weight_ptr=unused if inputs.head_weights is None else inputs.head_weights,
                numbers_ptr=unused
                if inputs.numbers is None
                else _on_device(inputs.numbers, logits),
                factors_ptr=factors,
                row_scalar_ptr=out.row_scalar,
                offset_ptr=unused if head_offsets is None else _offsets(head_offsets, logits),
                ce_ptr=out.ce,
                row_max_ptr=out.row_max,
                log_sum_ptr=out.log_sum,
                row_loss_ptr=out.row_loss if numerics.adds_terms else unused,
                entropy_ptr=out.entropy if settings.metrics else unused,
                correct_ptr=out.correct if settings.metrics else unused,
            )
            how = (settings, rule, head_offsets, by_head)
            launch(Case(rows, inputs.target_ids, heads, grad, of_heads, *how))
        finish_kernel[(1,)](
            row_loss_ptr=out.row_loss if numerics.adds_terms else out.ce,
            token_loss_ptr=out.token_loss,
            loss_ptr=out.loss,
            **alike,
        )
    return out._replace(factors=factors[:2])


def _rule(key: str, inputs: Inputs) -> Rule:
    rule = rule_of(key)
    if rule.known:
        return Rule()
    first, *others = rule.parts()
    return Rule(
        device_function(first.key()),
        device_function(others[0].key()) if others else None,
        len(first.numbers),
        rule.compares,
        rule.sums_to_one,
        whole_token=rule.scope == "token",
        multiplied=inputs.head_weights is not None,
    )


def _on_device(numbers: Tensor | None, logits: Tensor) -> Tensor:
    """float32 beside the logits; something, where there are none."""
    if numbers is None:
        return logits.new_empty(1, dtype=torch.float32)
    if numbers.device == logits.device:
        return numbers.to(torch.float32)
    return _filled(numbers.flatten().tolist(), logits, torch.float32)


def _offsets(head_offsets: tuple[int, ...], logits: Tensor) -> Tensor:
    """[H] int64 beside the logits."""
    return _filled(head_offsets, logits, torch.int64)


def _filled(numbers: Sequence[float], logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of the host beside the logits: a copy would wait, and no graph would keep it."""
    found = logits.new_empty(len(numbers), dtype=dtype)
    for i, number in enumerate(numbers):
        found[i].fill_(number)
    return found
