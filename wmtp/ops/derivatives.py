"""What the backward of both operators is made of: d/dce, d/dw, and who may be differentiated again.

B batch, S sequence, H heads.
"""

from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from wmtp import reference
from wmtp.exact_zero import product
from wmtp.labels import as_targets
from wmtp.records import LossSettings
from wmtp.reduction import Terms
from wmtp.weightings import Given


def no_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise NotImplementedError(
        "the fused loss has no second derivative: use backend='eager' to differentiate twice"
    )


def weights_gradient(
    saved: Any, ce: Tensor | None, grad_loss: Tensor, settings: LossSettings
) -> Tensor:
    """Of head_weights, by the definition; differentiable in all that it is made of where grad mode
    says so."""
    assert ce is not None  # saved for this
    differentiable = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        weights = saved.head_weights
        if not differentiable:
            weights = weights.detach().requires_grad_()
        _, length, heads = ce.shape
        targets = as_targets(saved.target_ids, length, heads, settings.ignore_index)
        valid = targets.valid()
        terms = Terms(settings.reduction, saved.normalizer, saved.head_scale)
        loss, *_ = reference.loss_of_weights(ce, Given(weights).weights(ce, valid), valid, terms)
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


def upstream(row_scalar: Tensor, grad_loss: Tensor | None, grad_ce: Tensor | None) -> Tensor:
    """d/dce of what backward was called on, [B, S, H]."""
    scalar = torch.zeros_like(row_scalar) if grad_ce is None else grad_ce
    return scalar if grad_loss is None else scalar + product(grad_loss, row_scalar)


def left_over(grad_loss: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """What a gradient that was written ahead is still to be multiplied with."""
    return grad_loss * factors[1] if dtype == torch.float16 else grad_loss  # elsewhere it is 1


def for_each_row(row_scalar: Tensor, shared_heads: bool) -> Tensor:
    """Autograd sums the heads' gradients into the one row; each is handed an equal part."""
    return (row_scalar / row_scalar.shape[2] if shared_heads else row_scalar).contiguous()
