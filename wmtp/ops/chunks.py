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

import torch
from torch import Tensor

from wmtp.backends import BACKENDS
from wmtp.ops.plan import Plan, Segment, runs_of
from wmtp.ops.product import Linear, Wanted
from wmtp.ops.sums import Gradients, Part, Sums
from wmtp.records import RowOutputs, RowSettings

Weigh = Callable[[RowOutputs, slice], Tensor]


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
        self.sums = Sums(linear, wanted)
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
