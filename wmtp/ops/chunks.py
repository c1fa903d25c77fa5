"""The loop of the linear loss: the logits of a few tokens at a time, in one buffer used again.

Of the rows (b, t, k) some have a target; a chunk has R of them, all heads of its tokens:

    x [R, D]       = hidden's rows
    logits [R, V]  = x @ weight.T + bias                 by the platform's product, in the buffer
    ce [R]           by the kernel, which leaves g = df/dlogits where the logits were: of what the
                     loss averages, f = ce for one, g = softmax - onehot
    c [R]          = dloss/df
    grad_hidden    = c (g @ weight)      grad_weight += g.T @ (c x)      grad_bias += c @ g

The kernel multiplies g by the part of c that is known before, in float32. A weight that follows
from the ce of the chunk's tokens multiplies the small operands instead, so that excess weights cost
neither a second product nor a second pass over the logits. B batch, S sequence, H heads, D hidden,
V vocabulary.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.backends import BACKENDS, multiply
from wmtp.exact_zero import product
from wmtp.labels import as_targets
from wmtp.records import LinearInputs, LinearSettings, RowOutputs, RowSettings
from wmtp.reference import raise_on_bad_target

Weigh = Callable[[RowOutputs, slice], Tensor]
MIB = 1 << 20
# Parts of a 16-bit product on the CPU that are added up in float32 while they are in its caches.
PART_BYTES = 2 * MIB
# float16 keeps three digits only of what is above 6e-5, and holds no more than 65504: g is written
# times so much that it is at most the first of these, and what is summed up in float16 at most the
# second. That is g @ weight; sums over rows are made in float32, unless the caller wants it so.
FP16_LARGEST_G = 16.0
FP16_LARGEST_PRODUCT = 2.0**15


class Chunk(NamedTuple):
    """Which of the B S tokens, and which of the rows with a target."""

    tokens: slice
    rows: slice


class Plan(NamedTuple):
    """Which rows are computed, and when."""

    rows: Tensor  # [rows] int64, ascending: of the B S H
    targets: Tensor  # [rows] int64
    chunks: list[Chunk]

    @property
    def most(self) -> int:
        """Rows of a chunk."""
        return max((chunk.rows.stop - chunk.rows.start for chunk in self.chunks), default=0)


class Wanted(NamedTuple):
    """Which gradients."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Gradients(NamedTuple):
    """What the chunks leave, but for one factor; [0] where not wanted."""

    hidden: Tensor  # [B, S, H, D], of hidden's dtype; 0 without a target
    weight: Tensor  # [V, D], of the sum's dtype
    bias: Tensor  # [V], of the sum's dtype


