"""What the public functions demand of their arguments: that each is right and fits the others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wmtp.inplace import check_not_overwritten
from wmtp.kinds import (
    FLOAT_DTYPES,
    check_float_tensor,
    check_integers,
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

REDUCTIONS = ("token_mean", "weight_mean", "sum")
EXCESSES = ("abs", "signed")


def check_targets_of(name: str, scores: Tensor, target_ids: Tensor, ignore_index: int) -> None:
    """What goes with [B, S, ...] where no weights do."""
    check_target_ids(target_ids, name, scores)
    check_ignore_index(ignore_index)
    check_same_device(name, scores, target_ids=target_ids)


def check_ref_ce(ref_ce: Tensor, batch: int, length: int) -> None:
    shape = (batch, max(length - 1, 0))
    remedy = "position t is the reference's loss on target_ids[t + 1]"
    check_float_tensor("ref_ce", ref_ce, "[B, S-1]", shape, remedy)


def check_ref_logits(ref_logits: Tensor, name: str, scores: Tensor) -> None:
    check_logits("ref_logits", ref_logits, "[B, S, V]")
    shape = (*scores.shape[:2], ref_logits.shape[2])
    check_shape("ref_logits", ref_logits, "[B, S, V]", shape, f"same batch as the {name}")


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


def check_target_ids(target_ids: Tensor, name: str, scores: Tensor) -> None:
    """The targets of `name`, [B, S, ...]."""
    check_integers("target_ids", target_ids, "[B, S]")
    shape, found = tuple(scores.shape[:2]), tuple(target_ids.shape)
    if found == shape:
        return
    remedy = f"pass unshifted ids, one for each position of {name}"
    if scores.dim() == 4 and found == (scores.shape[0], scores.shape[2]):
        remedy = f"{name} seems to be [B, H, S, ...], pass {name}.transpose(1, 2)"
    elif found == shape[::-1]:
        remedy = f"{name} seems to be [S, B, ...], pass {name}.transpose(0, 1)"
    raise ValueError(shape_message("target_ids", "[B, S]", shape, target_ids, remedy))


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


def check_normalizer(normalizer: Tensor | float | None) -> None:
    remedy = (
        "it replaces the denominator, e.g. the number of valid tokens over all accumulated batches"
    )
    if normalizer is not None:
        check_number("normalizer", normalizer, remedy)


def target_error(position: str, target: int, vocabulary: int, ignore_index: int) -> IndexError:
    return IndexError(
        f"target_ids{position} is {target}, outside [0, {vocabulary}) and not "
        f"ignore_index = {ignore_index}: check that tokenizer and logits share one vocabulary"
    )


def weight_error(position: str, weight: float) -> ValueError:
    return ValueError(
        f"head_weights{position} is {weight}: weights must be finite and >= 0; "
        f"set it to 0 to leave that head out"
    )
