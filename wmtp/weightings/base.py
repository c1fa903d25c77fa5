"""What a weighting rule is, and how kernels know it.

B batch, S sequence, H heads.
"""

import ast
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from wmtp.labels import Targets


class Weighting:
    """A rule that says how much each pair of a token and a head counts in the loss.

    A rule is a frozen dataclass with `weights`, its eager formula, which is enough for every loss.
    Where it has a twin (`device` for Triton, `case` for the CPU), and the loss's divisor does not
    depend on its weights, the loss forms them in its one pass; elsewhere it reads the logits once
    for the cross entropies and once more for the gradient.

    Attributes:
        scope: what a weight follows from: "row", its own cross entropy, "token", those of all
            heads of its token, or more.
        selects: weights are 1 or 0; rows of weight 0 are left out of all but the cross entropies.
        reduction: of a loss that names none.
        sums_to_one: over the valid heads of each token.
        at_most_one: no weight is larger. float16 gradients are scaled for it.
        known: the weights do not depend on the cross entropies.
        numbers: the fields that are numbers or 0-d tensors, which a twin reads in this order; they
            reach the operators as tensors, so that a new value compiles nothing.
        compares: with a field `ref_ce`, indexed by the token it is about, which `weights` gets as
            [B, S, H], lined up with the heads.
        needs: what `weights` is given besides, by name: "entropy", [B, S, H] nats, of the softmax
            of each pair's logits, which the same read of them finds.
        case: its name in kernels/cpu/weights.h; "" where it has none there.

    Example: weights that favour what the model already finds likely.

        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, eq=False)
        ... class Likely(Weighting):
        ...     at_most_one = True
        ...     def weights(self, ce, valid):
        ...         return torch.where(valid, torch.exp(-ce), 0.0)
        >>> Likely().weights(torch.tensor([[[0.0, 0.6931]]]), torch.tensor([[[True, True]]]))
        tensor([[[1.0000, 0.5000]]])
    """

    scope: ClassVar[str] = "row"
    reduction: ClassVar[str] = "token_mean"
    sums_to_one: ClassVar[bool] = False
    at_most_one: ClassVar[bool] = False
    known: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ()
    compares: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    selects: ClassVar[bool] = False
    _name: ClassVar[str]  # among the operators

    def weights(self, ce: Tensor, valid: Tensor) -> Tensor:
        """The weights, by plain torch operations.

        Args:
            ce: [B, S, H] float, nats, 0 where not valid; without gradient.
            valid: [B, S, H] bool.

        Returns:
            [B, S, H] of ce's dtype, >= 0, 0 where not valid.
        """
        raise NotImplementedError(f"{type(self).__name__} has no formula: define weights()")

    @property
    def device(self) -> Callable[..., Any] | None:
        """Its Triton twin: a plain function of (ce, valid, ref_ce, entropy [HEADS], numbers_ptr) in
        the language of `tl`, a name that is bound when the function is first needed. Of ref_ce and
        entropy there is what the rule asks for."""
        return None

    @property
    def case(self) -> str:
        return ""

    def check(self, name: str, scores: Tensor, targets: Targets) -> None:
        """Raises where the rule does not fit `scores` [B, S, H, ...], of that name, and what they
        are asked for."""

    def narrowed(self, targets: Targets) -> Targets:
        """Those of the pairs that the rule can weigh."""
        return targets

    def resolved(self, targets: Targets) -> "Weighting":
        """The rule that the operators take: itself, or `Given` where labels tell its weights."""
        return self

    def parts(self) -> "tuple[Weighting, ...]":
        """The rules whose weights are multiplied: itself, unless it is a product."""
        return (self,)

    def __mul__(self, other: "Weighting") -> "Weighting":
        """The rule whose weights are the products of both rules' weights."""
        from wmtp.weightings.product import Product  # a rule itself

        if not isinstance(other, Weighting):
            return NotImplemented
        return Product((*self.parts(), *other.parts()))

    def with_fields(self, **fields: Any) -> "Weighting":
        """The same rule with other values of these fields."""
        return type(self)(**{**vars(self), **fields})

    def key(self) -> str:
        """What the operators know it by: its class, and those of its fields that choose a twin."""
        fields = {name: value for name, value in vars(self).items() if type(value) in (str, bool)}
        return f"{self._name} {fields}"

    @classmethod
    def _known_by(cls, fields: dict[str, Any]) -> "Weighting":
        """Of those fields that are in its key, the others None."""
        return cls(**fields)

    def with_numbers(self, numbers: Sequence[Tensor]) -> "Weighting":
        """The same rule with other `numbers`."""
        return self.with_fields(**dict(zip(self.numbers, numbers, strict=True)))

    def number_values(self) -> "list[Tensor | float]":
        """Those of `numbers`."""
        return [getattr(self, name) for name in self.numbers]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        name = f"{cls.__module__}.{cls.__qualname__}"
        while name in _CLASSES:  # defined anew, as in a notebook: another rule
            name += "'"
        cls._name, _CLASSES[name] = name, cls


def field_of(rule: Weighting, name: str) -> Any:
    """Of the first part of a rule that has such a field; None where none has."""
    found = (getattr(part, name, None) for part in rule.parts())
    return next((value for value in found if value is not None), None)


def fields_of(rule: Weighting) -> dict[str, Any]:
    """Of all its parts, by names that tell them apart."""
    parts = rule.parts()
    if len(parts) == 1:
        return vars(rule)
    return {
        f"{name} of rule {i}, {type(part).__name__},": value
        for i, part in enumerate(parts)
        for name, value in vars(part).items()
    }


def with_field_values(rule: Weighting, values: Sequence[Any]) -> Weighting:
    """The same rule with other values, in the order of `fields_of`."""
    left, parts = list(values), []
    for part in rule.parts():
        names = list(vars(part))
        parts.append(part.with_fields(**dict(zip(names, left[: len(names)], strict=True))))
        left = left[len(names) :]
    return functools.reduce(Weighting.__mul__, parts)


_CLASSES: dict[str, type[Weighting]] = {}


@functools.cache
def rule_of(key: str) -> Weighting:
    """The rule of a `Weighting.key`, without its numbers and tensors."""
    name, _, fields = key.partition(" ")
    cls = _CLASSES[name]
    empty = dict.fromkeys(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    return cls._known_by({**empty, **ast.literal_eval(fields)})


def softmax_over_heads(score: Tensor, valid: Tensor, temperature: Tensor | float) -> Tensor:
    """softmax of score [..., H] / temperature over the valid heads of each token; 0 elsewhere."""
    score = score.masked_fill(~valid, float("-inf"))
    below_max = (score - score.amax(-1, keepdim=True)) / temperature  # in range, unlike the score's
    return torch.where(valid, below_max.softmax(-1), 0.0)


@overload
def as_tensor(number: None) -> None: ...
@overload
def as_tensor(number: Tensor | float) -> Tensor: ...
def as_tensor(number: Tensor | float | None) -> Tensor | None:
    """A constant, whatever it was."""
    if number is None or isinstance(number, Tensor):
        return None if number is None else number.detach()
    if torch.compiler.is_compiling():  # a product can be traced for any number, a fill for this one
        return torch.ones((), dtype=torch.float64, device="cpu") * number
    return torch.tensor(number, dtype=torch.float64, device="cpu")
