"""What the public functions demand of their arguments: that each is right and fits the others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wmtp.inplace import check_not_overwritten
from wmtp.kinds import (
    FLOAT_DTYPES,
    check_flag,
    check_float_or_whole,
    check_float_tensor,
    check_integers,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
    check_whole,
    is_readable,
    is_real,
    is_whole,
    shape_message,
    shown,
)
from wmtp.labels import IGNORE_INDEX, Targets

REDUCTIONS = ("token_mean", "weight_mean", "pair_mean", "head_mean", "sum")
EXCESSES = ("abs", "signed")


def check_ref_ce(ref_ce: Tensor, targets: Targets) -> None:
    """What a reference says of the targets."""
    batch, tokens = targets.ids.shape[:2]
    shape: tuple[int, ...] = (batch, max(tokens - 1, 0))
    axes = "[B, T-1]"
    remedy = "position t is the reference's loss on target_ids[t + 1]"
    if targets.own:
        axes, shape = "[B, S, H]", tuple(targets.ids.shape)
        remedy = "each head's, as the labels are"
    elif targets.shifted:
        axes, shape, remedy = "[B, T]", (batch, tokens), "the reference's loss on target_ids[t]"
    check_float_tensor("ref_ce", ref_ce, axes, shape, remedy)


def check_ref_logits(ref_logits: Tensor, name: str, scores: Tensor, targets: Targets) -> None:
    check_logits("ref_logits", ref_logits, "[B, S, V]")
    shape = (*scores.shape[:2], ref_logits.shape[2])
    check_shape("ref_logits", ref_logits, "[B, S, V]", shape, f"same batch as the {name}")
    most = targets.length + (not targets.shifted)
    if targets.own or targets.ids.shape[1] > most:
        found = "each head's own" if targets.own else f"{targets.ids.shape[1]} a row"
        raise ValueError(
            f"ref_logits need labels that end with the next token's, [B, T <= {most}], got "
            f"{found}: pass ref_ce, which is about every target"
        )


def check_logits(name: str, logits: Tensor, axes: str) -> None:
    """`axes` names the dimensions, e.g. "[B, S, H, V]"; the last one may not be empty."""
    check_tensor(name, logits, axes)
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}: "
            f"pass {'unnormalised scores' if axes.endswith('V]') else 'hidden states'}, not ids"
        )
    check_not_overwritten(name, logits)
    rank = axes.count(",") + 1
    if logits.dim() != rank:
        remedy = "batch, sequence and vocabulary or channels are axes of their own"
        if logits.dim() == 3:
            remedy = f"add the head axis with {name}.unsqueeze(2)"
        elif logits.dim() == 4:
            remedy = "pass one head's, [:, :, k]"
        raise ValueError(shape_message(name, axes, None, logits, remedy))
    if any(size == 0 for size in logits.shape[2:]):
        entry = "vocabulary entry" if axes.endswith("V]") else "channel"
        raise ValueError(
            f"{name} must have at least one head and one {entry}, got shape {tuple(logits.shape)}: "
            f"pass {axes}"
        )


def check_heads(name: str, heads: Sequence[Tensor], axes: str) -> None:
    """H tensors [B, S, V] or [B, S, D], alike but for their memory."""
    if not heads:
        raise ValueError(f"{name} must have at least one head, got an empty list: pass H tensors")
    for head in heads:
        check_logits(f"each head's {name}", head, axes)
    for what in ("shape", "dtype", "device"):
        found = [getattr(head, what) for head in heads]
        if any(other != found[0] for other in found):
            names = sorted({str(other).removeprefix("torch.") for other in found})
            raise ValueError(
                f"all heads' {name} must have one {what}, got {' and '.join(names)}: "
                f"pass H tensors {axes} that are alike"
            )


def check_lm_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """lm_head_weight [V, D], and the bias [V] that goes with it."""
    dim = hidden.shape[-1]
    remedy = "pass lm_head.weight as torch.nn.Linear has it"
    check_tensor("lm_head_weight", weight, "[V, D]")
    vocab_size = len(weight) if weight.dim() else 1
    check_float_tensor("lm_head_weight", weight, "[V, D]", (vocab_size, dim), remedy)
    if vocab_size == 0:
        raise ValueError(
            "lm_head_weight must have at least one vocabulary entry, got [0, D]: pass [V, D]"
        )
    if bias is not None:
        remedy = "one number for each row of lm_head_weight"
        check_float_tensor("lm_head_bias", bias, "[V]", (vocab_size,), remedy)
    check_same_device("hidden", hidden, lm_head_weight=weight, lm_head_bias=bias)


def check_one_dtype(found: Sequence[torch.dtype]) -> None:
    if len(set(found)) > 1:
        names = " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in found}))
        raise TypeError(
            f"hidden, lm_head_weight and lm_head_bias must have one dtype, got {names}: convert "
            f"one, or call this under torch.autocast"
        )


def check_accum_dtype(accum_dtype: torch.dtype | None, weight_dtype: torch.dtype) -> None:
    if accum_dtype is None:
        return
    allowed = weight_dtype, torch.promote_types(weight_dtype, torch.float32)
    if not isinstance(accum_dtype, torch.dtype) or accum_dtype not in allowed:
        found = accum_dtype if isinstance(accum_dtype, torch.dtype) else shown(accum_dtype)
        raise ValueError(
            f"grad_accum_dtype must be float32 or the weight's own {weight_dtype}, and not "
            f"narrower than that, got {found}: pass None for the wider of the two"
        )


def check_chunk_bytes(chunk_bytes: int | None) -> None:
    remedy = "it bounds the memory of the logits that exist at a time; pass None for the default"
    if chunk_bytes is not None:
        check_whole("chunk_bytes", chunk_bytes, 1, remedy)


def targets_of(
    name: str,
    scores: Tensor,
    heads: int,
    target_ids: Tensor | Sequence[Tensor],
    *,
    ignore_index: int = IGNORE_INDEX,
    shifted: bool = False,
    offsets: Sequence[int] | None = None,
    document_ids: Tensor | None = None,
    target_mask: Tensor | None = None,
    position_mask: Tensor | None = None,
) -> Targets:
    """What `heads` heads of the scores are asked for, as checked."""
    ids: Any = target_ids
    if is_listed(ids):
        ids = _stacked_labels(ids, heads)
    distances: Any = offsets
    if is_listed(distances):
        distances = tuple(distances)
    check_tensor("target_ids", ids, "[B, T]")
    targets = Targets(
        ids=ids,
        length=scores.shape[1],
        heads=heads,
        ignore_index=ignore_index,
        shifted=shifted,
        offsets=distances,
        document_ids=document_ids,
        target_mask=target_mask,
        position_mask=position_mask,
    )
    check_targets(name, scores, targets)
    return targets


def is_listed(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _stacked_labels(labels: Sequence[Tensor], heads: int) -> Tensor:
    for of_head in labels:
        check_integers("each head's target_ids", of_head, "[B, S]")
    if len(labels) != heads or len({of_head.shape for of_head in labels}) != 1:
        found = [tuple(of_head.shape) for of_head in labels]
        raise ValueError(
            f"target_ids must be H = {heads} tensors [B, S], got {found}: pass one for each head"
        )
    return torch.stack([of_head.long() for of_head in labels], -1)


def check_targets(name: str, scores: Tensor, targets: Targets) -> None:
    """The targets of `name`, [B, S, H, ...] or, of one head alone, [B, S, ...]."""
    check_flag("shifted", targets.shifted)
    check_integers("target_ids", targets.ids, "[B, T]")
    check_ignore_index(targets.ignore_index)
    if targets.own:
        _check_own_labels(name, scores, targets)
    else:
        _check_target_ids(name, scores, targets)
    _check_offsets(targets)
    _check_document_ids(targets)
    _check_masks(name, scores, targets)
    check_same_device(
        name,
        scores,
        target_ids=targets.ids,
        document_ids=targets.document_ids,
        target_mask=targets.target_mask,
        position_mask=targets.position_mask,
    )


def check_no_weights(targets: Targets) -> None:
    if targets.has_factor:
        raise TypeError(
            "masks must be of bools or integers here, got floats, which multiply weights: pass "
            "mask != 0"
        )


def check_next_tokens(targets: Targets) -> None:
    """Of one head's logits [B, S, V]."""
    check_no_weights(targets)
    most = targets.length + (not targets.shifted)
    if targets.own or targets.ids.shape[1] > most:
        axes = "[B, S]" if targets.shifted else "[B, T], T = S or S + 1"
        remedy = f"the logits have {targets.length} positions"
        raise ValueError(shape_message("target_ids", axes, None, targets.ids, remedy))


