"""What the backward of both operators is made of: d/dce, d/dw, and who may be differentiated again.

B batch, S sequence, H heads.
"""

import torch

from wmtp import reference
from wmtp.exact_zero import product


def no_second_derivative(ctx, *_):
    raise NotImplementedError(
        "the fused loss has no second derivative: use backend='eager' to differentiate twice"
    )


def weights_gradient(saved, ce, grad_loss, reduction, ignore_index):
    """Of head_weights, by the definition; differentiable in all that it is made of where grad mode
    says so."""
    differentiable = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        weights = saved.head_weights
        if not differentiable:
            weights = weights.detach().requires_grad_()
        loss, *_ = reference.loss_of_cross_entropies(
            *(ce, saved.target_ids, weights, None, saved.normalizer),
            *(None, "abs", reduction, ignore_index),
        )
        return torch.autograd.grad(loss, weights, grad_loss, create_graph=differentiable)[0]


class _ConstantOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, _source):
        return values.view_as(values)

    @staticmethod
    def backward(ctx, *_):
        no_second_derivative(ctx)


def constant_of(row_scalar, head_weights):
    """The row scalars that weights with a gradient have led to: differentiating them again raises,
    where as constants they would be passed over in silence."""
    if torch.is_grad_enabled() and head_weights is not None:
        return _ConstantOf.apply(row_scalar, head_weights)
    return row_scalar


def upstream(row_scalar, grad_loss, grad_ce):
    """d/dce of what backward was called on, [B, S, H]."""
    scalar = torch.zeros_like(row_scalar) if grad_ce is None else grad_ce
    return scalar if grad_loss is None else scalar + product(grad_loss, row_scalar)
