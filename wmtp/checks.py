"""What every public function demands of its arguments, each demand with its one error message."""

import math
import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from wmtp.inplace import check_not_overwritten, has_storage

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("token_mean", "weight_mean", "sum")
EXCESSES = ("abs", "signed")


def check_loss_arguments(
    logits: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None,
    *,
    ref_logits: Tensor | None,
    ref_ce: Tensor | None,
    temperature: float,
    excess: str,
    reduction: str,
    normalizer: Tensor | float | None,
    horizon: int | None,
) -> None:
    """Everything about the arguments that can be known without reading a tensor's values."""
    check_logits("logits", logits, "[B, S, H, V]")
    check_one_weighting(head_weights=head_weights, ref_logits=ref_logits, ref_ce=ref_ce)
    if ref_logits is not None:
        check_logits("ref_logits", ref_logits, "[B, S, V]")
        shape = (*logits.shape[:2], ref_logits.shape[2])
        check_shape("ref_logits", ref_logits, "[B, S, V]", shape, "same batch as the logits")
        check_same_device(logits, ref_logits=ref_logits)
    check_weighting(
        logits,
        target_ids,
        head_weights,
        ref_ce=ref_ce,
        temperature=temperature,
        excess=excess,
        reduction=reduction,
        normalizer=normalizer,
        horizon=horizon,
    )


def check_weighting(
    scores: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None,
    *,
    ref_ce: Tensor | None,
    temperature: float,
    excess: str,
    reduction: str,
    normalizer: Tensor | float | None,
    horizon: int | None,
) -> None:
    """What goes with logits [B, S, H, V] or hidden states [B, S, H, D], checked before."""
    batch, length, heads, _ = scores.shape
    check_target_ids(target_ids, batch, length)
    check_horizon(horizon, heads)
    check_one_weighting(head_weights=head_weights, ref_ce=ref_ce)
    if head_weights is not None:
        shape, remedy = (batch, length, heads), "one weight per token and head"
        check_float_tensor("head_weights", head_weights, "[B, S, H]", shape, remedy)
    if ref_ce is not None:
        check_ref_ce(ref_ce, batch, length)
    check_temperature(temperature)
    check_choice("excess", excess, EXCESSES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_normalizer(normalizer)
    check_same_device(
        scores,
        target_ids=target_ids,
        head_weights=head_weights,
        ref_ce=ref_ce,
        normalizer=normalizer,
    )


def check_ref_ce(ref_ce: Tensor, batch: int, length: int) -> None:
    shape = (batch, max(length - 1, 0))
    remedy = "position t is the reference's loss on target_ids[t + 1]"
    check_float_tensor("ref_ce", ref_ce, "[B, S-1]", shape, remedy)


def check_logits(name: str, logits: Tensor, axes: str) -> None:
    """`axes` names the dimensions, e.g. "[B, S, H, V]"; the last one may not be empty."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor {axes}, got {type(logits).__name__}")
    if logits.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}: "
            f"pass {'unnormalised scores' if axes.endswith('V]') else 'hidden states'}, not ids"
        )
    if not torch.compiler.is_compiling() and has_storage(logits):
        check_not_overwritten(name, logits)
    rank = axes.count(",") + 1
    if logits.dim() != rank:
        remedy = f"add the head axis with {name}.unsqueeze(2)" if logits.dim() + 1 == rank else ""
        raise ValueError(_shape_message(name, axes, None, logits, remedy))
    if any(size == 0 for size in logits.shape[2:]):
        entry = "vocabulary entry" if axes.endswith("V]") else "channel"
        raise ValueError(
            f"{name} must have at least one head and one {entry}, got shape {tuple(logits.shape)}"
        )


def check_lm_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """lm_head_weight [V, D], and the bias [V] that goes with it."""
    dim = hidden.shape[-1]
    remedy = "pass lm_head.weight as torch.nn.Linear has it"
    vocab_size = len(weight) if isinstance(weight, Tensor) and weight.dim() else 1
    check_float_tensor("lm_head_weight", weight, "[V, D]", (vocab_size, dim), remedy)
    if vocab_size == 0:
        raise ValueError("lm_head_weight must have at least one vocabulary entry, got [0, D]")
    if bias is not None:
        remedy = "one number for each row of lm_head_weight"
        check_float_tensor("lm_head_bias", bias, "[V]", (vocab_size,), remedy)
    check_same_device(hidden, lm_head_weight=weight, lm_head_bias=bias)


def check_one_dtype(found: Sequence[torch.dtype]) -> None:
    if len(set(found)) > 1:
        names = " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in found}))
        raise TypeError(
            f"hidden, lm_head_weight and lm_head_bias must have one dtype, got {names}: convert "
            f"one, or call this under torch.autocast"
        )


def check_accum_dtype(accum_dtype: torch.dtype | None, weight_dtype: torch.dtype) -> None:
    if accum_dtype not in (None, weight_dtype, torch.promote_types(weight_dtype, torch.float32)):
        raise ValueError(
            f"grad_accum_dtype must be float32 or the weight's own {weight_dtype}, and not "
            f"narrower than that, got {accum_dtype}: pass None for the wider of the two"
        )


def check_chunk_bytes(chunk_bytes: int | None) -> None:
    whole = isinstance(chunk_bytes, numbers.Integral) and not isinstance(chunk_bytes, bool)
    if chunk_bytes is not None and not (whole and 1 <= chunk_bytes < 2**63):
        raise ValueError(
            f"chunk_bytes must be a whole number >= 1, got {chunk_bytes!r}: it bounds the memory "
            f"of the logits that exist at a time; pass None for the default"
        )


def check_head_list(heads: Sequence[Tensor]) -> None:
    """H tensors [B, S, V], alike but for their memory."""
    if not heads:
        raise ValueError("logits must have at least one head, got an empty list: pass H tensors")
    for head in heads:
        check_logits("each head's logits", head, "[B, S, V]")
    for what in ("shape", "dtype", "device"):
        found = {str(getattr(head, what)).removeprefix("torch.") for head in heads}
        if len(found) > 1:
            raise ValueError(
                f"all heads' logits must have one {what}, got {' and '.join(sorted(found))}: "
                f"pass H tensors [B, S, V] that are alike"
            )


def check_target_ids(target_ids: Tensor, batch: int, length: int) -> None:
    if not isinstance(target_ids, Tensor):
        raise TypeError(f"target_ids must be a tensor [B, S], got {type(target_ids).__name__}")
    if target_ids.dtype == torch.bool or target_ids.is_floating_point() or target_ids.is_complex():
        raise TypeError(
            f"target_ids must hold integers, got {target_ids.dtype}: pass token ids as int64"
        )
    check_shape("target_ids", target_ids, "[B, S]", (batch, length), "pass unshifted ids")


def check_float_tensor(
    name: str, values: Tensor, axes: str, shape: tuple[int, ...], remedy: str
) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor {axes}, got {type(values).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {values.dtype}: pass {name}.float()")
    check_shape(name, values, axes, shape, remedy)


def check_scores(name: str, values: Tensor, axes: str) -> tuple[int, ...]:
    """A float tensor of any sizes; its shape."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor {axes}, got {type(values).__name__}")
    if values.dim() != axes.count(",") + 1:
        raise ValueError(_shape_message(name, axes, None, values, ""))
    if not values.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {values.dtype}")
    return tuple(values.shape)


