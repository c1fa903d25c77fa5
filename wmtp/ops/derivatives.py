"""What the backward of both operators is made of: d/df, d/dw, and who may be differentiated again.

B batch, S sequence, H heads.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from wmtp import reference
from wmtp.exact_zero import product
from wmtp.labels import as_targets
from wmtp.numerics import Numerics
from wmtp.records import LossSettings
from wmtp.reduction import Terms
from wmtp.weightings import Given


def no_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise NotImplementedError(
        "the fused loss has no second derivative: use backend='eager' to differentiate twice"
    )


class Upstream(NamedTuple):
    """The gradients of what a loss's operator returns; None: that was not used."""

    loss: Tensor | None = None  # []
    ce: Tensor | None = None  # [B, S, H], and the next
    row_loss: Tensor | None = None

    @classmethod
    def of(cls, grads: Sequence[Tensor | None]) -> "Upstream":
        """Of those of `Outputs` or `LinearOutputs`, in order."""
        loss, _valid_mask, ce, row_loss = grads[:4]
        return cls(loss, ce, row_loss)

    @property
    def none(self) -> bool:
        return self.loss is None and self.of_pairs is None

    @property
    def of_pairs(self) -> Tensor | None:
        """Of ce or row_loss, whichever was used."""
        return self.row_loss if self.ce is None else self.ce

    def of_rows(self, row_scalar: Tensor) -> Tensor:
        """[B, S, H], d/df of what backward was called on, f being what the loss averages."""
        scalar = torch.zeros_like(row_scalar) if self.row_loss is None else self.row_loss
        return scalar if self.loss is None else scalar + product(self.loss, row_scalar)

    def sources(self, row_scalar: Tensor, numerics: Numerics) -> list[tuple[Tensor, Numerics]]:
        """[B, S, H] row scalars, and of what each is the gradient: of f, and of ce, which may be
        the same."""
        if not numerics.adds_terms:
            return [(Upstream(self.loss, row_loss=self.ce).of_rows(row_scalar), numerics)]
        found = []
        if self.loss is not None or self.row_loss is not None:
            found.append((self.of_rows(row_scalar), numerics))
        if self.ce is not None:
            found.append((self.ce, numerics.of_ce))
        return found


def weights_gradient(
    saved: Any, row_loss: Tensor | None, grad_loss: Tensor, settings: LossSettings
) -> Tensor:
    """Of head_weights, by the definition; differentiable in all that it is made of where grad mode
    says so."""
    assert row_loss is not None  # saved for this
    differentiable = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        weights = saved.head_weights
        if not differentiable:
            weights = weights.detach().requires_grad_()
        _, length, heads = row_loss.shape
        targets = as_targets(saved.target_ids, length, heads, settings.ignore_index)
        valid = targets.valid()
        terms = Terms(settings.reduction, saved.normalizer, saved.head_scale)
        weighed = Given(weights).weights(row_loss, valid)
        loss, _ = reference.loss_of_weights(row_loss, weighed, valid, terms)
        grads = torch.autograd.grad(loss, weights, grad_loss, create_graph=differentiable)
        return cast(Tensor, grads[0])


class _ConstantOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, _source: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        no_second_derivative(ctx)


def constant_of(row_scalar: Tensor, head_weights: Tensor | None) -> Tensor:
    """The row scalars that weights with a gradient have led to: differentiating them again raises,
    where as constants they would be passed over in silence."""
    if torch.is_grad_enabled() and head_weights is not None:
        found = _ConstantOf.apply(row_scalar, head_weights)  # type: ignore[no-untyped-call]
        return cast(Tensor, found)
    return row_scalar


def left_over(grad_loss: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """What a gradient that was written ahead is still to be multiplied with."""
    return grad_loss * factors[1] if dtype == torch.float16 else grad_loss  # elsewhere it is 1


def for_each_row(row_scalar: Tensor, shared_heads: bool) -> Tensor:
    """Autograd sums the heads' gradients into the one row; each is handed an equal part."""
    return (row_scalar / row_scalar.shape[2] if shared_heads else row_scalar).contiguous()
