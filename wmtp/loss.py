"""The public loss on logits: check the arguments, choose a backend, call the operator."""

from collections.abc import Sequence

from torch import Tensor

from wmtp import checks, reference
from wmtp.arguments import (
    Call,
    checked_call,
    chosen_weighting,
    in_one_pass,
    local_call,
    loss_inputs,
    row_settings_of,
)
from wmtp.backends import choose_backend, fuses
from wmtp.cross_entropy import as_heads, unweighted
from wmtp.inplace import check_inplace
from wmtp.kinds import check_flag
from wmtp.layout import one_tensor
from wmtp.metrics import MTPLoss, OfRows
from wmtp.numerics import numerics_of
from wmtp.ops.loss import reference_resolved, weighted_loss
from wmtp.records import Inputs, Outputs, Settings
from wmtp.reduction import accumulation_dtype
from wmtp.transforms import refuse_transforms
from wmtp.weightings import Weighting
from wmtp.weightings.base import field_of, fields_of


def fused_weighted_mtp_loss(
    logits: Tensor | Sequence[Tensor],
    target_ids: Tensor | Sequence[Tensor],
    head_weights: Tensor | None = None,
    *,
    weighting: Weighting | None = None,
    ref_ce: Tensor | None = None,
    ref_logits: Tensor | None = None,
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
    inplace: bool = False,
    backend: str = "auto",
) -> MTPLoss:
    """The weighted multi-token-prediction loss, fused: one read of the logits, no probabilities.

    Head k at position t predicts `target_ids[b, t + k + 1]` (Gloeckle et al. 2024,
    arXiv 2404.19737, eq. 2). The pair (t, k) counts when that token exists, is not `ignore_index`,
    is of the same document, and no mask takes it out:

        ce[b, t, k] = logsumexp(logits[b, t, k, :]) - logits[b, t, k, target]    0 if not counted
        w[b, t, k]  = 1                                                   neither argument given
                    | head_weights[b, t, k]                               head_weights
                    | softmax over the counted k of |ce - ref_ce[b, t + k]| / temperature   ref_*
                    | the rule's                                                        weighting
                                              times float masks and head_prior;  0 if not counted
        token_mean:  mean over tokens with sum_k w > 1e-8 of  sum_k w ce / sum_k w
        weight_mean: sum w ce / sum w              sum:  sum w ce
        pair_mean:   sum w ce / n                  n: the sum of float masks over counted pairs, or
        head_mean:   sum_k prior_k sum_bt w ce / n_k     their number; prior is 1 / H by default
                                                          and no part of w
        dloss/dlogits[b, t, k, :] = c[b, t, k] (softmax - onehot)

    The logits may be scaled and capped before, and the loss may average more than ce:

        x = s logits | c tanh(s logits / c) | a sigmoid((s logits + b) / c)    in place of logits
        f = (1 - eps) ce + eps (lse - mean_v x) + z lse^2                      in place of ce

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
        target_ids: [B, T] integer, T >= S, the *unshifted* token ids (T = S + 1 gives the last
            position its next token); or each head's own labels, [B, S, H] or a list of H [B, S].
        head_weights: [B, S, H] or [H] float, finite and >= 0 (checked on the CPU, where there is a
            target; on a GPU the check would cost a sync and is not made). Negative ones are allowed
            where no sum of weights divides: "sum", "pair_mean", "head_mean", or "weight_mean" with
            a normalizer.
        weighting: a rule of `wmtp.weightings`, or of your own, instead of `head_weights` and
            `ref_*`, which name the rules Given and Excess in short.
        ref_logits: [B, S, V'] float, a reference model's next-token logits; read once.
        ref_ce: float, nats, a reference model's cross entropy, indexed by the token it is about, as
            `next_token_cross_entropy` returns it: [B, T - 1], position t about
            `target_ids[t + 1]`; of shifted labels [B, T]; of each head's own [B, S, H].
        temperature: > 0, nats, a number or a 0-d tensor; only with `ref_*`.
        excess: "abs" for |ce - ref_ce|, "signed" for ce - ref_ce (Rho-1, Lin et al. 2024,
            arXiv 2404.07965, eq. 3); only with `ref_*`.
        head_prior: [H] float, >= 0, multiplies each head's weights; with "head_mean" each head's
            mean, instead of 1 / H.
        shifted: `target_ids[b, t]` is head 0's target at t already, as Hugging Face, torchtitan and
            Megatron shift labels: head k predicts `target_ids[b, t + k]`.
        offsets: H integers >= 1 instead of 1 .. H: head k predicts `target_ids[t + offsets[k]]`.
        document_ids: [B, T] integer, of the token at each input position: no pair crosses from one
            document to another. Shifted labels: head 0 is never cut, or, with [B, T + 1] of the
            tokens that the batch was cut from, as all others.
        target_mask: [B, T], indexed as target_ids, so it moves with the heads (Megatron's
            loss_mask).
        position_mask: [B, S] or [B, S, H], of the positions that predict (left padding).
            Where a mask is 0 or False the pair does not count. Other values of a float mask, >= 0,
            multiply the pair's weight.
        ignore_index: a target of this id is no target.
        logit_scale: s > 0, multiplies the logits (Cohere's head).
        softcap: c > 0 (Gemma 2's head, arXiv 2408.00118, section 2).
        sigmoid_cap: (a, b, c), a and c > 0, instead of softcap.
        z_loss: z >= 0, of the squared log-sum-exp (PaLM, arXiv 2204.02311, section 5).
        label_smoothing: eps in [0, 1), as in `torch.nn.functional.cross_entropy`: over all
            columns, the target's too; a logit of -inf makes that loss inf.
            Weightings and `ce_per_head` see ce without these two. All five are numbers, of each
            value of which torch.compile makes a graph.
        vocab_size: how many of the V columns are tokens, the rest being padding that takes no part
            in anything and gets a gradient of 0; None: all.
        reduction: "token_mean", "weight_mean", "pair_mean", "head_mean" or "sum"; None: the
            weighting's own, "token_mean" unless its docstring says otherwise.
        normalizer: a number > 0 or a 0-d tensor (not checked) that replaces the denominator, for
            gradient accumulation and data-parallel runs, see `loss_denominator`; with "head_mean"
            also [H] (a head whose entry is 0 adds nothing).
        horizon: when given, must equal H.
        metrics: the result has `.metrics` too, of the same read of the logits: see
            `wmtp.metrics.Metrics`, and `wmtp.summarize`.
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
        float64 logits; with `metrics` a MeasuredLoss, which unpacks alike. No valid token at all:
        loss 0, gradients 0. NaN logits make that token's loss NaN, and the loss with it.

    Raises:
        ValueError: wrong shapes, mixed devices, two weightings at once, temperature <= 0, unknown
            excess / reduction / backend, horizon != H, both caps, a scale or cap <= 0, z_loss < 0,
            label_smoothing outside [0, 1), vocab_size > V, on the CPU negative or non-finite
            weights.
        TypeError: logits or weights not floating point, target_ids not integer, `weighting` no
            rule.
        NotImplementedError: inside torch.func (grad, jvp, vmap, ...) and under forward-mode AD, but
            for backend="eager".
        IndexError: on the CPU, a target outside [0, V), or [0, vocab_size). On a GPU that token's
            loss is NaN.
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
    logits, rule, others = local_call(
        "logits",
        logits,
        rule,
        target_ids=target_ids,
        normalizer=normalizer,
        head_prior=head_prior,
        document_ids=document_ids,
        target_mask=target_mask,
        position_mask=position_mask,
    )
    heads, seen = as_heads(logits)
    checks.check_logits("logits", seen, "[B, S, H, V]")
    dtype = accumulation_dtype(seen)
    call = checked_call(
        "logits",
        seen,
        rule=rule,
        dtype=dtype,
        reduction=reduction,
        horizon=horizon,
        ignore_index=ignore_index,
        shifted=shifted,
        offsets=offsets,
        numerics=numerics_of(logit_scale, softcap, sigmoid_cap, z_loss, label_smoothing),
        vocab_size=vocab_size,
        metrics=metrics,
        **others,
    )
    check_flag("inplace", inplace)
    chosen = choose_backend(backend, seen.device.type, seen.dtype)
    if chosen == "eager":
        return reference.loss_of_logits(one_tensor(heads), call)
    refuse_transforms(*heads, *fields_of(rule).values())
    ref_logits = field_of(rule, "ref_logits")
    if ref_logits is not None:
        choose_backend(backend, seen.device.type, ref_logits.dtype)
    call = call.resolved()
    key = call.rule.key()
    one_pass = fuses(chosen, key) and in_one_pass(call, seen.dtype)
    call = reference_resolved(call, chosen, one_pass=one_pass)
    check_inplace(inplace, heads)
    if not one_pass and call.selects and not inplace:
        return _selected_loss(heads, call, chosen)
    if not one_pass:
        pairs = _measured_pairs([head.detach() for head in heads], call, chosen)
        rule = reference.formed(call.rule, pairs, call)
        call, key = call.formed(rule), rule.key()
    settings = Settings(
        rule=key,
        reduction=call.terms.reduction,
        checked=call.checked,
        gradient="inplace" if inplace else "new",
        metrics=call.measured,
        **row_settings_of(call, chosen),
    )
    out = weighted_loss(Inputs(logits=heads, **loss_inputs(call, dtype)), settings)
    return _with_metrics(MTPLoss(out.loss, out.valid_mask, out.ce), out, call)


def _with_metrics(loss: MTPLoss, rows: Outputs, call: Call) -> MTPLoss:
    """The loss, with what is asked for besides; `rows` were measured."""
    if not call.metrics:
        return loss
    of_rows = OfRows(rows.row_max + rows.log_sum, rows.entropy, rows.correct)
    return reference.with_metrics(loss, of_rows, call)


def _selected_loss(heads: list[Tensor], call: Call, backend: str) -> MTPLoss:
    """Of a rule that leaves rows out: all of them once, for what it follows from, and those that it
    keeps once more."""
    every = call._replace(numerics=call.numerics.of_ce, metrics=call.measured)
    rows = unweighted(heads, every, backend)
    pairs = reference.Pairs(rows.ce, call.targets.valid(), rows.entropy)
    given = reference.formed(call.rule, pairs, call)
    formed = call.formed(given)
    kept = formed._replace(targets=call.targets.where(given.head_weights != 0))
    settings = Settings(
        rule=formed.rule.key(),
        reduction=formed.terms.reduction,
        checked=True,
        gradient="new",
        **row_settings_of(formed, backend),
    )
    inputs = Inputs(logits=heads, **loss_inputs(kept, rows.ce.dtype))
    out = weighted_loss(inputs, settings)
    return _with_metrics(MTPLoss(out.loss, out.valid_mask, rows.ce), rows, formed)


def _measured_pairs(heads: list[Tensor], call: Call, backend: str) -> reference.Pairs:
    """What the call's rule follows from, of logits without gradient."""
    out = unweighted(
        heads, call._replace(numerics=call.numerics.of_ce, metrics=call.measured), backend
    )
    return reference.Pairs(out.ce, call.targets.valid(), out.entropy)
