"""The gradients of the linear loss, summed up over its chunks.

    grad_hidden = c (g @ weight)      grad_weight += g.T @ (c x)      grad_bias += c @ g

R rows, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.backends import multiply
from wmtp.exact_zero import product
from wmtp.ops.plan import Segment, runs_of
from wmtp.ops.product import MIB, Linear, Wanted

# Parts of a 16-bit product on the CPU that are added up in float32 while they are in its caches.
PART_BYTES = 2 * MIB
# float16 keeps three digits only of what is above 6e-5, and holds no more than 65504: g is written
# times so much that it is at most the first of these, and what is summed up in float16 at most the
# second. That is g @ weight; sums over rows are made in float32, unless the caller wants it so.
FP16_LARGEST_G = 16.0
FP16_LARGEST_PRODUCT = 2.0**15


class Part(NamedTuple):
    """Some rows, whose logits are in the buffer."""

    rows: Tensor  # [R] int64, of the B S H
    targets: Tensor  # [R] int64
    x: Tensor  # [R, D]
    logits: Tensor  # [R, V]
    segments: Sequence[Segment]


class Gradients(NamedTuple):
    """What the chunks leave, but for one factor; [0] where not wanted."""

    hidden: Tensor  # [B, S, H, D], of hidden's dtype; 0 without a target
    weight: Tensor  # [V, D] or [H, V, D], of the sum's dtype
    bias: Tensor  # [V] or [H, V], of the sum's dtype


class Sums:
    """The gradients, chunk by chunk; g [R, V] is what the kernel has left."""

    def __init__(self, linear: Linear, wanted: Wanted) -> None:
        self.wanted, self.whole = wanted, linear.whole
        hidden, weight, dtype = linear.hidden, linear.weight, linear.sum_dtype
        count, self.tokens, dim = weight.shape
        self.begun = [False] * count  # the matrices that something was added to
        self.hidden = hidden.new_zeros(hidden.shape if wanted.hidden else 0)
        padded = linear.whole[-2]
        of_weight, of_bias = count * wanted.weight, count * wanted.bias
        self.weight = weight.new_empty((of_weight, padded, dim), dtype=dtype)
        self.bias = weight.new_empty((of_bias, padded), dtype=dtype)
        self.weight[:, self.tokens :], self.bias[:, self.tokens :] = 0, 0

    def add(self, part: Part, weight: Tensor, c: Tensor | None) -> None:
        """c [R]: the factor that each row of g still lacks; None: no factor."""
        g, x = part.logits, part.x
        if self.wanted.hidden:
            for place, matrix in runs_of(part.segments, lambda kind: kind.hidden):
                gradient = torch.mm(g[place], weight[matrix])
                if c is not None:
                    gradient.mul_(c[place, None])
                gradient = gradient.to(self.hidden.dtype)
                self.hidden.view(-1, x.shape[1]).index_copy_(0, part.rows[place], gradient)
        if not (self.wanted.weight or self.wanted.bias):
            return
        for place, matrix in runs_of(part.segments, lambda kind: kind.weight):
            ones = torch.ones_like(x[place, :1])
            if c is not None:
                x[place].mul_(c[place, None])
                ones = c[place, None].to(x.dtype)
            begun = self.begun[matrix]
            if self.wanted.weight:
                self._add(self.weight[matrix, : self.tokens], g[place], x[place], begun)
            if self.wanted.bias:
                self._add(self.bias[matrix, : self.tokens, None], g[place], ones, begun)
            self.begun[matrix] = True

    def _add(self, total: Tensor, g: Tensor, x: Tensor, begun: bool) -> None:
        """total [V, D] += g.T @ x."""
        beta = 1 if begun else 0  # with 0 what is there is not read
        if total.dtype == g.dtype:
            torch.addmm(total, g.T, x, beta=beta, out=total)
        elif g.is_cuda:
            torch.addmm(total, g.T, x, beta=beta, out_dtype=total.dtype, out=total)
        else:  # no 16-bit product is handed out in another dtype here
            self._add_parts(total, g, x, begun)

    def _add_parts(self, total: Tensor, g: Tensor, x: Tensor, begun: bool) -> None:
        dtype = total.dtype if g.dtype == torch.float16 else g.dtype
        x = x.to(dtype)
        step = max(PART_BYTES // (max(x.shape) * dtype.itemsize), 1)
        for part, columns in zip(total.split(step), g.split(step, 1), strict=True):
            product = torch.mm(columns.T.to(dtype), x)
            part.add_(product) if begun else part.copy_(product)

    def gradients(self) -> Gradients:
        """Of the shapes that weight and bias were given in."""
        for matrix, begun in enumerate(self.begun):
            if not begun:
                self.weight[matrix : matrix + 1].zero_()
                self.bias[matrix : matrix + 1].zero_()
        weight = self.weight.view(self.whole) if self.wanted.weight else self.weight.view(0)
        bias = self.bias.view(self.whole[:-1]) if self.wanted.bias else self.bias.view(0)
        return Gradients(self.hidden, weight, bias)


def finish_gradients(
    linear: Linear, sums: Gradients, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias: the sums, which are used up, times factor [], if
    there is one."""
    hidden, weight, bias = (_multiply(total, factor, linear.rows.backend) for total in sums)
    dtype = linear.weight.dtype
    return hidden.to(linear.hidden.dtype), weight.to(dtype), bias.to(dtype)


def _multiply(total: Tensor, factor: Tensor | None, backend: str) -> Tensor:
    if not total.numel():
        return total
    rows = total.view(1, 1, -1, total.shape[-1])
    return multiply(rows, factor, backend).view(total.shape)


def find_unscale(row_scalar: Tensor, linear: Linear) -> Tensor:
    """[], which row scalars are divided by where g is written: 1, but for float16's small range."""
    if linear.dtype != torch.float16 or not row_scalar.numel():
        return row_scalar.new_ones(())
    scalars = row_scalar.abs().where(row_scalar.isfinite(), 0.0)
    largest = scalars.amax()
    slope = linear.rows.numerics.largest_gradient
    largest, scalars = largest * slope, scalars * slope
    unscale = largest / FP16_LARGEST_G
    bounds = [2.0 * largest * _largest(linear.weight).amax()]  # of g @ weight
    if linear.sum_dtype == torch.float16:  # of g.T @ x and of the bias's gradient
        bounds.append(product(scalars, _largest(linear.hidden).clamp(min=1.0)).sum())
    for bound in bounds:
        unscale = torch.maximum(unscale, bound.where(bound.isfinite(), 0.0) / FP16_LARGEST_PRODUCT)
    return torch.where(largest == 0, 1.0, unscale.clamp(min=torch.finfo(largest.dtype).tiny))


def _largest(values: Tensor) -> Tensor:
    """float32, the largest absolute values of the last axis, by one read."""
    smallest, largest = torch.aminmax(values, dim=-1)
    return torch.maximum(-smallest, largest).float()
