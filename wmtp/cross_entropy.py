"""Cross entropies by themselves: of every head, differentiable, and of a reference model."""

from collections.abc import Sequence

from torch import Tensor

from wmtp import checks, label_checks, reference
from wmtp.arguments import (
    Call,
    check_columns,
    local_call,
    row_settings_of,
)
from wmtp.backends import choose_backend
from wmtp.layout import one_tensor
from wmtp.numerics import Numerics, numerics_of
from wmtp.ops.loss import reference_ce, weighted_loss
from wmtp.records import Inputs, Outputs, RowSettings, Settings
from wmtp.reduction import Terms
from wmtp.transforms import refuse_transforms
from wmtp.weightings import Uniform


def mtp_cross_entropy(
    logits: Tensor | Sequence[Tensor],
    target_ids: Tensor | Sequence[Tensor],
    *,
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
    backend: str = "auto",
) -> Tensor:
    """The cross entropy of every head, differentiable per element.

        ce[b, t, k] = logsumexp(logits[b, t, k, :]) - logits[b, t, k, target_ids[b, t + k + 1]]

    For losses of your own making: the gradient of each element reaches its row of logits.

    Args:
        logits: [B, S, H, V] float32, bfloat16 or float16 (float64 on the CPU), or a list of H
            [B, S, V]; DTensors as in `fused_weighted_mtp_loss`.
        target_ids, ignore_index, shifted, offsets, document_ids, target_mask, position_mask: which
            pairs count, as in `fused_weighted_mtp_loss`; masks of bools or integers alone.
        logit_scale, softcap, sigmoid_cap, z_loss, label_smoothing, vocab_size: as there; with
            z_loss or label_smoothing it is f that is returned.
        backend: "auto", "cpu", "triton" or "eager".

    Returns:
        [B, S, H] float32 (float64 for float64 logits), nats, 0 where a pair does not count.

    Raises:
        As `fused_weighted_mtp_loss`; TypeError also for float masks, which multiply weights.

        >>> import torch
        >>> ce = mtp_cross_entropy(torch.zeros(1, 3, 2, 5), torch.tensor([[0, 1, 2]]))
        >>> ce[0]
        tensor([[1.6094, 1.6094],
                [1.6094, 0.0000],
                [0.0000, 0.0000]])
    """
    logits, _, others = local_call(
        "logits",
        logits,
        Uniform(),
        target_ids=target_ids,
        document_ids=document_ids,
        target_mask=target_mask,
        position_mask=position_mask,
    )
    heads, seen = as_heads(logits)
    checks.check_logits("logits", seen, "[B, S, H, V]")
    others |= {"shifted": shifted, "offsets": offsets, "ignore_index": ignore_index}
    targets = label_checks.targets_of("logits", seen, seen.shape[2], **others)
    label_checks.check_no_weights(targets)
    numerics = numerics_of(logit_scale, softcap, sigmoid_cap, z_loss, label_smoothing)
    check_columns("logits", seen, vocab_size)
    chosen = choose_backend(backend, seen.device.type, seen.dtype)
    if chosen == "eager":
        rows = reference.row_statistics(one_tensor(heads), targets, numerics, vocab_size)
        return rows.row_loss
    refuse_transforms(*heads)
    call = Call(targets, Uniform(), Terms("sum"), vocab_size=vocab_size)
    return _row_losses(heads, call, chosen, numerics)


def next_token_cross_entropy(
    logits: Tensor,
    target_ids: Tensor,
    *,
    shifted: bool = False,
    document_ids: Tensor | None = None,
    target_mask: Tensor | None = None,
    position_mask: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    sigmoid_cap: Sequence[float] | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """A reference model's cross entropy, without gradient: one read of its logits.

        ref_ce[b, t] = logsumexp(logits[b, t, :]) - logits[b, t, target_ids[b, t + 1]]

    Args:
        logits: [B, S, V] float32, bfloat16 or float16 (float64 on the CPU); DTensors as in
            `fused_weighted_mtp_loss`.
        target_ids: [B, T] integer, unshifted, T = S or S + 1; with `shifted` T = S.
        ignore_index, shifted, document_ids, target_mask, position_mask: which positions count, as
            in `fused_weighted_mtp_loss`; masks of bools or integers alone.
            For `ref_ce=` leave position_mask and document_ids out, which are of the positions that
            predict: a token whose predecessor does not count has 0 here, and other heads may still
            predict it. The loss reads no entry of a pair that its own masks take out.
        logit_scale, softcap, sigmoid_cap, vocab_size: of this model's head, as in
            `fused_weighted_mtp_loss`.
        backend: "auto", "cpu", "triton" or "eager".

    Returns:
        [B, T - 1], with `shifted` [B, T], float32 (float64 for float64 logits), nats, 0 where a
        position does not count: indexed by the token it is about, as `ref_ce` is everywhere.

    Raises:
        As `fused_weighted_mtp_loss`.

        >>> import torch
        >>> next_token_cross_entropy(torch.zeros(1, 3, 5), torch.tensor([[0, 1, 2]]))
        tensor([[1.6094, 1.6094]])
    """
    logits, _, others = local_call(
        "logits",
        logits,
        Uniform(),
        target_ids=target_ids,
        document_ids=document_ids,
        target_mask=target_mask,
        position_mask=position_mask,
    )
    checks.check_logits("logits", logits, "[B, S, V]")
    others |= {"shifted": shifted, "ignore_index": ignore_index}
    targets = label_checks.targets_of("logits", logits, 1, **others)
    label_checks.check_next_tokens(targets)
    numerics = numerics_of(logit_scale, softcap, sigmoid_cap)
    check_columns("logits", logits, vocab_size)
    chosen = choose_backend(backend, logits.device.type, logits.dtype)
    if chosen == "eager":
        rows = logits.detach()[:, :, None]
        ce = reference.cross_entropies(rows, targets, numerics, vocab_size)[:, :, 0]
        return ce[:, : targets.about()]
    settings = RowSettings(
        ignore_index=targets.ignore_index,
        backend=chosen,
        numerics=numerics,
        vocab_size=vocab_size,
    )
    return reference_ce(logits, targets, settings)


def _row_losses(heads: list[Tensor], call: Call, backend: str, numerics: Numerics) -> Tensor:
    """[B, S, H]: f of these numerics, differentiable by element."""
    out = unweighted(heads, call._replace(numerics=numerics, metrics=False), backend)
    return out.row_loss if numerics.adds_terms else out.ce


def unweighted(heads: list[Tensor], call: Call, backend: str) -> Outputs:
    """The rows by themselves, whatever the call's rule."""
    how = row_settings_of(call, backend)
    settings = Settings(rule=Uniform().key(), reduction="sum", metrics=call.metrics, **how)
    return weighted_loss(Inputs(logits=heads, target_ids=call.targets.for_operators()), settings)


def as_heads(logits: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """A list of the one tensor or of all heads, and [B, S, H, V], of heads' shape, not data."""
    if not isinstance(logits, Sequence) or isinstance(logits, str):
        return [logits], logits
    checks.check_heads("logits", logits, "[B, S, V]")
    return list(logits), logits[0][:, :, None].expand(-1, -1, len(logits), -1)
