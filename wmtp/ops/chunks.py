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

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.backends import BACKENDS, multiply
from wmtp.exact_zero import product
from wmtp.ops.plan import Asked, Kind, Plan, Segment, runs_of
from wmtp.records import LinearInputs, LinearSettings, RowOutputs, RowSettings

Weigh = Callable[[RowOutputs, slice], Tensor]
MIB = 1 << 20
# Parts of a 16-bit product on the CPU that are added up in float32 while they are in its caches.
PART_BYTES = 2 * MIB
# float16 keeps three digits only of what is above 6e-5, and holds no more than 65504: g is written
# times so much that it is at most the first of these, and what is summed up in float16 at most the
# second. That is g @ weight; sums over rows are made in float32, unless the caller wants it so.
FP16_LARGEST_G = 16.0
FP16_LARGEST_PRODUCT = 2.0**15


class Wanted(NamedTuple):
    """Which gradients."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Gradients(NamedTuple):
    """What the chunks leave, but for one factor; [0] where not wanted."""

    hidden: Tensor  # [B, S, H, D], of hidden's dtype; 0 without a target
    weight: Tensor  # [V, D] or [H, V, D], of the sum's dtype
    bias: Tensor  # [V] or [H, V], of the sum's dtype


class Linear(NamedTuple):
    """The product, and how it is computed."""

    hidden: Tensor  # [B, S, H, D], any strides
    weight: Tensor  # [G, V, D], one matrix or a head's own: the rows that are tokens
    bias: Tensor | None  # [G, V]
    whole: torch.Size  # of the weight as it was given: the gradients have rows that are no tokens
    kinds: list[Kind]  # of the heads
    dtype: torch.dtype  # of x, logits and g
    accum_dtype: torch.dtype  # of grad_weight and grad_bias while they are summed up
    chunk_bytes: int | None
    rows: RowSettings  # of the chunks' logits, which have no padding
    positions: int  # of S, that may have a target
    weight_wanted: bool = True  # its gradient

    @classmethod
    def of(cls, inputs: LinearInputs, settings: LinearSettings) -> "Linear":
        weight, bias = inputs.weight, inputs.bias
        own = weight.dim() == 3
        if not own:
            weight, bias = weight[None], None if bias is None else bias[None]
        of_hidden, of_weight = settings.hidden_grad_heads, settings.weight_grad_heads
        return cls(
            hidden=inputs.hidden,
            weight=weight[:, : settings.vocab_size],
            bias=None if bias is None else bias[:, : settings.vocab_size],
            whole=inputs.weight.shape,
            kinds=[
                Kind(
                    k if own else 0,
                    of_hidden is None or k in of_hidden,
                    of_weight is None or k in of_weight,
                )
                for k in range(inputs.hidden.shape[2])
            ],
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
        _, vocab_size, dim = self.weight.shape
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

    def asked(self, together: int = 1) -> Asked:
        """What a plan follows from."""
        return Asked(
            self.hidden.shape[1],
            self.kinds,
            self.weight.shape[1],
            self.rows.ignore_index,
            self.chunk_tokens,
            together,
        )


def default_chunk_bytes(row_bytes: int) -> int:
    """2048 rows, but no more than 1 GiB.

    A chunk of n rows reads and writes the weight's float32 accumulator, 8 V D bytes, for 2 n V D
    operations. A GPU makes some 300 of them while it moves a byte, so that from 1200 rows on the
    product waits for its arithmetic and no longer for memory.
    """
    return min(2048 * row_bytes, 1024 * MIB)


class Part(NamedTuple):
    """Some rows, whose logits are in the buffer."""

    rows: Tensor  # [R] int64, of the B S H
    targets: Tensor  # [R] int64
    x: Tensor  # [R, D]
    logits: Tensor  # [R, V]
    segments: Sequence[Segment]


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
        self._buffer = self.backend.new_rows(most, self.weight[0])

    def part(self, rows: Tensor, targets: Tensor, segments: Sequence[Segment]) -> Part:
        """Makes the logits of some rows, over those of the last."""
        _, length, heads, _ = self.linear.hidden.shape
        places = (rows // (length * heads), rows // heads % length, rows % heads)
        x, logits = self.linear.hidden[places].to(self.linear.dtype), self._buffer[: len(rows)]
        for place, matrix in runs_of(segments, lambda kind: True):
            weight = self.weight[matrix].T
            if self.bias is None:
                torch.mm(x[place], weight, out=logits[place])
            else:
                torch.addmm(self.bias[matrix], x[place], weight, out=logits[place])
        return Part(rows, targets, x, logits, segments)

    def measure(self, part: Part, written: Tensor | None = None) -> None:
        """Notes what a part's rows leave; where `written` [R] is given, that times df/dlogits takes
        the place of the logits of which a gradient is wanted."""
        trained = 0 if written is None else _trained(part.segments)
        for place in (slice(0, trained), slice(trained, len(part.rows))):
            if place.start == place.stop:
                continue
            factor = None if place.start == trained or written is None else written[place]
            logits, targets = part.logits[place], part.targets[place]
            found = self.backend.rows_ce_(logits, targets, factor, self.linear.rows)
            for whole, values in zip(self.out, found, strict=True):
                if whole.numel():
                    whole.view(-1)[part.rows[place]] = values

    def written(self, part: Part) -> Tensor:
        """[R]: dloss/df as the kernel multiplies with it."""
        return self.scalars[part.rows] / self.unscale

    def add(self, part: Part, written: Tensor, after: Tensor | None = None) -> None:
        """The part's gradients; of what g lacks in `written`, `after` [R] is multiplied later."""
        part.x.masked_fill_((written == 0)[:, None], 0.0)
        self.sums.add(part, self.weight, after)


def _trained(segments: Sequence[Segment]) -> int:
    """How many rows have a gradient; they are the first."""
    return max((rows.stop for rows, kind in segments if kind.hidden or kind.weight), default=0)


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
        part = loop.part(plan.rows[chunk.rows], plan.targets[chunk.rows], chunk.segments)
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
