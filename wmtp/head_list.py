"""The loss of heads that are tensors of their own: H logits [B, S, V], read where they lie.

torchtitan and Megatron hand the heads back like this. To the kernels they are [B, S, H, V] logits
of which head k begins `head_offsets[k]` elements after the one of the lowest address.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from wmtp import ops
from wmtp.backends import KERNELS


def weighted_loss(
    heads: Sequence[Tensor],
    target_ids: Tensor,
    *others: Any,
    reduction: str,
    ignore_index: int,
    backend: str,
    inplace: bool = False,
    loss_wanted: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.weighted_loss` for H tensors [B, S, V]; traced, they are stacked."""
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    if traced or any(type(head) not in (Tensor, torch.nn.Parameter) for head in heads):
        return ops.weighted_loss(
            torch.stack(tuple(heads), 2),
            target_ids,
            *others,
            reduction=reduction,
            ignore_index=ignore_index,
            backend=backend,
            loss_wanted=loss_wanted,
        )
    differentiated = torch.is_grad_enabled() and any(head.requires_grad for head in heads)
    ahead = differentiated and loss_wanted and ops.gradients_ahead()
    first, *rest = heads
    return _LossOfHeads.apply(
        *(first, target_ids, *others, reduction, ignore_index, backend),
        *(False, ahead, inplace and differentiated, *rest),
    )[:3]


class _LossOfHeads(torch.autograd.Function):
    """`_WeightedLoss`'s arguments, the first head being the logits, and then the other heads."""

    @staticmethod
    def forward(ctx, first, *arguments):
        inputs, others = (first, *arguments[:12]), arguments[12:]
        _, *options, backend, _, ahead, inplace = inputs
        gradient = ("inplace" if inplace else "new") if ahead else "none"
        heads = _alike((first, *others))  # some may be copies: they must live until the launch
        rows, offsets = _as_one(heads)
        arguments = (*map(ops.aligned, options), gradient, offsets)
        *output, grad = KERNELS[backend].weighted_loss(rows, *arguments)
        output = (*output, grad.new_empty(0) if ahead and inplace else grad)
        ops.save_for_backward(ctx, inputs, output, others)
        return output

    @staticmethod
    def backward(ctx, grad_loss, _valid_mask, grad_ce, *_):
        (grad_first, *grads), grad_weights = ops.gradients(ctx, grad_loss, grad_ce)
        return grad_first, None, grad_weights, *(None,) * 10, *grads


def _alike(heads):
    """The heads with one set of strides, the last of them 1."""
    heads = [ops.unit_stride(head) for head in heads]
    if any(head.stride() != heads[0].stride() for head in heads):
        heads = [head.contiguous() for head in heads]
    return heads


def _as_one(heads):
    """All heads as [B, S, H, V], as if each were the one of the lowest address, and the offsets."""
    lowest = min(heads, key=Tensor.data_ptr)
    begin = lowest.data_ptr()
    offsets = tuple((head.data_ptr() - begin) // head.element_size() for head in heads)
    return lowest[:, :, None].expand(-1, -1, len(heads), -1), offsets
