"""The records that pass from the public losses down to the backends, and their schemas.

B batch, S sequence, H heads, V vocabulary, D hidden size. "acc" is float32, float64 for float64
logits or hidden states. Tensors are on one device, but that 0-d ones may be on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from wmtp.numerics import PLAIN, Numerics

R = TypeVar("R")


@dataclass(slots=True, kw_only=True)
class LossInputs:
    """The tensors that both losses have."""

    # int64, last stride 1: [B, L], head k at t predicts [b, t + k], or [B, S, H], each head's own
    target_ids: Tensor
    # [B, S, H] acc, contiguous: those of the rule Given; another's are multiplied by them
    head_weights: Tensor | None = None
    head_scale: Tensor | None = None  # [H] acc: multiplies a head's weights, once summed up
    # acc, last stride 1, nats, what the rule compares with: [B, L], at t + k, or [B, S, H]
    ref_ce: Tensor | None = None
    numbers: Tensor | None = None  # [n], the rule's
    normalizer: Tensor | None = None  # [], replaces the denominator
    # [B, S, V'] logits of another model, which ref_ce is made of; target_ids are [B, L <= S]
    teacher: Tensor | None = None


@dataclass(slots=True, kw_only=True)
class RowSettings:
    """The plain values that say what a row of logits is to its cross entropy."""

    ignore_index: int  # a target of this id is no target
    backend: str  # of `backends.BACKENDS`
    numerics: Numerics = PLAIN
    vocab_size: int | None = None  # the columns that are tokens; the rest is padding. None: all
    metrics: bool = False  # entropy and correct are wanted
    shared_heads: bool = False  # of heads that are one row the sum of their gradients is wanted


@dataclass(slots=True, kw_only=True)
class LossSettings(RowSettings):
    """The plain values that both losses have."""

    rule: str  # `Weighting.key`
    reduction: str  # of `reduction.Terms`
    checked: bool = False  # head_weights may be anything; else the CPU refuses NaN, inf, negative


@dataclass(slots=True, kw_only=True)
class Inputs(LossInputs):
    """The tensors of the loss on logits."""

    # [B, S, H, V], or H of [B, S, V]: heads in memory of their own. float32, bfloat16, float16 or
    # float64; to a backend of last stride 1, any other strides, and heads of equal ones.
    logits: list[Tensor]


@dataclass(slots=True, kw_only=True)
class Settings(LossSettings):
    """The plain values of the loss on logits."""

    gradient: str = "none"  # written with the loss: "none", "new", or "inplace" over the logits
    once: bool = False  # the permission to write in place serves one backward


class Outputs(NamedTuple):
    """What the loss on logits leaves."""

    loss: Tensor  # []                      sum row_scalar f
    valid_mask: Tensor  # [B, S] bool       sum_k |w| > 1e-8
    ce: Tensor  # [B, S, H] acc             0 without a target, and so the rows' statistics
    row_loss: Tensor  # [B, S, H] acc       f of `numerics`; [0] where that is ce
    token_loss: Tensor  # [B, S] acc        sum_k w f, over sum_k w for token_mean
    weight_sum: Tensor  # [B, S] acc        sum_k |w|
    row_scalar: Tensor  # [B, S, H] acc     dloss / df
    row_max: Tensor  # [B, S, H] acc        max x, and
    log_sum: Tensor  # [B, S, H] acc        log sum exp(x - max): added up they would lose digits
    entropy: Tensor  # [B, S, H] acc        of softmax(x), and the next; [0] without `metrics`
    correct: Tensor  # [B, S, H] bool       the target is the first of the largest logits
    factors: Tensor  # [2] acc              1 / denominator; what grad is still to be multiplied by
    grad: Tensor  # of the logits' dtype    row_scalar df/dlogits; [0] where not wanted.
    # [B, S, H, V]; shared heads: [B, S, 1, V], an H-th of their sum, for autograd adds them up


def new_outputs(rows: Tensor, heads: int, settings: RowSettings) -> Outputs:
    """Of logits [B, S, ...]; nothing is written yet, and grad is not there."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    tokens, measured = rows.shape[:2], settings.metrics

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=rows.device)

    def of_rows(dtype: torch.dtype = dtype, wanted: bool = True) -> Tensor:
        return new(*(*tokens, heads) if wanted else (0,), dtype=dtype)

    return Outputs(
        loss=new(),
        valid_mask=new(*tokens, dtype=torch.bool),
        ce=of_rows(),
        row_loss=of_rows(wanted=settings.numerics.adds_terms),
        token_loss=new(*tokens),
        weight_sum=new(*tokens),
        row_scalar=of_rows(),
        row_max=of_rows(),
        log_sum=of_rows(),
        entropy=of_rows(wanted=measured),
        correct=of_rows(torch.bool, measured),
        factors=new(2),
        grad=rows.new_empty(0),
    )