def _check_own_labels(name: str, scores: Tensor, targets: Targets) -> None:
    shape = (*scores.shape[:2], targets.heads)
    remedy = f"a target for each position and head of {name}, or ids [B, T]"
    check_shape("target_ids", targets.ids, "[B, S, H]", shape, remedy)
    others = {
        "shifted": targets.shifted or None,
        "offsets": targets.offsets,
        "document_ids": targets.document_ids,
        "target_mask": targets.target_mask,
    }
    for other, value in others.items():
        if value is not None:
            raise ValueError(
                f"{other} goes with target_ids [B, T], got each head's own, [B, S, H]: put "
                "ignore_index where a pair does not count, or pass position_mask [B, S, H]"
            )


def _check_target_ids(name: str, scores: Tensor, targets: Targets) -> None:
    (batch, length), found = scores.shape[:2], tuple(targets.ids.shape)
    turned = scores.dim() == 4 and found == (batch, scores.shape[2]) != (batch, length)
    if len(found) == 2 and found[0] == batch and found[1] >= length and not turned:
        return
    remedy = f"pass ids, at least one for each position of {name}, or labels [B, S, H]"
    if turned:
        remedy = f"{name} seems to be [B, H, S, ...], pass {name}.transpose(1, 2)"
    elif found == (length, batch):
        remedy = f"{name} seems to be [S, B, ...], pass {name}.transpose(0, 1)"
    axes = f"[B, T >= S] = ({batch}, >= {length})"
    raise ValueError(shape_message("target_ids", axes, None, targets.ids, remedy))


