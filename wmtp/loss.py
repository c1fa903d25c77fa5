"""The public losses on logits: check the arguments, choose a backend, call the operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wmtp import checks, reference
from wmtp.arguments import (
    check_call,
    chosen_weighting,
    in_one_pass,
    local_call,
    loss_inputs,
)
from wmtp.backends import choose_backend, fuses
from wmtp.inplace import check_inplace
from wmtp.kinds import check_flag
from wmtp.layout import one_tensor
from wmtp.ops.loss import weighted_loss
from wmtp.records import Inputs, Settings
from wmtp.reduction import accumulation_dtype
from wmtp.reference import MTPLoss
from wmtp.sharded import local_parts
from wmtp.transforms import refuse_transforms
from wmtp.weightings import Excess, Uniform, Weighting
from wmtp.weightings.base import as_tensor


def fused_weighted_mtp_loss(
    logits: Tensor | Sequence[Tensor],
    target_ids: Tensor,
    head_weights: Tensor | None = None,
    *,
    weighting: Weighting | None = None,
    ref_ce: Tensor | None = None,
    ref_logits: Tensor | None = None,
    temperature: Tensor | float = 0.7,
    excess: str = "abs",
    reduction: str = "token_mean",
    normalizer: Tensor | float | None = None,
    ignore_index: int = -100,
    horizon: int | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> MTPLoss:
    """The weighted multi-token-prediction loss, fused: one read of the logits, no probabilities.

    Head k at position t predicts `target_ids[b, t + k + 1]` (Gloeckle et al. 2024,
    arXiv 2404.19737, eq. 2); (t, k) is valid when that token exists and is not `ignore_index`:

        ce[b, t, k] = logsumexp(logits[b, t, k, :]) - logits[b, t, k, target]        0 if invalid
        w[b, t, k]  = 1                                                   neither argument given
                    | head_weights[b, t, k]                               head_weights
                    | softmax over valid k of |ce - ref_ce[b, t + k]| / temperature     ref_*
                    | the rule's                                                        weighting
                                                                                     0 if invalid
        token_mean:  mean over tokens with sum_k w > 1e-8 of  sum_k w ce / sum_k w
        weight_mean: sum w ce / sum w              sum:  sum w ce

        dloss/dlogits[b, t, k, :] = c[b, t, k] (softmax - onehot)

    Excess and value weights are constants: no gradient flows through them. A `head_weights` that
    requires grad gets its true gradient, and so does whatever is computed from `ce_per_head`.

    Args:
        logits: [B, S, H, V] float32, bfloat16 or float16 (float64 on the CPU), any strides. One
            set of logits for all heads, `logits[:, :, None].expand(-1, -1, H, -1)`, is read once;
            of the gradients of such heads only the sum, which autograd hands on, has a meaning.
            Or a list of H tensors [B, S, V], which are read where they lie (stacked by
            backend="eager", in a second backward, and to differentiate `ce_per_head`).
            Of a DTensor, replicated or sharded along batch and sequence alone, this process's part
            is taken, and of what goes with it: DTensors placed alike, or plain tensors of that
            part. The loss is this part's own: divide it by a `normalizer` of all processes.
            Nothing follows the end of a part of the sequence. Gradients are DTensors again.
        target_ids: [B, S] integer, the *unshifted* token ids.
        head_weights: [B, S, H] float, finite and >= 0 (checked on the CPU, where there is a
            target; on a GPU the check would cost a sync and is not made).
        weighting: a rule of `wmtp.weightings`, or of your own, instead of `head_weights` and
            `ref_*`, which name the rules Given and Excess in short.
        ref_logits: [B, S, V'] float, a reference model's next-token logits; read once.
        ref_ce: [B, S - 1] float, nats, a reference model's cross entropy: position t predicting
            `target_ids[t + 1]`, as `next_token_cross_entropy` returns it.
        temperature: > 0, nats, a number or a 0-d tensor; only with `ref_*`.
        excess: "abs" for |ce - ref_ce|, "signed" for ce - ref_ce (Rho-1, Lin et al. 2024,
            arXiv 2404.07965, eq. 3); only with `ref_*`.
        reduction: "token_mean", "weight_mean" or "sum".
        normalizer: a number > 0 or a 0-d tensor (not checked) that replaces the denominator, for
            gradient accumulation and data-parallel runs.
        ignore_index: a target of this id is no target.
        horizon: when given, must equal H.
        inplace: lets the loss write the gradient over the logits, whose values are then gone.
            Another loss of ours from them raises, a second backward, and a backward that saved
            them; whatever else reads them afterwards sees the gradient. Slices that share no
            element do not concern each other, and memory that is filled again holds logits again
            (to see that its values are new takes a wait on a GPU). `ce_per_head` cannot be
            differentiated then. Eager torch has no use for the permission.
        backend: "auto", "cpu", "triton" or "eager". A backend asked for by name never falls back;
            "auto" warns once if it must run in eager.

    Returns:
        MTPLoss(loss [], valid_mask [B, S] bool, ce_per_head [B, S, H]); float32, float64 for
        float64 logits. No valid token at all: loss 0, gradients 0. NaN logits make that token's
        loss NaN, and the loss with it.

    Raises:
        ValueError: wrong shapes, mixed devices, two weightings at once, temperature <= 0, unknown
            excess / reduction / backend, horizon != H, on the CPU negative or non-finite weights.
        TypeError: logits or weights not floating point, target_ids not integer, `weighting` no
            rule.
        NotImplementedError: inside torch.func (grad, jvp, vmap, ...) and under forward-mode AD, but
            for backend="eager".
        IndexError: on the CPU, a target outside [0, V). On a GPU that token's loss is NaN.
        RuntimeError: a backend asked for by name is not available.

    Example: uniform predictions over five tokens cost log 5 nats, whatever the weights.

        >>> import torch
        >>> logits = torch.zeros(1, 4, 2, 5, requires_grad=True)
        >>> weights = torch.tensor([1.0, 0.25]).expand(1, 4, 2)
        >>> loss, valid_mask, ce = fused_weighted_mtp_loss(
        ...     logits, torch.tensor([[0, 1, 2, 3]]), weights)
        >>> round(loss.item(), 4)
        1.6094
        >>> loss.backward()
        >>> logits.grad[0, 0, 0]                # 3 tokens, weight 0.8: 0.8/3 (1/5 - onehot(1))
        tensor([ 0.0533, -0.2133,  0.0533,  0.0533,  0.0533])
    """
    rule = chosen_weighting(
        head_weights,
        weighting,
        ref_ce=ref_ce,
        ref_logits=ref_logits,
        temperature=temperature,
        excess=excess,
    )
    logits, target_ids, normalizer, rule = local_call(
        "logits", logits, target_ids, normalizer, rule
    )
    heads, seen = _as_heads(logits)
    checks.check_logits("logits", seen, "[B, S, H, V]")
    check_call(
        "logits",
        seen,
        target_ids,
        rule,
        reduction=reduction,
        normalizer=normalizer,
        ignore_index=ignore_index,
        horizon=horizon,
    )
    check_flag("inplace", inplace)
    chosen, ignore_index = choose_backend(backend, seen.device.type, seen.dtype), int(ignore_index)
    if chosen == "eager":
        how = (as_tensor(normalizer), reduction, ignore_index)
        return reference.loss_of_logits(one_tensor(heads), target_ids, rule, *how)
    refuse_transforms(*heads, *vars(rule).values())
    rule = rule.resolved(target_ids, seen.shape[2], ignore_index)
    if isinstance(rule, Excess) and rule.ref_logits is not None:
        choose_backend(backend, seen.device.type, rule.ref_logits.dtype)
    key = rule.key()
    if not (fuses(chosen, key) and in_one_pass(rule, reduction, normalizer, seen.dtype)):
        ce = mtp_cross_entropy(
            _detached(logits), target_ids, ignore_index=ignore_index, backend=backend
        )
        rule = reference.formed(rule, ce, target_ids, ignore_index)
        key = rule.key()
    check_inplace(inplace, heads)
    inputs = Inputs(
        logits=heads, **loss_inputs(rule, target_ids, normalizer, accumulation_dtype(seen))
    )
    settings = Settings(
        rule=key,
        reduction=reduction,
        ignore_index=ignore_index,
        backend=chosen,
        gradient="inplace" if inplace else "new",
    )
    return MTPLoss(*weighted_loss(inputs, settings)[:3])


def mtp_cross_entropy(
    logits: Tensor | Sequence[Tensor],
    target_ids: Tensor,
    *,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """The cross entropy of every head, differentiable per element.

        ce[b, t, k] = logsumexp(logits[b, t, k, :]) - logits[b, t, k, target_ids[b, t + k + 1]]

    For losses of your own making: the gradient of each element reaches its row of logits.

    Args:
        logits: [B, S, H, V] float32, bfloat16 or float16 (float64 on the CPU), or a list of H
            [B, S, V]; DTensors as in `fused_weighted_mtp_loss`.
        target_ids: [B, S] integer, unshifted.
        ignore_index: a target of this id has no cross entropy.
        backend: "auto", "cpu", "triton" or "eager".

    Returns:
        [B, S, H] float32 (float64 for float64 logits), nats, 0 where there is no target.

    Raises:
        As `fused_weighted_mtp_loss`.

        >>> import torch
        >>> ce = mtp_cross_entropy(torch.zeros(1, 3, 2, 5), torch.tensor([[0, 1, 2]]))
        >>> ce[0]
        tensor([[1.6094, 1.6094],
                [1.6094, 0.0000],
                [0.0000, 0.0000]])
    """
    logits, target_ids = local_parts("logits", logits, target_ids=target_ids)
    heads, seen = _as_heads(logits)
    chosen = _checked_backend(seen, "[B, S, H, V]", target_ids, ignore_index, backend)
    if chosen == "eager":
        return reference.cross_entropy_per_head(one_tensor(heads), target_ids, int(ignore_index))
    refuse_transforms(*heads)
    inputs = Inputs(logits=heads, target_ids=target_ids.long().contiguous())
    settings = Settings(
        rule=Uniform().key(), reduction="sum", ignore_index=int(ignore_index), backend=chosen
    )
    return weighted_loss(inputs, settings).ce


def next_token_cross_entropy(
    logits: Tensor,
    target_ids: Tensor,
    *,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """A reference model's cross entropy, without gradient: one read of its logits.

        ref_ce[b, t] = logsumexp(logits[b, t, :]) - logits[b, t, target_ids[b, t + 1]]

    Args:
        logits: [B, S, V] float32, bfloat16 or float16 (float64 on the CPU); DTensors as in
            `fused_weighted_mtp_loss`.
        target_ids: [B, S] integer, unshifted.
        ignore_index: a target of this id has no cross entropy.
        backend: "auto", "cpu", "triton" or "eager".

    Returns:
        [B, S - 1] float32 (float64 for float64 logits), nats, 0 where there is no target.

    Raises:
        As `fused_weighted_mtp_loss`.

        >>> import torch
        >>> next_token_cross_entropy(torch.zeros(1, 3, 5), torch.tensor([[0, 1, 2]]))
        tensor([[1.6094, 1.6094]])
    """
    logits, target_ids = local_parts("logits", logits, target_ids=target_ids)
    chosen = _checked_backend(logits, "[B, S, V]", target_ids, ignore_index, backend)
    if chosen == "eager":
        return reference.next_token_ce(logits, target_ids, int(ignore_index))
    how = (int(ignore_index), chosen)
    return torch.ops.wmtp.next_token_ce(logits.detach(), target_ids.long().contiguous(), *how)


def _as_heads(logits: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """A list of the one tensor or of all heads, and [B, S, H, V], of heads' shape, not data."""
    if not isinstance(logits, Sequence) or isinstance(logits, str):
        return [logits], logits
    checks.check_heads("logits", logits, "[B, S, V]")
    return list(logits), logits[0][:, :, None].expand(-1, -1, len(logits), -1)


def _detached(logits: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    return logits.detach() if isinstance(logits, Tensor) else [head.detach() for head in logits]


def _checked_backend(
    logits: Tensor, axes: str, target_ids: Tensor, ignore_index: int, backend: str
) -> str:
    checks.check_logits("logits", logits, axes)
    checks.check_targets_of("logits", logits, target_ids, ignore_index)
    return choose_backend(backend, logits.device.type, logits.dtype)
