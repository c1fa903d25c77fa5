"""The public losses on hidden states: the logits exist a chunk at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wmtp import checks, label_checks, reference
from wmtp.arguments import (
    check_columns,
    checked_call,
    chosen_weighting,
    in_one_pass,
    local_call,
    loss_inputs,
    row_settings_of,
    selects_within,
)
from wmtp.backends import choose_backend
from wmtp.metrics import MTPLoss, OfRows
from wmtp.numerics import numerics_of
from wmtp.ops.linear import linear_loss
from wmtp.ops.loss import gradients_ahead, reference_resolved
from wmtp.records import LinearInputs, LinearSettings
from wmtp.reduction import accumulation_dtype
from wmtp.transforms import refuse_transforms
from wmtp.unembedding import (
    GradHeads,
    Unembedding,
    grad_heads_of,
    logits_of,
    unembedding_of,
)
from wmtp.weightings import Uniform, Weighting
from wmtp.weightings.base import fields_of


def fused_linear_weighted_mtp_loss(
    hidden: Tensor | Sequence[Tensor],
    lm_head_weight: Tensor | Sequence[Tensor],
    target_ids: Tensor | Sequence[Tensor],
    head_weights: Tensor | None = None,
    *,
    weighting: Weighting | None = None,
    ref_ce: Tensor | None = None,
    ref_logits: Tensor | None = None,
    lm_head_bias: Tensor | Sequence[Tensor] | None = None,
    hidden_grad_heads: Sequence[int] | None = None,
    weight_grad_heads: Sequence[int] | None = None,
    temperature: Tensor | float = 0.7,
    excess: str = "abs",
    head_prior: Tensor | None = None,
    shifted: bool = False,
    offsets: Sequence[int] | None = None,
    document_ids: Tensor | None = None,
    target_mask: Tensor | None = None,
    position_mask: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sigmoid_cap: Sequence[float] | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    vocab_size: int | None = None,
    reduction: str | None = None,
    normalizer: Tensor | float | None = None,
    horizon: int | None = None,
    metrics: bool = False,
    chunk_bytes: int | None = None,
    grad_accum_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> MTPLoss:
    """The weighted multi-token-prediction loss of hidden states: no logits tensor ever exists.

        logits[b, t, k, :] = lm_head_weight @ hidden[b, t, k, :] + lm_head_bias
        loss, valid_mask, ce_per_head = fused_weighted_mtp_loss(logits, ...)      which see

    with the logits of a few tokens at a time, in one buffer. A kernel turns them into
    g = softmax - onehot where they lie and hands out their cross entropies; with these the weights
    are known, even those of a reference, and c = dloss/dce meets the small operands:

        dloss/dhidden = c (g @ lm_head_weight)      dloss/dlm_head_weight = g.T @ (c hidden)
        dloss/dlm_head_bias = c @ g

    all of it in the forward call, so that backward has only its upstream gradient to multiply (in
    backward, where saved tensors are packed, as by non-reentrant checkpointing). They are made anew
    for a second backward, and to differentiate `ce_per_head`. Positions without a
    target cost nothing. On a GPU the call waits for the device once, to learn which these are.

    Args:
        hidden: [B, S, H, D] float32, bfloat16 or float16 (float64 on the CPU), any strides; or a
            list of H tensors [B, S, D], which are stacked, a copy. DTensors as the logits of
            `fused_weighted_mtp_loss`.
        lm_head_weight: [V, D], or each head's own, [H, V, D] or a list of H [V, D], which is
            stacked, a copy; of the same dtype, or anything floating under autocast, whose dtype
            the products then have. May be the embedding's (tied), or a DTensor, FSDP's for one: it
            is gathered once a call, and its gradient averaged over the processes.
        target_ids, head_weights, weighting, ref_ce, ref_logits, temperature, excess, head_prior,
            shifted, offsets, document_ids, target_mask, position_mask, ignore_index, logit_scale,
            softcap, sigmoid_cap, z_loss, label_smoothing, reduction, normalizer, horizon, metrics:
            as in `fused_weighted_mtp_loss`.
        vocab_size: how many rows of lm_head_weight are tokens; None: all. The products of the
            others are not computed.
        lm_head_bias: [V], or [H, V] or a list of H [V], as lm_head_weight is.
        hidden_grad_heads: whose rows' hidden states have a gradient; that of the others is exactly
            0, and not computed. None: all heads'.
        weight_grad_heads: whose rows are in the gradient of lm_head_weight and lm_head_bias, as
            [0] for heads that train no shared unembedding. None: all heads'.
        chunk_bytes: what a chunk may take, > 0: its logits and its part of the operands. At least
            one token is computed at a time. A weight that autocast converts is copied besides, once
            a call. Default: 2048 rows' worth, but at most 1 GiB; or all rows, where these take no
            more than such a chunk and the sum that several chunks need (see grad_accum_dtype).
        grad_accum_dtype: in which the chunks' parts of a 16-bit weight's gradient are added up.
            Default: float32; the weight's own dtype saves that memory.
        backend: "auto", "cpu", "triton" or "eager"; the last makes all logits at once.

    Returns:
        MTPLoss(loss [], valid_mask [B, S] bool, ce_per_head [B, S, H]); float32, float64 for
        float64 hidden states.

    Raises:
        ValueError, TypeError, RuntimeError: as `fused_weighted_mtp_loss`; also lm_head_weight of
            other sizes than [V, D] or [H, V, D], two dtypes outside autocast, chunk_bytes < 1,
            heads to differentiate that are none.
        IndexError: a target outside [0, V); by backend="eager" on a GPU the loss is NaN instead.

    Example: weights of zero predict uniformly over five tokens, which costs log 5 nats.

        >>> import torch
        >>> hidden = torch.ones(1, 4, 2, 3)
        >>> lm_head_weight = torch.zeros(5, 3, requires_grad=True)
        >>> loss, valid_mask, ce = fused_linear_weighted_mtp_loss(
        ...     hidden, lm_head_weight, torch.tensor([[0, 1, 2, 3]]))
        >>> round(loss.item(), 4)
        1.6094
        >>> loss.backward()
        >>> lm_head_weight.grad[:, 0]                 # 1/5, less how often each is predicted
        tensor([ 0.2000,  0.0333, -0.1333, -0.3000,  0.2000])
    """
    rule = chosen_weighting(
        head_weights,
        weighting,
        ref_ce=ref_ce,
        ref_logits=ref_logits,
        temperature=temperature,
        excess=excess,
    )
    hidden, rule, others = local_call(
        "hidden",
        hidden,
        rule,
        target_ids=target_ids,
        normalizer=normalizer,
        head_prior=head_prior,
        document_ids=document_ids,
        target_mask=target_mask,
        position_mask=position_mask,
    )
    if isinstance(hidden, Sequence) and not isinstance(hidden, str):
        checks.check_heads("hidden", hidden, "[B, S, D]")
        hidden = torch.stack(tuple(hidden), 2)
    checks.check_logits("hidden", hidden, "[B, S, H, D]")
    unembedding = unembedding_of(hidden, lm_head_weight, lm_head_bias)
    grad_heads = grad_heads_of(hidden_grad_heads, weight_grad_heads, hidden.shape[2])
    dtype = _dtype_of_product(hidden, unembedding, chunk_bytes)
    acc = accumulation_dtype(hidden)
    call = checked_call(
        "hidden",
        hidden,
        rule=rule,
        dtype=acc,
        reduction=reduction,
        horizon=horizon,
        ignore_index=ignore_index,
        shifted=shifted,
        offsets=offsets,
        numerics=numerics_of(logit_scale, softcap, sigmoid_cap, z_loss, label_smoothing),
        vocab_size=vocab_size,
        metrics=metrics,
        columns=unembedding.columns,
        **others,
    )
    checks.check_accum_dtype(grad_accum_dtype, unembedding.weight.dtype)
    chosen = choose_backend(backend, hidden.device.type, dtype)
    unembedding = unembedding.whole()
    if chosen == "eager":
        # Where there is no target, not even NaN may reach the weight's gradient.
        valid = call.targets.valid()
        x = hidden.masked_fill(~valid[..., None], 0.0)
        return reference.loss_of_logits(logits_of(x, unembedding, grad_heads), call)
    refuse_transforms(hidden, *unembedding, *fields_of(rule).values())
    product = (hidden, *unembedding)
    settings = LinearSettings(
        rule=Uniform().key(),
        reduction="sum",
        dtype=dtype,
        accum_dtype=grad_accum_dtype or _widest(unembedding.weight),
        chunk_bytes=chunk_bytes,
        wanted=[False] * 3,
        hidden_grad_heads=grad_heads.hidden,
        weight_grad_heads=grad_heads.weight,
        **row_settings_of(call, chosen),
    )
    call = call.resolved()
    one_pass = in_one_pass(call, dtype)
    if unembedding.weight.dim() == 2 and grad_heads == GradHeads():
        one_pass = one_pass or selects_within(call)
    call = reference_resolved(call, chosen, one_pass=one_pass)
    measured, kept = None, call
    if not one_pass:
        ce_inputs = _inputs(product, target_ids=call.targets.for_operators())
        of_ce = replace(settings, numerics=call.numerics.of_ce, metrics=call.measured)
        if call.selects:  # whose rows that are left out have no other cross entropies
            of_ce = replace(of_ce, wanted=_wanted(*product))
        with torch.set_grad_enabled(call.selects and torch.is_grad_enabled()):
            rows = linear_loss(ce_inputs, of_ce)
        pairs = reference.Pairs(rows.ce, call.targets.valid(), rows.entropy)
        given = reference.formed(call.rule, pairs, call)
        measured = rows if call.selects else None
        call = kept = call.formed(given)
        if measured is not None:
            kept = call._replace(targets=call.targets.where(given.head_weights != 0))
    settings = replace(
        settings,
        rule=call.rule.key(),
        reduction=call.terms.reduction,
        checked=call.checked,
        wanted=_wanted(*product),
        ahead=gradients_ahead(),
        metrics=call.measured,
    )
    out = linear_loss(_inputs(product, **loss_inputs(kept, acc)), settings)
    rows = measured or out
    loss = MTPLoss(out.loss, out.valid_mask, rows.ce)
    if not metrics:
        return loss
    return reference.with_metrics(loss, OfRows(rows.lse, rows.entropy, rows.correct), call)


def linear_next_token_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    target_ids: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    shifted: bool = False,
    document_ids: Tensor | None = None,
    target_mask: Tensor | None = None,
    position_mask: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sigmoid_cap: Sequence[float] | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """A reference model's cross entropy from its hidden states, without gradient or logits tensor.

        ref_ce[b, t] = next_token_cross_entropy(hidden @ lm_head_weight.T + lm_head_bias)[b, t]

    Args:
        hidden: [B, S, D] float32, bfloat16 or float16 (float64 on the CPU), any strides; DTensors
            as in `fused_weighted_mtp_loss`.
        lm_head_weight, lm_head_bias, chunk_bytes, backend: as in `fused_linear_weighted_mtp_loss`.
        target_ids, shifted, document_ids, target_mask, position_mask, ignore_index, logit_scale,
            softcap, sigmoid_cap, vocab_size: as in `next_token_cross_entropy`, which see for masks
            of a reference. The logits of positions
            that do not count are not computed.

    Returns:
        [B, T - 1], with `shifted` [B, T], float32 (float64 for float64 hidden states), nats, 0
        where a position does not count.

    Raises:
        As `fused_linear_weighted_mtp_loss`.

        >>> import torch
        >>> hidden, lm_head_weight = torch.ones(1, 3, 2), torch.zeros(5, 2)
        >>> linear_next_token_cross_entropy(hidden, lm_head_weight, torch.tensor([[0, 1, 2]]))
        tensor([[1.6094, 1.6094]])
    """
    hidden, _, others = local_call(
        "hidden",
        hidden,
        Uniform(),
        target_ids=target_ids,
        document_ids=document_ids,
        target_mask=target_mask,
        position_mask=position_mask,
    )
    checks.check_logits("hidden", hidden, "[B, S, D]")
    unembedding = unembedding_of(hidden, lm_head_weight, lm_head_bias)
    dtype = _dtype_of_product(hidden, unembedding, chunk_bytes)
    others |= {"shifted": shifted, "ignore_index": ignore_index}
    targets = label_checks.targets_of("hidden", hidden, 1, **others)
    label_checks.check_next_tokens(targets)
    numerics = numerics_of(logit_scale, softcap, sigmoid_cap)
    check_columns("hidden", hidden, vocab_size, unembedding.columns)
    chosen = choose_backend(backend, hidden.device.type, dtype)
    with torch.no_grad():
        unembedding = unembedding.whole()
        if chosen == "eager":
            logits = F.linear(hidden, *unembedding)[:, :, None]
            ce = reference.cross_entropies(logits, targets, numerics, vocab_size)
            return ce[:, : targets.about(), 0]
        settings = LinearSettings(
            rule=Uniform().key(),
            reduction="sum",
            ignore_index=targets.ignore_index,
            backend=chosen,
            dtype=dtype,
            accum_dtype=_widest(unembedding.weight),
            chunk_bytes=chunk_bytes,
            wanted=[False] * 3,
            numerics=numerics,
            vocab_size=vocab_size,
        )
        product = (hidden[:, :, None], *unembedding)
        inputs = _inputs(product, target_ids=targets.for_operators())
        return linear_loss(inputs, settings).ce[:, : targets.about(), 0]


def _inputs(product: tuple[Tensor, Tensor, Tensor | None], **of_loss: Any) -> LinearInputs:
    hidden, weight, bias = product
    return LinearInputs(hidden=hidden, weight=weight, bias=bias, **of_loss)


def _dtype_of_product(
    hidden: Tensor, unembedding: Unembedding, chunk_bytes: int | None
) -> torch.dtype:
    """The dtype that the logits have."""
    checks.check_chunk_bytes(chunk_bytes)
    given = [tensor.dtype for tensor in (hidden, *unembedding) if tensor is not None]
    if _autocast(hidden.device.type) and torch.float64 not in given:
        return torch.get_autocast_dtype(hidden.device.type)
    checks.check_one_dtype(given)
    return hidden.dtype


def _autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _widest(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _wanted(*tensors: Tensor | None) -> list[bool]:
    """Whose gradients: hidden's, the weight's, the bias's."""
    enabled = torch.is_grad_enabled()
    return [enabled and tensor is not None and tensor.requires_grad for tensor in tensors]
