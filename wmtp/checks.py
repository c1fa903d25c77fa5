"""What the public functions demand of their arguments: that each is right and fits the others."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wmtp.inplace import check_not_overwritten
from wmtp.kinds import (
    FLOAT_DTYPES,
    are_finite,
    check_constant,
    check_float_or_whole,
    check_float_tensor,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
    check_whole,
    is_readable,
    is_real,
    shape_message,
    shown,
)
from wmtp.labels import Targets

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
        last = axes[-2]
        if rank == 3:
            remedy = f"pass one head's, {name}[:, :, k]; or {name}[None], if they are [T, {last}]"
        elif logits.dim() == 3:
            remedy = (
                f"add the head axis with {name}.unsqueeze(2), or the batch axis, if they are "
                f"[N, H, {last}], with {name}[None] (and target_ids[None])"
            )
        elif logits.dim() == 2:
            remedy = f"pass {name}[None, :, None] and target_ids[None], if they are [T, {last}]"
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


def check_lm_heads(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Each head's own: lm_head_weight [H, V, D], and the bias [H, V] that goes with it."""
    *_, heads, dim = hidden.shape
    vocab_size = weight.shape[1]
    remedy = "one matrix for each head, or [V, D] for all"
    shape = (heads, vocab_size, dim)
    check_float_tensor("lm_head_weight", weight, "[H, V, D]", shape, remedy)
    if vocab_size == 0:
        raise ValueError(
            "lm_head_weight must have at least one vocabulary entry, got [H, 0, D]: pass [H, V, D]"
        )
    if bias is not None:
        remedy = "one number for each row of each head's lm_head_weight"
        check_float_tensor("lm_head_bias", bias, "[H, V]", (heads, vocab_size), remedy)
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


def check_head_prior(head_prior: Tensor | None, heads: int) -> None:
    if head_prior is None:
        return
    remedy = "what each head's weights are multiplied by, a constant"
    check_float_tensor("head_prior", head_prior, "[H]", (heads,), remedy)
    check_constant("head_prior", head_prior)
    if is_readable(head_prior) and not are_finite(head_prior):
        raise ValueError(
            f"head_prior must be finite and >= 0, got {head_prior.tolist()}: set it to 0 to leave "
            "a head out"
        )


def check_temperature(temperature: Tensor | float) -> None:
    remedy = "small values sharpen the weights, large ones flatten them"
    check_number("temperature", temperature, remedy)
    if isinstance(temperature, Tensor) and is_readable(temperature):
        check_number("temperature", temperature.item(), remedy)


def check_at_least_0(name: str, value: Tensor | float) -> None:
    _check_range(name, value, ">= 0", lambda number: number >= 0, "0 makes all weights alike")


def check_above_0(name: str, value: Tensor | float) -> None:
    _check_range(name, value, "> 0", lambda number: number > 0, "1 makes all weights alike")


def check_share(name: str, value: Tensor | float) -> None:
    remedy = "0.5 is the usual choice"
    _check_range(name, value, "in (0, 1]", lambda number: 0 < number <= 1, remedy)


def _check_range(
    name: str, value: Tensor | float, wanted: str, fits: Callable[[float], bool], remedy: str
) -> None:
    """A number, or a 0-d tensor, which is not looked into where that would wait."""
    number: Any = value
    if isinstance(value, Tensor):
        check_number(name, value, remedy)
        number = value.item() if is_readable(value) else 1.0
    if not (is_real(number) and abs(number) < math.inf and fits(number)):
        raise ValueError(f"{name} must be {wanted}, got {shown(number)}: {remedy}")


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
        if is_readable(normalizer) and not are_finite(normalizer.detach()):
            raise ValueError(
                f"normalizer must be finite and >= 0, got {normalizer.tolist()}: a head whose "
                "entry is 0 adds nothing"
            )
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


def raise_on_bad_weight(
    head_weights: Tensor, valid: Callable[[], Tensor], negative: bool = False
) -> None:
    """Weights, [B, S, H] or [H], are finite where they are valid, and >= 0 unless `negative`."""
    if not is_readable(head_weights) or are_finite(head_weights.detach(), negative):
        return
    bad = valid() & ~(((head_weights >= 0) | negative) & head_weights.isfinite())
    if bad.any():
        place = bad.nonzero()[0].tolist()
        weight = head_weights.expand(bad.shape)[tuple(place)]
        raise weight_error(str(place), float(weight), negative=negative)