def _check_offsets(targets: Targets) -> None:
    offsets: Any = targets.offsets
    if offsets is None:
        return
    if not isinstance(offsets, tuple):
        raise TypeError(
            f"offsets must be a list of H = {targets.heads} whole numbers, got {shown(offsets)}: "
            "head k at t predicts the token at t + offsets[k]"
        )
    if len(offsets) != targets.heads or not all(is_whole(each) and each >= 1 for each in offsets):
        raise ValueError(
            f"offsets must be H = {targets.heads} whole numbers >= 1, got {offsets}: head k at t "
            "predicts the token at t + offsets[k]"
        )


def _check_document_ids(targets: Targets) -> None:
    documents = targets.document_ids
    if documents is None:
        return
    check_integers("document_ids", documents, "[B, T]")
    batch, tokens = targets.ids.shape
    if tuple(documents.shape) == (batch, tokens + 1) and targets.shifted:
        return
    remedy = "the document of each token, as target_ids has them"
    remedy += ", or of the T + 1 that they were cut from" * targets.shifted
    check_shape("document_ids", documents, "[B, T]", (batch, tokens), remedy)


def _check_masks(name: str, scores: Tensor, targets: Targets) -> None:
    if targets.target_mask is not None:
        shape, remedy = tuple(targets.ids.shape), "one entry for each of target_ids"
        _check_mask("target_mask", targets.target_mask, "[B, T]", shape, remedy)
    mask = targets.position_mask
    if mask is not None:
        axes, shape = "[B, S]", tuple(scores.shape[:2])
        if isinstance(mask, Tensor) and mask.dim() == 3:
            axes, shape = "[B, S, H]", (*shape, targets.heads)
        _check_mask("position_mask", mask, axes, shape, f"one entry for each position of {name}")


