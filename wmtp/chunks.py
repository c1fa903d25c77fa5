"""The loop of the linear loss: the logits of a few tokens at a time, in one buffer used again.

Of the rows (b, t, k) some have a target; a chunk has R of them, all heads of its tokens:

    x [R, D]       = hidden's rows
    logits [R, V]  = x @ weight.T + bias                 by the platform's product, in the buffer
    ce [R]           by the kernel, which leaves g = softmax - onehot where the logits were
    c [R]          = dloss/dce: known before, or settled by the ce of the chunk's tokens
    grad_hidden    = c (g @ weight)      grad_weight += g.T @ (c x)      grad_bias += c @ g

c meets the small operands only, so that excess weights cost neither a second product nor a second
pass over the logits. B batch, S sequence, H heads, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.backends import KERNELS
from wmtp.labels import shift_to_heads
from wmtp.reference import raise_on_bad_target

MIB = 1 << 20
# Parts of a 16-bit product on the CPU that are added up in float32 while they are in its caches.
PART_BYTES = 2 * MIB
# float16 keeps four digits only of what is above 6e-5: it holds 256 times the probabilities. Their
# product with a row of weights stays in its range while those are below 128.
FP16_SCALE = 256.0


class Chunk(NamedTuple):
    """Which of the B S tokens, and which of the rows with a target."""

    tokens: slice
    rows: slice


class Plan(NamedTuple):
    """Which rows are computed, and when."""

    rows: Tensor  # [rows] int64, ascending: of the B S H
    targets: Tensor  # [1 + rows] int64: nobody's, then each row's
    chunks: list[Chunk]


class Wanted(NamedTuple):
    """Which gradients."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Gradients(NamedTuple):
    """What the chunks leave, [0] where not wanted; `finish_gradients` has the rest to multiply."""

    hidden: Tensor  # [B, S, H, D] scale (g @ weight), of hidden's dtype; 0 without a target
    weight: Tensor  # [V, D] scale / unit g.T @ (c x), of the accumulator's dtype
    bias: Tensor  # [V] scale / unit (c @ g)