@dataclass(slots=True)
class RowInputs:
    """The tensors of a gradient row by row, grad = row_scalar df/dlogits."""

    logits: Tensor  # [B, S, H, V]
    target_ids: Tensor  # as in LossInputs
    row_max: Tensor  # [B, S, H] acc, contiguous, and the next two
    log_sum: Tensor
    row_scalar: Tensor  # of any sign


class RowOutputs(NamedTuple):
    """What rows of logits [R, V] leave, [R] each; [0] as in Outputs."""

    ce: Tensor
    row_loss: Tensor
    row_max: Tensor
    log_sum: Tensor
    entropy: Tensor
    correct: Tensor


@dataclass(slots=True, kw_only=True)
class LinearInputs(LossInputs):
    """The tensors of the loss on hidden states."""

    hidden: Tensor  # [B, S, H, D], any strides
    weight: Tensor  # [V, D], or each head's own, [H, V, D]
    bias: Tensor | None = None  # [V] or [H, V], likewise


@dataclass(slots=True, kw_only=True)
class LinearSettings(LossSettings):
    """The plain values of the loss on hidden states."""

    dtype: torch.dtype  # of the products
    accum_dtype: torch.dtype  # of the weight's and bias's gradient while they are summed up
    chunk_bytes: int | None = None
    wanted: list[bool]  # the gradients of hidden, weight, bias
    hidden_grad_heads: list[int] | None = None  # whose rows have that of hidden; None: all
    weight_grad_heads: list[int] | None = None  # whose rows are in that of weight and bias
    ahead: bool = False  # they are made with the loss


class LinearOutputs(NamedTuple):
    """What the loss on hidden states leaves."""

    loss: Tensor  # []
    valid_mask: Tensor  # [B, S] bool
    ce: Tensor  # [B, S, H] acc
    row_loss: Tensor  # [B, S, H] acc       as in Outputs, and so the next two
    entropy: Tensor
    correct: Tensor
    lse: Tensor  # [B, S, H] acc            [0] without `metrics`
    row_scalar: Tensor  # [B, S, H] acc     dloss / df
    unscale: Tensor  # [] acc               left to multiply the sums with: 1 but for float16
    hidden_sum: Tensor  # [B, S, H, D]      see `sums.Gradients`; [0] where not wanted
    weight_sum: Tensor  # [V, D] or [H, V, D]
    bias_sum: Tensor  # [V] or [H, V]


_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    str: "str",
    int: "int",
    int | None: "SymInt?",
    bool: "bool",
    list[bool]: "bool[]",
    list[int] | None: "int[]?",
    torch.dtype: "ScalarType",
    Numerics: "float[]",
}


_NAMES: dict[type, tuple[str, ...]] = {
    record: tuple(field.name for field in fields(record))
    for record in (Inputs, Settings, RowInputs, RowSettings, LinearInputs, LinearSettings)
}
_NAMES |= {record: record._fields for record in (Outputs, LinearOutputs)}


def rows_of(outputs: Outputs) -> RowOutputs:
    """Of logits [1, R, 1, V]."""
    return RowOutputs(*(getattr(outputs, name).flatten() for name in RowOutputs._fields))


def row_settings(settings: RowSettings) -> RowSettings:
    """What a loss's settings say of rows, without statistics: a gradient has none."""
    return RowSettings(
        ignore_index=settings.ignore_index,
        backend=settings.backend,
        numerics=settings.numerics,
        vocab_size=settings.vocab_size,
        shared_heads=settings.shared_heads,
    )


def names_of(record: type) -> tuple[str, ...]:
    return _NAMES[record]


def schema_of(*records: type) -> str:
    """The operator's arguments, or what it returns: the fields of the records, in order."""
    return ", ".join(
        f"{_SCHEMA[get_type_hints(record)[name]]} {name}"
        for record in records
        for name in _NAMES[record]
    )


def flat(*records: Any) -> list[Any]:
    """The records' values, in the order of `schema_of`."""
    return [getattr(record, name) for record in records for name in _NAMES[type(record)]]


def unflat(values: Any, *records: type[R]) -> tuple[Any, ...]:
    """The records that `flat` has made `values` of."""
    found, begin = [], 0
    for record in records:
        names = _NAMES[record]
        of_record = dict(zip(names, values[begin:], strict=False))
        if isinstance(of_record.get("numerics"), Sequence):  # the operators have a list
            of_record["numerics"] = Numerics(*of_record["numerics"])
        found.append(record(**of_record))
        begin += len(names)
    return *found, *values[begin:]
