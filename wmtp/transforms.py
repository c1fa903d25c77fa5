"""torch.func, and forward-mode AD: the fused losses are opaque to them."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_transforms(*values: object) -> None:
    """Raises where torch itself would raise, or take the loss for a constant."""
    if in_torch_func() or any(map(_has_tangent, values)):
        raise NotImplementedError(
            "the fused losses cannot be transformed by torch.func (grad, vjp, jvp, jacrev, vmap) "
            "or by forward-mode AD: pass backend='eager', which all of them go through"
        )


def in_torch_func() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


# While torch.compile traces, a transformation is under way as elsewhere; see backends.py.
in_torch_func._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_tangent(value: object) -> bool:
    if forward_ad._current_level < 0 or not isinstance(value, Tensor):
        return False
    return forward_ad.unpack_dual(value).tangent is not None


def is_batched(grad: Tensor | None) -> bool:
    """Whether it stands for several upstream gradients, as `is_grads_batched` makes them."""
    functorch = torch._C._functorch
    return grad is not None and (
        functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)
    )