class Linear(NamedTuple):
    """The product, and how it is computed."""

    hidden: Tensor  # [B, S, H, D], any strides
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    dtype: torch.dtype  # of x, logits and g
    accum_dtype: torch.dtype  # of grad_weight and grad_bias while they are summed up
    chunk_bytes: int | None
    backend: str

    @property
    def row_bytes(self) -> int:
        """Of a row's logits, its x and its g @ weight, and of c times one of them in float32."""
        vocab_size, dim = self.weight.shape
        return vocab_size * self.dtype.itemsize + dim * (2 * self.dtype.itemsize + 4)

    @property
    def chunk_tokens(self) -> int:
        chunk_bytes = self.chunk_bytes or default_chunk_bytes(self.row_bytes)
        return max(1, chunk_bytes // (self.hidden.shape[2] * self.row_bytes))

    @property
    def sum_dtype(self) -> torch.dtype:
        """Where there is one chunk there is no sum."""
        batch, length = self.hidden.shape[:2]
        whole = batch * max(length - 1, 0) <= self.chunk_tokens
        return self.weight.dtype if whole else self.accum_dtype

    @property
    def scale(self) -> float:
        return FP16_SCALE if self.dtype == torch.float16 else 1.0


def default_chunk_bytes(row_bytes: int) -> int:
    """2048 rows, but no more than 512 MiB.

    A chunk of n rows reads and writes the weight's float32 accumulator, 8 V D bytes, for 2 n V D
    operations. A GPU makes some 300 of them while it moves a byte, so that from 1200 rows on the
    product waits for its arithmetic and no longer for memory.
    """
    return min(2048 * row_bytes, 512 * MIB)


def make_plan(target_ids: Tensor, linear: Linear, ignore_index: int) -> Plan:
    """Which rows have a target is asked for on the host: one wait for the device a call.

    Raises:
        IndexError: a target outside [0, V).
    """
    heads, vocab_size = linear.hidden.shape[2], linear.weight.shape[0]
    targets = shift_to_heads(target_ids.cpu(), heads, ignore_index)
    valid = targets != ignore_index
    raise_on_bad_target(targets, valid, vocab_size, ignore_index)
    targets, valid = targets.flatten(0, 1), valid.flatten(0, 1)
    device = linear.hidden.device
    return Plan(
        rows=valid.flatten().nonzero()[:, 0].to(device),
        targets=torch.cat((targets.new_zeros(1), targets[valid])).to(device),
        chunks=_cut(valid.sum(1), linear.chunk_tokens),
    )


def _cut(rows_of_token: Tensor, chunk_tokens: int) -> list[Chunk]:
    """Chunks of nearly the same number of tokens that have a row."""
    live = rows_of_token.nonzero()[:, 0]
    count = -(-len(live) // chunk_tokens)
    first = [int(live[i * len(live) // count]) for i in range(count)]
    cuts = [*first, len(rows_of_token)]
    rows_before = torch.cat((rows_of_token.new_zeros(1), rows_of_token.cumsum(0)))[cuts].tolist()
    return [
        Chunk(slice(*tokens), slice(*rows))
        for tokens, rows in zip(pairwise(cuts), pairwise(rows_before), strict=True)
    ]


@torch.no_grad()
def run_chunks(
    linear: Linear,
    plan: Plan,
    row_scalar: Tensor,
    unit: Tensor,
    settle: Callable[[Tensor, slice], None] | None,
    wanted: Wanted,
) -> tuple[Tensor, Gradients]:
    """Cross entropies [B, S, H], and the gradients wanted, for `finish_gradients`.

    Args:
        row_scalar: [B, S, H], dloss/dce.
        unit: [], what no row_scalar is larger than.
        settle: called with all cross entropies [B S, H] and which tokens are new, to fill in the
            row_scalar of these.
    """
    hidden, dtype, kernels = linear.hidden, linear.dtype, KERNELS[linear.backend]
    weight = linear.weight.to(dtype)
    bias = None if linear.bias is None else linear.bias.to(dtype)
    ce = torch.zeros_like(row_scalar)
    sums = _Sums(linear, wanted)
    scale = linear.scale if any(wanted) else None
    most = max((chunk.rows.stop - chunk.rows.start for chunk in plan.chunks), default=0)
    buffer = weight.new_empty((most, len(weight)))
    for chunk in plan.chunks:
        rows = plan.rows[chunk.rows]
        targets = plan.targets[chunk.rows.start : chunk.rows.stop + 1]
        x = hidden[torch.unravel_index(rows, ce.shape)].to(dtype)
        logits = buffer[: len(rows)]
        if bias is None:
            torch.mm(x, weight.T, out=logits)
        else:
            torch.addmm(bias, x, weight.T, out=logits)
        ce.view(-1)[rows] = kernels.rows_ce_(logits, targets, scale)
        if settle is not None:
            settle(ce.flatten(0, 1), chunk.tokens)
        if any(wanted):
            sums.add(logits, x, weight, rows, row_scalar.view(-1)[rows] / unit)
    return ce, sums.gradients()


class _Sums:
    """The gradients, chunk by chunk; g [R, V] is what the kernel has left."""

    def __init__(self, linear: Linear, wanted: Wanted) -> None:
        self.wanted = wanted
        self.empty = True
        hidden, weight = linear.hidden, linear.weight
        shape = hidden.shape if wanted.hidden else (0,)
        self.hidden = hidden.new_zeros(shape)
        self.weight = weight.new_empty(
            weight.shape if wanted.weight else (0,), dtype=linear.sum_dtype
        )
        self.bias = weight.new_zeros(len(weight) if wanted.bias else 0, dtype=linear.sum_dtype)

    def add(self, g: Tensor, x: Tensor, weight: Tensor, rows: Tensor, c: Tensor) -> None:
        if self.wanted.hidden:
            gradient = torch.mm(g, weight).to(self.hidden.dtype)
            self.hidden.view(-1, x.shape[1]).index_copy_(0, rows, gradient)
        if self.wanted.weight:
            self._add_to_weight(g, x.mul_(c[:, None]))
        if self.wanted.bias:
            self.bias += torch.mm(c.to(g.dtype)[None], g)[0]
        self.empty = False

    def _add_to_weight(self, g: Tensor, x: Tensor) -> None:
        beta, total = 0 if self.empty else 1, self.weight  # with 0 what is there is not read
        if total.dtype == g.dtype:
            torch.addmm(total, g.T, x, beta=beta, out=total)
        elif g.is_cuda:
            torch.addmm(total, g.T, x, beta=beta, out_dtype=total.dtype, out=total)
        else:  # no 16-bit product is handed out in another dtype here
            step = max(PART_BYTES // (x.shape[1] * x.itemsize), 1)
            for part, columns in zip(total.split(step), g.split(step, 1), strict=True):
                product = torch.mm(columns.T, x)
                part.copy_(product) if self.empty else part.add_(product)

    def gradients(self) -> Gradients:
        if self.empty:
            self.weight.zero_()
        return Gradients(self.hidden, self.weight, self.bias)


def finish_gradients(
    linear: Linear, sums: Gradients, row_scalar: Tensor, unit: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; the sums are used up."""
    rest = upstream / linear.scale
    dtype = linear.weight.dtype
    if type(upstream) is not Tensor:  # traced: there is no memory to use again yet
        factors, factor = (row_scalar * rest)[..., None], unit * rest
        hidden = sums.hidden * factors if sums.hidden.numel() else sums.hidden
        weight, bias = sums.weight * factor, sums.bias * factor
        return hidden.to(linear.hidden.dtype), weight.to(dtype), bias.to(dtype)
    if sums.hidden.numel():
        _multiply_rows(sums.hidden, row_scalar * rest)
    weight, bias = (_multiply(total, unit * rest, linear) for total in sums[1:])
    return sums.hidden, weight, bias


def largest(row_scalar: Tensor, linear: Linear) -> Tensor:
    """The `unit` of these row scalars, which keeps c x in float16's range, and uniform weights
    exact; 1 where it would cost a pass over the gradient that is not needed otherwise."""
    converted = linear.sum_dtype != linear.weight.dtype
    if not (converted or linear.dtype == torch.float16) or not row_scalar.numel():
        return row_scalar.new_ones(())
    most = row_scalar.abs().where(row_scalar.isfinite(), 0.0).amax()
    return torch.where(most == 0, 1.0, most)


def _multiply_rows(grad: Tensor, factors: Tensor) -> None:
    rows, factors = grad.view(-1, grad.shape[-1]), factors.reshape(-1, 1)
    step = _part(grad) // rows.shape[1] + 1
    for part, factor in zip(rows.split(step), factors.split(step), strict=True):
        part.mul_(factor)


def _multiply(total: Tensor, factor: Tensor, linear: Linear) -> Tensor:
    dtype = linear.weight.dtype
    if total.dtype == dtype:
        return KERNELS[linear.backend].multiply_(total[None, None], factor).view(total.shape)
    grad = torch.empty_like(total, dtype=dtype)
    step = max(_part(total), 1)
    for part, out in zip(total.view(-1).split(step), grad.view(-1).split(step), strict=True):
        out.copy_(part.mul_(factor))
    return grad


def _part(tensor: Tensor) -> int:
    """Elements at a time. On the CPU mixed dtypes meet in a temporary copy of the size of both."""
    return tensor.numel() if tensor.is_cuda else MIB // 4
