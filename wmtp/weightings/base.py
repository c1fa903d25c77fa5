"""What a weighting rule is, and how kernels know it.

B batch, S sequence, H heads.
"""

import ast
import functools
from collections.abc import Callable
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
        scope: what a weight follows from: "row", its own cross entropy, or "token", those of all
            heads of its token.
        reduction: of a loss that names none.
        sums_to_one: over the valid heads of each token.
        at_most_one: no weight is larger. float16 gradients are scaled for it.
        known: the weights do not depend on the cross entropies.
        numbers: the fields that are numbers or 0-d tensors, which a twin reads in this order; they
            reach the operators as tensors, so that a new value compiles nothing.
        compares: with a field `ref_ce`, indexed by the token it is about, which `weights` gets as
            [B, S, H], lined up with the heads.
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
        """Its Triton twin: a plain function of (ce, valid, ref_ce [HEADS], numbers_ptr) in the
        language of `tl`, a name that is bound when the function is first needed."""
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

    def with_fields(self, **fields: Any) -> "Weighting":
        """The same rule with other values of these fields."""
        return type(self)(**{**vars(self), **fields})

    def key(self) -> str:
        """What the operators know it by: its class, and those of its fields that choose a twin."""
        fields = {name: value for name, value in vars(self).items() if type(value) in (str, bool)}
        return f"{self._name} {fields}"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        name = f"{cls.__module__}.{cls.__qualname__}"
        while name in _CLASSES:  # defined anew, as in a notebook: another rule
            name += "'"
        cls._name, _CLASSES[name] = name, cls


_CLASSES: dict[str, type[Weighting]] = {}


@functools.cache
def rule_of(key: str) -> Weighting:
    """The rule of a `Weighting.key`, without its numbers and tensors."""
    name, _, fields = key.partition(" ")
    cls = _CLASSES[name]
    empty = dict.fromkeys(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    return cls(**{**empty, **ast.literal_eval(fields)})


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
