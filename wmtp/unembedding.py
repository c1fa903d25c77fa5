"""What makes logits of hidden states: one matrix for all heads, or each head's own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wmtp import checks
from wmtp.kinds import check_whole, shown
from wmtp.sharded import gathered


class Unembedding(NamedTuple):
    weight: Tensor  # [V, D] or [H, V, D]
    bias: Tensor | None  # [V] or [H, V], likewise

    @property
    def columns(self) -> int:
        """V."""
        return self.weight.shape[-2]

    def whole(self) -> "Unembedding":
        """Of DTensors what all processes have together."""
        return Unembedding(
            gathered(self.weight), None if self.bias is None else gathered(self.bias)
        )


class GradHeads(NamedTuple):
    """Whose rows have a gradient; None: all heads'."""

    hidden: list[int] | None = None
    weight: list[int] | None = None


def unembedding_of(hidden: Tensor, weight: Any, bias: Any) -> Unembedding:
    """As the caller has it, checked; lists of H tensors are stacked, a copy.

    Args:
        hidden: [B, S, D], or [B, S, H, D].
    """
    heads = hidden.shape[2] if hidden.dim() == 4 else None
    own = _is_list(weight) or (isinstance(weight, Tensor) and weight.dim() == 3)
    if heads is None or not own:
        checks.check_lm_head(hidden, weight, bias)
        return Unembedding(weight, bias)
    if _is_list(weight):
        weight = _stacked("lm_head_weight", weight, heads, "[V, D]")
    if _is_list(bias):
        bias = _stacked("lm_head_bias", bias, heads, "[V]")
    checks.check_lm_heads(hidden, weight, bias)
    return Unembedding(weight, bias)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _stacked(name: str, tensors: Sequence[Any], heads: int, axes: str) -> Tensor:
    if len(tensors) != heads:
        raise ValueError(
            f"{name} must be one for all heads, or one for each of H = {heads}, got "
            f"{len(tensors)}: pass {heads}"
        )
    for tensor in tensors:
        checks.check_tensor(f"each head's {name}", tensor, axes)
    if len({(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors}) > 1:
        raise ValueError(
            f"all heads' {name} must be alike, got shapes "
            f"{', '.join(str(tuple(tensor.shape)) for tensor in tensors)}: pass {heads} {axes} of "
            "one dtype and device"
        )
    return torch.stack(tuple(tensors))


def grad_heads_of(hidden_grad_heads: Any, weight_grad_heads: Any, heads: int) -> GradHeads:
    """As the caller has them, checked."""
    return GradHeads(
        _heads("hidden_grad_heads", hidden_grad_heads, heads),
        _heads("weight_grad_heads", weight_grad_heads, heads),
    )


def _heads(name: str, chosen: Any, heads: int) -> list[int] | None:
    if chosen is None:
        return None
    remedy = f"pass indices of the H = {heads} heads, each once, e.g. [0]"
    if not _is_list(chosen):
        raise TypeError(f"{name} must be a list of heads, got {shown(chosen)}: {remedy}")
    for head in chosen:
        check_whole(f"each of {name}", head, 0, remedy)
        if head >= heads:
            raise ValueError(f"{name} must be in 0 .. {heads - 1}, got {shown(head)}: {remedy}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{name} must name no head twice, got {list(chosen)}: {remedy}")
    found = sorted(int(head) for head in chosen)
    return None if len(found) == heads else found


def logits_of(hidden: Tensor, unembedding: Unembedding, of: GradHeads) -> Tensor:
    """[B, S, H, V], all at once, for eager torch."""
    weight, bias = unembedding
    if weight.dim() == 2 and of == GradHeads():
        return F.linear(hidden, weight, bias)
    found = []
    for k in range(hidden.shape[2]):
        own, of_head = weight, bias
        if weight.dim() == 3:
            own, of_head = weight[k], None if bias is None else bias[k]
        x = _with_gradient(hidden[:, :, k], of.hidden, k)
        own = _with_gradient(own, of.weight, k)
        of_head = None if of_head is None else _with_gradient(of_head, of.weight, k)
        found.append(F.linear(x, own, of_head))
    return torch.stack(found, 2)


def _with_gradient(values: Tensor, heads: list[int] | None, k: int) -> Tensor:
    """The same, whose gradient by head k is 0 unless it is wanted."""
    if heads is None or k in heads:
        return values
    return torch.where(
        torch.zeros((), dtype=torch.bool, device=values.device), values, values.detach()
    )
