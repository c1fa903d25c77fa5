"""Which rows the linear loss computes, in which chunks and in which order.

B batch, S sequence, H heads, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.labels import as_targets
from wmtp.reference import raise_on_bad_target


class Kind(NamedTuple):
    """What is made of a head's rows."""

    matrix: int  # of the unembeddings, that makes their logits
    hidden: bool  # the gradient of their hidden states,
    weight: bool  # and of the unembedding, by their part

    @property
    def order(self) -> tuple[int, int]:
        """By it, the rows of either gradient stand together."""
        return {(True, False): 0, (True, True): 1, (False, True): 2}.get(self[1:], 3), self.matrix


class Segment(NamedTuple):
    """Consecutive rows of a chunk, of one kind."""

    rows: slice
    kind: Kind


class Chunk(NamedTuple):
    """Which of the B S tokens, and which of the plan's rows, segment by segment."""

    tokens: slice
    rows: slice
    segments: list[Segment]


class Plan(NamedTuple):
    """Which rows are computed, and when."""

    rows: Tensor  # [rows] int64: of the B S H; in each chunk by kind, and ascending
    targets: Tensor  # [rows] int64
    chunks: list[Chunk]

    @property
    def most(self) -> int:
        """Rows of a chunk."""
        return max((chunk.rows.stop - chunk.rows.start for chunk in self.chunks), default=0)


class Asked(NamedTuple):
    """What a plan follows from, besides the targets."""

    length: int  # S
    kinds: list[Kind]  # of the heads
    vocab_size: int
    ignore_index: int
    chunk_tokens: int  # of a chunk at most
    together: int = 1  # so many tokens, from a multiple of their number on, are of one chunk


def make_plan(target_ids: Tensor, asked: Asked, device: torch.device) -> Plan:
    """Which rows have a target is asked for on the host: one wait for the device a call.

    Raises:
        IndexError: a target outside [0, V).
    """
    heads, ignore_index = len(asked.kinds), asked.ignore_index
    targets = as_targets(target_ids.cpu(), asked.length, heads, ignore_index).of_heads()
    valid = targets != ignore_index
    raise_on_bad_target(targets, valid, asked.vocab_size, ignore_index)
    targets, valid = targets.flatten(0, 1), valid.flatten(0, 1)
    rows, chunks = valid.flatten().nonzero()[:, 0], []
    for tokens, of_chunk in _cut(valid.sum(1), asked.chunk_tokens, asked.together):
        rows[of_chunk], segments = _by_kind(rows[of_chunk], asked.kinds)
        chunks.append(Chunk(tokens, of_chunk, segments))
    both = torch.stack((rows, targets.flatten()[rows])).to(device)  # one wait
    return Plan(rows=both[0], targets=both[1], chunks=chunks)


def _cut(rows_of_token: Tensor, chunk_tokens: int, together: int) -> list[tuple[slice, slice]]:
    """(tokens, rows) of chunks of nearly the same number of tokens that have a row."""
    live = rows_of_token.nonzero()[:, 0]
    count = -(-len(live) // chunk_tokens)
    first = [int(live[i * len(live) // count]) for i in range(count)]
    if together > 1 and count:
        groups = -(-len(rows_of_token) // together)
        count = 1 if count == 1 else -(-groups // (chunk_tokens // together))
        first = [i * groups // count * together for i in range(count)]
    cuts = [*first, len(rows_of_token)]
    rows_before = torch.cat((rows_of_token.new_zeros(1), rows_of_token.cumsum(0)))[cuts].tolist()
    return [
        (slice(*tokens), slice(*rows))
        for tokens, rows in zip(pairwise(cuts), pairwise(rows_before), strict=True)
    ]


def _by_kind(rows: Tensor, kinds: Sequence[Kind]) -> tuple[Tensor, list[Segment]]:
    """The rows in the order of their kinds, and where each kind's are."""
    found = sorted(set(kinds), key=lambda kind: kind.order)
    if len(found) == 1:
        return rows, [Segment(slice(0, len(rows)), found[0])]
    of_row = torch.tensor([found.index(kind) for kind in kinds])[rows % len(kinds)]
    ends = torch.bincount(of_row, minlength=len(found)).cumsum(0).tolist()
    places = map(slice, [0, *ends], ends)
    segments = [Segment(place, kind) for place, kind in zip(places, found, strict=False)]
    return rows[of_row.argsort(stable=True)], segments


def runs_of(
    segments: Sequence[Segment], wanted: Callable[[Kind], bool]
) -> Iterator[tuple[slice, int]]:
    """(rows, matrix): those of the kinds that are wanted, as few and long as they can be."""
    run: tuple[slice, int] | None = None
    for rows, kind in segments:
        if rows.start == rows.stop or not wanted(kind):
            continue
        if run is not None and (run[0].stop, run[1]) == (rows.start, kind.matrix):
            run = (slice(run[0].start, rows.stop), kind.matrix)
            continue
        if run is not None:
            yield run
        run = (rows, kind.matrix)
    if run is not None:
        yield run