def check_shape(name: str, values: Tensor, axes: str, shape: tuple[int, ...], remedy: str) -> None:
    if tuple(values.shape) != shape:
        raise ValueError(_shape_message(name, axes, shape, values, remedy))


def _shape_message(
    name: str, axes: str, shape: tuple[int, ...] | None, values: Tensor, remedy: str
) -> str:
    wanted = axes if shape is None else f"{axes} = {shape}"
    return f"{name} must be {wanted}, got {tuple(values.shape)}" + (f": {remedy}" if remedy else "")


def check_same_device(logits: Tensor, **others: Tensor | float | None) -> None:
    for name, other in others.items():
        # A 0-d tensor on the CPU mixes with any device, as everywhere in torch.
        if isinstance(other, Tensor) and other.dim() > 0 and other.device != logits.device:
            raise ValueError(
                f"{name} is on {other.device}, and what it goes with on {logits.device}: "
                f"move it with {name}.to({str(logits.device)!r})"
            )


def check_temperature(temperature: float) -> None:
    if not (isinstance(temperature, numbers.Real) and 0 < temperature < math.inf):
        raise ValueError(
            f"temperature must be a finite number > 0, got {temperature!r}: "
            f"small values sharpen the weights, large ones flatten them"
        )


def check_horizon(horizon: int | None, heads: int) -> None:
    if horizon is not None and horizon != heads:
        raise ValueError(
            f"horizon must equal the number of heads H = {heads}, got {horizon}: pass "
            f"horizon={heads}, or {horizon} heads"
        )


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in (known := tuple(choices)):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_one_weighting(**weightings: Tensor | None) -> None:
    given = [name for name, value in weightings.items() if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} exclude each other: pass the one that defines the weights, "
            f"or none for uniform weights"
        )


def check_normalizer(normalizer: Tensor | float | None) -> None:
    if normalizer is None:
        return
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1 or normalizer.dim() != 0:
            raise ValueError(
                f"normalizer must be a number or a 0-d tensor, got shape {tuple(normalizer.shape)}"
            )
    elif not (isinstance(normalizer, numbers.Real) and 0 < normalizer < math.inf):
        raise ValueError(
            f"normalizer must be a finite number > 0, got {normalizer!r}: it replaces the "
            f"denominator, e.g. the number of valid tokens over all accumulated batches"
        )


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
