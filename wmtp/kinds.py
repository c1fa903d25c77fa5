"""What kind of object an argument is: each demand with its one error message.

A message says what was found, what was wanted, and the remedy.
"""

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from wmtp.layout import has_storage

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
# torch's symbolic numbers, which are no numbers.Real; a bool is one, but no number to us.
_WHOLE = (int, torch.SymInt, numbers.Integral)
_REAL = (float, torch.SymFloat, numbers.Real, *_WHOLE)

# Where the objects that people have at hand keep what is wanted of them.
_INSIDE = {
    "logits": "logits",
    "ref_logits": "logits",
    "hidden": "last_hidden_state",
    "lm_head_weight": "weight",
    "lm_head_bias": "bias",
}


def check_tensor(name: str, value: Tensor, axes: str) -> None:
    """`axes` names the dimensions wanted, e.g. "[B, S]"."""
    if not isinstance(value, Tensor):
        _raise_no_tensor(name, value, axes)
    if value.layout is not torch.strided or value.is_nested:
        found = "a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor {axes}, got {found}: {_dense(name, value)}")


def _dense(name: str, value: Tensor) -> str:
    if value.is_nested:
        return f"pass torch.nested.to_padded_tensor({name}, 0.0)"
    return f"pass {name}.to_dense()"


def _raise_no_tensor(name: str, value: Any, axes: str) -> NoReturn:
    inside = _INSIDE.get(name.split()[-1], "")
    remedy = "pass a tensor"
    if inside and isinstance(getattr(value, inside, None), Tensor):
        remedy = f"pass .{inside}"
    elif inside and isinstance(value, Mapping) and inside in value:
        remedy = f'pass ["{inside}"]'
    elif hasattr(value, "__array__"):
        remedy = "pass torch.as_tensor of it"
    elif isinstance(value, (list, tuple)):
        remedy = "pass torch.tensor of it"
    raise TypeError(f"{name} must be a tensor {axes}, got {type(value).__name__}: {remedy}")


def check_float_tensor(
    name: str, value: Tensor, axes: str, shape: tuple[int, ...], remedy: str
) -> None:
    check_tensor(name, value, axes)
    _check_floating(name, value)
    check_shape(name, value, axes, shape, remedy)


def check_scores(name: str, value: Tensor, axes: str) -> tuple[int, ...]:
    """A float tensor of any sizes; its shape."""
    check_tensor(name, value, axes)
    if value.dim() != axes.count(",") + 1:
        raise ValueError(shape_message(name, axes, None, value, "pass one number for each"))
    _check_floating(name, value, FLOAT_DTYPES)
    return tuple(value.shape)


def _check_floating(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...] = ()) -> None:
    if not value.is_floating_point() or (dtypes and value.dtype not in dtypes):
        raise TypeError(f"{name} must be floating point, got {value.dtype}: pass {name}.float()")


def check_integers(name: str, value: Tensor, axes: str) -> None:
    check_tensor(name, value, axes)
    if value.dtype not in INTEGER_DTYPES:
        remedy = "token ids as int64" if name.endswith("target_ids") else f"{name}.long()"
        raise TypeError(f"{name} must hold integers, got {value.dtype}: pass {remedy}")


def check_shape(name: str, value: Tensor, axes: str, shape: tuple[int, ...], remedy: str) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(shape_message(name, axes, shape, value, remedy))


def shape_message(
    name: str, axes: str, shape: tuple[int, ...] | None, value: Tensor, remedy: str
) -> str:
    wanted = axes if shape is None else f"{axes} = {shape}"
    return f"{name} must be {wanted}, got {tuple(value.shape)}: {remedy}"


def check_same_device(name: str, scores: Tensor, **others: Tensor | float | None) -> None:
    """That of `name`, the scores."""
    for key, other in others.items():
        if not isinstance(other, Tensor) or other.device == scores.device:
            continue
        # A 0-d tensor on the CPU mixes with any device, as everywhere in torch.
        if other.dim() > 0 or other.device.type != "cpu":
            raise ValueError(
                f"{key} is on {other.device}, and {name} on {scores.device}: move it with "
                f"{key}.to({str(scores.device)!r})"
            )


def check_number(name: str, value: Tensor | float, remedy: str) -> None:
    """A finite number > 0, or a 0-d tensor, which is not looked into where that would wait."""
    if isinstance(value, Tensor):
        check_tensor(name, value, "[]")
        if value.dim() != 0 or not (value.is_floating_point() or value.dtype in INTEGER_DTYPES):
            raise ValueError(
                f"{name} must be a number or a 0-d tensor of one, got {value.dtype} "
                f"{tuple(value.shape)}: {remedy}"
            )
    elif not (is_real(value) and 0 < value < math.inf):
        raise ValueError(f"{name} must be a finite number > 0, got {shown(value)}: {remedy}")


def check_constant(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"{name} must be a constant, got one that requires grad: detach it")


def check_float_or_whole(name: str, value: Tensor, axes: str) -> None:
    check_tensor(name, value, axes)
    if not (value.is_floating_point() or value.dtype in INTEGER_DTYPES):
        raise TypeError(f"{name} must hold numbers, got {value.dtype}: pass {name}.float()")


def shown(value: Any) -> str:
    """A number or a word as it is; of anything else, which may be large, its type."""
    plain = value is None or isinstance(value, (*_REAL, str))
    return repr(value) if plain else type(value).__name__


def is_real(value: Any) -> bool:
    return isinstance(value, _REAL) and not isinstance(value, bool)


def check_whole(name: str, value: int, least: int, remedy: str) -> None:
    """A whole number of [least, 2**63)."""
    if not (is_whole(value) and least <= value < 2**63):
        wanted = f">= {least}" if least > -(2**63) else "that an int64 holds"
        raise ValueError(f"{name} must be a whole number {wanted}, got {shown(value)}: {remedy}")


def is_whole(value: Any) -> bool:
    return isinstance(value, _WHOLE) and not isinstance(value, bool)


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {shown(value)}: pass True or False")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        listed = ", ".join(map(repr, known))
        raise ValueError(f"{name} must be one of {listed}, got {shown(value)}: pass one of these")


def are_finite(values: Tensor, negative: bool = False) -> bool:
    """All of them, and >= 0 unless `negative`; by one read."""
    if not values.numel():
        return True
    least, most = (value.item() for value in torch.aminmax(values))
    return (-math.inf if negative else 0) <= least and -math.inf < least and most < math.inf


def is_readable(tensor: Tensor) -> bool:
    """Whether its values may be looked at: on the CPU, elsewhere that would wait; now, and no
    tracer's or vmap's stand-in for it."""
    return tensor.device.type == "cpu" and has_storage(tensor)
