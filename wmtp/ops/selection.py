"""The loop of the linear loss for rules that leave rows out (`wmtp.weightings.KeepTop`).

    logits [R, V]  of a chunk, all rows; their cross entropies, in one read
    kept [k]       the rows that the rule keeps: those behind place k move to the places before it
                   that are left, so that they stand together
    g [k, V]       over the logits of these, and the products with g: k rows instead of R

Where pairs of several chunks compete, the cross entropies of all chunks come first. The logits that
are kept are then made again, but those of the last chunk, which are still there.
"""

import torch
from torch import Tensor

from wmtp.ops.chunks import Loop, Weigh
from wmtp.ops.plan import Plan, Segment
from wmtp.ops.product import Linear, Wanted
from wmtp.ops.sums import PART_BYTES, Gradients, Part
from wmtp.records import RowOutputs


@torch.no_grad()
def run_selected(
    linear: Linear,
    plan: Plan,
    row_scalar: Tensor,
    unscale: Tensor,
    select: Weigh,
    wanted: Wanted,
    by_chunk: bool,
) -> tuple[RowOutputs, Gradients]:
    """As `run_chunks`; `select` multiplies row_scalar by the weights, 1 or 0, that it says.

    Args:
        by_chunk: no pairs of different chunks compete.
    """
    loop, part = Loop(linear, plan.most, row_scalar, unscale, wanted), None
    for chunk in plan.chunks:
        part = loop.part(plan.rows[chunk.rows], plan.targets[chunk.rows], chunk.segments)
        loop.measure(part)
        if by_chunk:
            select(loop.out, chunk.tokens)
            _add_kept(loop, part)
    if not by_chunk and part is not None:
        select(loop.out, slice(None))
        _add_kept(loop, part)
        _add_again(loop, plan, len(plan.rows) - len(part.rows))
    return loop.out, loop.sums.gradients()


def _add_kept(loop: Loop, part: Part) -> None:
    """The gradients of a part's rows that are kept."""
    if not any(loop.sums.wanted):
        return
    part = _together(part, loop.scalars[part.rows] != 0)
    part = part._replace(segments=_whole(loop.linear, len(part.rows)))
    written = loop.written(part)
    loop.backend.rows_ce_(part.logits, part.targets, written, loop.linear.rows)
    loop.add(part, written)


def _add_again(loop: Loop, plan: Plan, before: int) -> None:
    """The gradients of those of the first rows, `before` many, that are kept; their logits are made
    again."""
    if not any(loop.sums.wanted):
        return
    kept = (loop.scalars[plan.rows[:before]] != 0).nonzero()[:, 0]
    for place in kept.tensor_split(-(-len(kept) // max(loop.most, 1)) or 1):
        if len(place):
            segments = _whole(loop.linear, len(place))
            _add_kept(loop, loop.part(plan.rows[place], plan.targets[place], segments))


def _whole(linear: Linear, count: int) -> list[Segment]:
    """Of so many rows, which are all of one kind here."""
    return [Segment(slice(0, count), linear.kinds[0])]


def _together(part: Part, kept: Tensor) -> Part:
    """The rows that are kept [R]: those behind move into the places before that are left."""
    count = int(kept.sum())
    if count == len(kept):
        return part
    part = part._replace(rows=part.rows.clone(), targets=part.targets.clone())  # the plan's
    left = (~kept[:count]).nonzero()[:, 0]
    behind = kept[count:].nonzero()[:, 0] + count
    row_bytes = part.logits.shape[1] * part.logits.element_size()
    for values in (part.rows, part.targets, part.x, part.logits):
        # A few rows at a time: nothing of the logits' size is held beside them.
        rows = max(PART_BYTES // row_bytes, 1) if values is part.logits else max(len(left), 1)
        for here, there in zip(left.split(rows), behind.split(rows), strict=True):
            values[here] = values[there]
    first = slice(0, count)
    small = (part.rows[first], part.targets[first], part.x[first])
    return Part(*small, part.logits[first], part.segments)