def _check_mask(name: str, mask: Tensor, axes: str, shape: tuple[int, ...], remedy: str) -> None:
    check_tensor(name, mask, axes)
    check_shape(name, mask, axes, shape, remedy)
    if mask.is_complex():
        raise TypeError(f"{name} must hold bools, integers or floats, got {mask.dtype}: {remedy}")
    if mask.is_floating_point() and is_readable(mask):
        bad = ~((mask >= 0) & mask.isfinite())
        if bad.any():
            place = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name}{place} is {float(mask[tuple(place)])}: entries must be finite and >= 0; "
                "set it to 0 to leave the pair out"
            )


def check_head_prior(head_prior: Tensor | None, heads: int) -> None:
    if head_prior is None:
        return
    remedy = "what each head's weights are multiplied by, a constant"
    check_float_tensor("head_prior", head_prior, "[H]", (heads,), remedy)
    if head_prior.requires_grad:
        raise ValueError("head_prior must be a constant, got one that requires grad: detach it")
    if is_readable(head_prior) and not bool(((head_prior >= 0) & head_prior.isfinite()).all()):
        raise ValueError(
            f"head_prior must be finite and >= 0, got {head_prior.tolist()}: set it to 0 to leave "
            "a head out"
        )


def check_ignore_index(ignore_index: int) -> None:
    remedy = "pass the id of the targets to leave out; one that is no id, as -100, leaves out none"
    check_whole("ignore_index", ignore_index, -(2**63), remedy)


def check_temperature(temperature: Tensor | float) -> None:
    remedy = "small values sharpen the weights, large ones flatten them"
    check_number("temperature", temperature, remedy)
    if isinstance(temperature, Tensor) and is_readable(temperature):
        check_number("temperature", temperature.item(), remedy)


def check_horizon(horizon: int | None, heads: int) -> None:
    if horizon is None:
        return
    check_whole("horizon", horizon, 1, "it is the number of heads, H")
    if horizon != heads:
        raise ValueError(
            f"horizon must equal the number of heads H = {heads}, got {horizon}: pass "
            f"horizon={heads}, or {horizon} heads"
        )


def check_discount(discount: float) -> None:
    if not (is_real(discount) and 0 <= discount <= 1):
        raise ValueError(
            f"discount must be in [0, 1], got {shown(discount)}: 0.95 is the usual choice"
        )


def check_one_weighting(**weightings: object) -> None:
    given = [name for name, value in weightings.items() if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} exclude each other: pass the one that defines the weights, "
            f"or none for uniform weights"
        )


def check_normalizer(normalizer: Tensor | float | None, reduction: str, heads: int) -> None:
    remedy = (
        "it replaces the denominator, e.g. the number of valid tokens over all accumulated batches"
    )
    if isinstance(normalizer, Tensor) and normalizer.dim() == 1:
        if reduction != "head_mean":
            raise ValueError(
                f"normalizer [H] goes with reduction='head_mean', got {reduction!r}: pass one "
                "number, which divides the whole loss"
            )
        check_float_or_whole("normalizer", normalizer, "[H]")
        check_shape("normalizer", normalizer, "[H]", (heads,), "what divides each head's sum")
    elif normalizer is not None:
        check_number("normalizer", normalizer, remedy)


def target_error(
    pair: tuple[int, int, int], target: int, vocabulary: int, ignore_index: int
) -> IndexError:
    """Of the pair (b, t, k)."""
    b, t, k = pair
    return IndexError(
        f"target_ids asks head {k} at [{b}, {t}] for {target}, outside [0, {vocabulary}) and not "
        f"ignore_index = {ignore_index}: check that tokenizer and logits share one vocabulary"
    )


def weight_error(position: str, weight: float, *, negative: bool) -> ValueError:
    """`negative`: whether it might be."""
    wanted = "finite" if negative else "finite and >= 0, for their sum divides the loss"
    return ValueError(
        f"head_weights{position} is {weight}: weights must be {wanted}; "
        f"set it to 0 to leave that head out"
    )