class Linear(NamedTuple):
    """The product, and how it is computed."""

    hidden: Tensor  # [B, S, H, D], any strides
    weight: Tensor  # [V, D]: the rows that are tokens
    bias: Tensor | None  # [V]
    padded: int  # V, with the rows that are none: the gradients have them
    dtype: torch.dtype  # of x, logits and g
    accum_dtype: torch.dtype  # of grad_weight and grad_bias while they are summed up
    chunk_bytes: int | None
    rows: RowSettings  # of the chunks' logits, which have no padding
    positions: int  # of S, that may have a target
    weight_wanted: bool = True  # its gradient

    @classmethod
    def of(cls, inputs: LinearInputs, settings: LinearSettings) -> "Linear":
        tokens = slice(settings.vocab_size)
        return cls(
            hidden=inputs.hidden,
            weight=inputs.weight[tokens],
            bias=None if inputs.bias is None else inputs.bias[tokens],
            padded=len(inputs.weight),
            dtype=settings.dtype,
            accum_dtype=settings.accum_dtype,
            chunk_bytes=settings.chunk_bytes,
            rows=RowSettings(
                ignore_index=settings.ignore_index,
                backend=settings.backend,
                numerics=settings.numerics,
                metrics=settings.metrics,
            ),
            positions=min(inputs.hidden.shape[1], inputs.target_ids.shape[1]),
            weight_wanted=Wanted(*settings.wanted).weight,
        )

    @property
    def row_bytes(self) -> int:
        """Of a row's logits, its x and its g @ weight, and of c times one of them in float32."""
        vocab_size, dim = self.weight.shape
        return vocab_size * self.dtype.itemsize + dim * (2 * self.dtype.itemsize + 4)

    @property
    def tokens(self) -> int:
        return len(self.hidden) * self.positions

    @property
    def most_chunk_bytes(self) -> int:
        """What a chunk may take: chunk_bytes, or the default; or all rows, if they take no more
        than the default and the float32 sum that several chunks need."""
        if self.chunk_bytes:
            return self.chunk_bytes
        default = default_chunk_bytes(self.row_bytes)
        spared = self.accum_dtype.itemsize - self.weight.dtype.itemsize
        spared *= self.weight.numel() if self.weight_wanted and self.dtype != torch.float16 else 0
        whole = self.tokens * self.hidden.shape[2] * self.row_bytes
        return max(default, whole) if whole <= default + spared else default

    @property
    def chunk_tokens(self) -> int:
        return max(1, self.most_chunk_bytes // (self.hidden.shape[2] * self.row_bytes))

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype in which the chunks' parts of the weight's gradient are added up.

        One chunk adds up nothing: the weight's own dtype does, except float16, whose range the
        product of one chunk may exceed.
        """
        whole = self.tokens <= self.chunk_tokens and self.dtype != torch.float16
        dtype = self.weight.dtype if whole else self.accum_dtype
        return dtype if dtype in (self.dtype, torch.float32) else torch.float32


def default_chunk_bytes(row_bytes: int) -> int:
    """2048 rows, but no more than 1 GiB.

    A chunk of n rows reads and writes the weight's float32 accumulator, 8 V D bytes, for 2 n V D
    operations. A GPU makes some 300 of them while it moves a byte, so that from 1200 rows on the
    product waits for its arithmetic and no longer for memory.
    """
    return min(2048 * row_bytes, 1024 * MIB)


def make_plan(target_ids: Tensor, linear: Linear, together: int = 1) -> Plan:
    """Which rows have a target is asked for on the host: one wait for the device a call.

    Args:
        together: so many consecutive tokens, from a multiple of their number on, are of one chunk.

    Raises:
        IndexError: a target outside [0, V).
    """
    (_, length, heads, _), vocab_size = linear.hidden.shape, linear.weight.shape[0]
    ignore_index = linear.rows.ignore_index
    targets = as_targets(target_ids.cpu(), length, heads, ignore_index).of_heads()
    valid = targets != ignore_index
    raise_on_bad_target(targets, valid, vocab_size, ignore_index)
    targets, valid = targets.flatten(0, 1), valid.flatten(0, 1)
    device = linear.hidden.device
    rows = torch.stack((valid.flatten().nonzero()[:, 0], targets[valid])).to(device)  # one wait
    return Plan(
        rows=rows[0],
        targets=rows[1],
        chunks=_cut(valid.sum(1), linear.chunk_tokens, together),
    )


def _cut(rows_of_token: Tensor, chunk_tokens: int, together: int) -> list[Chunk]:
    """Chunks of nearly the same number of tokens that have a row."""
    live = rows_of_token.nonzero()[:, 0]
    count = -(-len(live) // chunk_tokens)
    first = [int(live[i * len(live) // count]) for i in range(count)]
    if together > 1 and count > 1:
        groups = -(-len(rows_of_token) // together)
        count = -(-groups // (chunk_tokens // together))
        first = [i * groups // count * together for i in range(count)]
    cuts = [*first, len(rows_of_token)]
    rows_before = torch.cat((rows_of_token.new_zeros(1), rows_of_token.cumsum(0)))[cuts].tolist()
    return [
        Chunk(slice(*tokens), slice(*rows))
        for tokens, rows in zip(pairwise(cuts), pairwise(rows_before), strict=True)
    ]


class Part(NamedTuple):
    """Some rows, whose logits are in the buffer."""

    rows: Tensor  # [R] int64, of the B S H
    targets: Tensor  # [R] int64
    x: Tensor  # [R, D]
    logits: Tensor  # [R, V]

    def first(self, count: int) -> "Part":
        return Part(*(values[:count] for values in self))


class Loop:
    """What the chunks share: the buffer, and what they leave.

    Args:
        row_scalar: [B, S, H], dloss/df, as far as it is known.
        unscale: [], what the gradients are left to be multiplied with.
    """

    def __init__(
        self, linear: Linear, most: int, row_scalar: Tensor, unscale: Tensor, wanted: Wanted
    ) -> None:
        self.linear, self.backend = linear, BACKENDS[linear.rows.backend]
        self.weight = linear.weight.to(linear.dtype)
        self.bias = None if linear.bias is None else linear.bias.to(linear.dtype)
        self.out = new_row_outputs(row_scalar, linear.rows)
        self.scalars, self.unscale = row_scalar.view(-1), unscale
        self.sums = _Sums(linear, wanted)
        self.most = most
        self._buffer = self.backend.new_rows(most, self.weight)

    def part(self, rows: Tensor, targets: Tensor) -> Part:
        """Makes the logits of some rows, over those of the last."""
        _, length, heads, _ = self.linear.hidden.shape
        places = (rows // (length * heads), rows // heads % length, rows % heads)
        x, logits = self.linear.hidden[places].to(self.linear.dtype), self._buffer[: len(rows)]
        if self.bias is None:
            torch.mm(x, self.weight.T, out=logits)
        else:
            torch.addmm(self.bias, x, self.weight.T, out=logits)
        return Part(rows, targets, x, logits)

    def measure(self, part: Part, written: Tensor | None = None) -> None:
        """Notes what a part's rows leave; where `written` [R] is given, that times df/dlogits takes
        the logits' place."""
        found = self.backend.rows_ce_(part.logits, part.targets, written, self.linear.rows)
        for whole, values in zip(self.out, found, strict=True):
            if whole.numel():
                whole.view(-1)[part.rows] = values

    def written(self, part: Part) -> Tensor:
        """[R]: dloss/df as the kernel multiplies with it."""
        return self.scalars[part.rows] / self.unscale

    def add(self, part: Part, written: Tensor, after: Tensor | None = None) -> None:
        """The part's gradients; of what g lacks in `written`, `after` [R] is multiplied later."""
        part.x.masked_fill_((written == 0)[:, None], 0.0)
        self.sums.add(part.logits, part.x, self.weight, part.rows, after)


@torch.no_grad()
def run_chunks(
    linear: Linear,
    plan: Plan,
    row_scalar: Tensor,
    unscale: Tensor,
    weigh: Weigh | None,
    wanted: Wanted,
) -> tuple[RowOutputs, Gradients]:
    """What the rows leave, [B, S, H] each, and the gradients wanted, which `finish_gradients`
    finishes.

    Args:
        row_scalar: [B, S, H], dloss/df, but for the weights that `weigh` finds.
        unscale: [], what the gradients are left to be multiplied with.
        weigh: called with what the rows have left so far, and the tokens whose weights
            [tokens, H] it is to say.
    """
    loop, heads = Loop(linear, plan.most, row_scalar, unscale, wanted), row_scalar.shape[2]
    for chunk in plan.chunks:
        part = loop.part(plan.rows[chunk.rows], plan.targets[chunk.rows])
        # g is scaled twice: by `written` when the kernel stores it, by `after` in the products.
        written, after = loop.written(part) if any(wanted) else None, None
        loop.measure(part, written)
        if weigh is not None:
            weights = weigh(loop.out, chunk.tokens)
            after = weights.flatten()[part.rows - chunk.tokens.start * heads]
        if written is not None:
            loop.add(part, written, after)
    return loop.out, loop.sums.gradients()


def new_row_outputs(row_scalar: Tensor, settings: RowSettings) -> RowOutputs:
    """0 for rows [B, S, H]; [0] where not wanted."""
    terms, measured = settings.numerics.adds_terms, settings.metrics

    def new(wanted: bool, dtype: torch.dtype = row_scalar.dtype) -> Tensor:
        return row_scalar.new_zeros(row_scalar.shape if wanted else (0,), dtype=dtype)

    return RowOutputs(
        ce=new(True),
        row_loss=new(terms),
        row_max=new(measured),
        log_sum=new(measured),
        entropy=new(measured),
        correct=new(measured, torch.bool),
    )


class _Sums:
    """The gradients, chunk by chunk; g [R, V] is what the kernel has left."""

    def __init__(self, linear: Linear, wanted: Wanted) -> None:
        self.wanted = wanted
        self.empty = True
        hidden, weight, dtype = linear.hidden, linear.weight, linear.sum_dtype
        self.hidden = hidden.new_zeros(hidden.shape if wanted.hidden else 0)
        padded = (linear.padded, weight.shape[1])
        self.weight = weight.new_empty(padded if wanted.weight else 0, dtype=dtype)
        self.bias = weight.new_empty(linear.padded if wanted.bias else 0, dtype=dtype)
        self.tokens = len(weight)
        self.weight[self.tokens :], self.bias[self.tokens :] = 0, 0

    def add(self, g: Tensor, x: Tensor, weight: Tensor, rows: Tensor, c: Tensor | None) -> None:
        """c [R]: the factor that each row of g still lacks; None: no factor."""
        if self.wanted.hidden:
            gradient = torch.mm(g, weight)
            if c is not None:
                gradient.mul_(c[:, None])
            gradient = gradient.to(self.hidden.dtype)
            self.hidden.view(-1, x.shape[1]).index_copy_(0, rows, gradient)
        if self.wanted.weight:
            self._add(self.weight[: self.tokens], g, x if c is None else x.mul_(c[:, None]))
        if self.wanted.bias:
            ones = torch.ones_like(x[:, :1])
            self._add(
                self.bias[: self.tokens, None], g, ones if c is None else c[:, None].to(x.dtype)
            )
        self.empty = False

    def _add(self, total: Tensor, g: Tensor, x: Tensor) -> None:
        """total [V, D] += g.T @ x."""
        beta = 0 if self.empty else 1  # with 0 what is there is not read
        if total.dtype == g.dtype:
            torch.addmm(total, g.T, x, beta=beta, out=total)
        elif g.is_cuda:
            torch.addmm(total, g.T, x, beta=beta, out_dtype=total.dtype, out=total)
        else:  # no 16-bit product is handed out in another dtype here
            self._add_parts(total, g, x)

    def _add_parts(self, total: Tensor, g: Tensor, x: Tensor) -> None:
        dtype = total.dtype if g.dtype == torch.float16 else g.dtype
        x = x.to(dtype)
        step = max(PART_BYTES // (max(x.shape) * dtype.itemsize), 1)
        for part, columns in zip(total.split(step), g.split(step, 1), strict=True):
            product = torch.mm(columns.T.to(dtype), x)
            part.copy_(product) if self.empty else part.add_(product)

    def gradients(self) -> Gradients:
        if self.empty:
            self.weight.zero_()
            self.bias.zero_()
        return Gradients(self.hidden, self.weight, self.bias)


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
