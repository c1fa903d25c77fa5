"""The only shift in the library: which token each head is asked for, and which pairs count.

A pair is a position t and a head k. B batch, S sequence, H heads, T tokens that labels are given
for.
"""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # torch's own convention for "no target"


@dataclass(frozen=True, eq=False)
class Targets:
    """What the heads of [B, S, H, ...] are asked for, as the caller has it.

    Head k at position t predicts `ids[b, t + offset_k]`, offsets 1 .. H (Gloeckle et al. 2024,
    arXiv 2404.19737, eq. 2: head 0 is ordinary next-token prediction); with `shifted`, where
    `ids[b, t]` is head 0's target at t already, `ids[b, t + offset_k - 1]`. Of ids [B, S, H] each
    head has its own. A pair counts if its target is there, is not `ignore_index`, is of the same
    document, and no mask takes it out.

    Attributes:
        ids: [B, T] integer, T >= S, or [B, S, H].
        length: S.
        heads: H.
        ignore_index: a target of this id is none.
        shifted: see above.
        offsets: H integers >= 1, any order; None: 1 .. H.
        document_ids: [B, T] of the tokens at the input positions; [B, T + 1] with `shifted`: of the
            tokens that ids and inputs were cut from.
        target_mask: [B, T], of the targets: it moves with the heads.
        position_mask: [B, S] or [B, S, H], of the positions that predict.
            A mask of bools or integers takes out the pairs where it is 0; so does one of floats,
            whose other values multiply the pairs' weights.
        positions: pairs count that are about an input position before this one, t + offset_k;
            None: all.

    Example: one sequence of five tokens, three heads, -100 where nothing is left to predict.

        >>> ids = torch.tensor([[10, 11, 12, 13, 14]])
        >>> Targets(ids, 5, 3).of_heads()
        tensor([[[  11,   12,   13],
                 [  12,   13,   14],
                 [  13,   14, -100],
                 [  14, -100, -100],
                 [-100, -100, -100]]])
        >>> two = torch.tensor([[0, 0, 0, 1, 1]])      # two documents: none predicts the other
        >>> Targets(ids, 5, 2, document_ids=two).of_heads()
        tensor([[[  11,   12],
                 [  12, -100],
                 [-100, -100],
                 [  14, -100],
                 [-100, -100]]])
    """

    ids: Tensor
    length: int
    heads: int
    ignore_index: int = IGNORE_INDEX
    shifted: bool = False
    offsets: tuple[int, ...] | None = None
    document_ids: Tensor | None = None
    target_mask: Tensor | None = None
    position_mask: Tensor | None = None
    positions: int | None = None

    @property
    def own(self) -> bool:
        """Whether each head has its own labels."""
        return self.ids.dim() == 3

    def of_heads(self) -> Tensor:
        """[B, S, H] int64: the targets, `ignore_index` where a pair does not count."""
        ids = self.ids.long()
        targets = ids if self.own else self.lined_up(ids, self.ignore_index)
        for kept in self._kept():
            targets = targets.where(kept, self.ignore_index)
        return targets

    def where(self, kept: Tensor) -> "Targets":
        """Those of the pairs [B, S, H] that are kept."""
        ids = self.of_heads().where(kept, self.ignore_index)
        return Targets(ids, self.length, self.heads, self.ignore_index)

    def valid(self) -> Tensor:
        """[B, S, H] bool: the pairs that count."""
        return self.of_heads() != self.ignore_index

    @property
    def has_factor(self) -> bool:
        """Whether there is a float mask."""
        masks = (self.target_mask, self.position_mask)
        return any(mask is not None and mask.is_floating_point() for mask in masks)

    def factor(self, dtype: torch.dtype) -> Tensor | None:
        """What float masks multiply the weights by, broadcast to [B, S, H]; None without such."""
        factors = []
        if self.target_mask is not None and self.target_mask.is_floating_point():
            factors.append(self.lined_up(self.target_mask.detach().to(dtype), 0.0))
        if self.position_mask is not None and self.position_mask.is_floating_point():
            factors.append(_with_heads(self.position_mask.detach().to(dtype)))
        return functools.reduce(torch.mul, factors) if factors else None

    def within(self, positions: int) -> "Targets":
        """Without the pairs that are about later positions of the input."""
        if self.in_a_row and self.ids.shape[1] + self.shifted <= positions:
            return self
        return replace(self, positions=positions)

    def lined_up(self, values: Tensor, fill: float) -> Tensor:
        """[B, S, H] of values [B, T], given as the ids are; `fill` where they have ended."""
        return _lined_up(values, self.length, self._offsets(), int(self.shifted), fill)

    def at_positions(self, values: Tensor, fill: float) -> Tensor:
        """[B, S, H] of values [B, S] at the positions of the input, t + offset_k."""
        return _lined_up(values, self.length, self._offsets(), 0, fill)

    def reference_of_heads(self, ref_ce: Tensor) -> Tensor:
        """[B, S, H]: what a reference says of each pair's target.

        Args:
            ref_ce: [B, T - 1], position t about `ids[t + 1]`; shifted: [B, T], about `ids[t]`;
                [B, S, H] where each head has its own labels.
        """
        if ref_ce.dim() == 3:
            return ref_ce
        return self.lined_up(ref_ce if self.shifted else F.pad(ref_ce, (1, 0)), 0.0)

    def for_operators(self) -> Tensor:
        """int64, of last stride 1: [B, L], head k at t predicts [b, t + k], a view where the ids
        are int64; or [B, S, H], where there is more to say."""
        if self.in_a_row:
            ids = self.ids.long()
            return ids.contiguous() if self.shifted else ids.contiguous()[:, 1:]
        return self.of_heads().contiguous()

    def reference_for_operators(self, ref_ce: Tensor) -> Tensor:
        """ref_ce [B, L], head k at t compares with [b, t + k], or [B, S, H]; of last stride 1."""
        if ref_ce.dim() == 2 and not self._consecutive():
            ref_ce = self.reference_of_heads(ref_ce)
        return ref_ce.contiguous()

    def next_tokens(self) -> "Targets":
        """Those of one head that predicts the next token, of all tokens that a pair is about."""
        ids = self.ids if self.in_a_row else self.ids.long().where(self._asked(), self.ignore_index)
        return Targets(ids, self.length, 1, self.ignore_index, self.shifted)

    def _asked(self) -> Tensor:
        """[B, T] bool: the tokens that a pair which counts is about."""
        return self._about_of_pairs(self.ids.shape[1], int(self.shifted))

    def positions_asked(self) -> Tensor:
        """[B, S] bool: the positions of the input that a pair which counts is about."""
        return self._about_of_pairs(self.length, 0)

    def _about_of_pairs(self, places: int, less: int) -> Tensor:
        """[B, places] bool: where t + offset_k - less is, of pairs that count."""
        valid = self.valid()
        position = torch.arange(self.length, device=valid.device)[:, None]
        place = position + torch.tensor(self._offsets(), device=valid.device) - less
        pairs = valid.new_zeros((len(valid), places + 1), dtype=torch.int32)
        pairs.index_add_(1, place.clamp(max=places).flatten(), valid.flatten(1).int())
        return pairs[:, :places] > 0

    def about(self) -> int:
        """How many tokens a reference is about: T - 1, or T where the labels are shifted."""
        return self.ids.shape[1] if self.shifted else max(self.ids.shape[1] - 1, 0)

    @property
    def in_a_row(self) -> bool:
        """Whether ids say all: head k at t predicts the k-th token from some position on."""
        extra = (self.document_ids, self.target_mask, self.position_mask, self.positions)
        return not self.own and self._consecutive() and all(value is None for value in extra)

    def _consecutive(self) -> bool:
        return self.offsets in (None, tuple(range(1, self.heads + 1)))

    def _offsets(self) -> tuple[int, ...]:
        return self.offsets or tuple(range(1, self.heads + 1))

    def _kept(self) -> list[Tensor]:
        """bool, broadcast to [B, S, H]: each says of some pairs that they do not count."""
        kept = []
        if self.document_ids is not None:
            # Of the tokens that both were cut from, or of those at the inputs' positions.
            aligned = self.shifted and self.document_ids.shape[1] == self.ids.shape[1]
            asked = _lined_up(self.document_ids, self.length, self._offsets(), int(aligned), -1)
            kept.append(asked == self.document_ids[:, : self.length, None])
        if self.target_mask is not None:
            kept.append(self.lined_up(self.target_mask != 0, False))
        if self.position_mask is not None:
            kept.append(_with_heads(self.position_mask) != 0)
        if self.positions is not None:
            there = torch.ones((1, self.positions), dtype=torch.bool, device=self.ids.device)
            kept.append(self.at_positions(there, False))
        return kept


def _with_heads(mask: Tensor) -> Tensor:
    return mask if mask.dim() == 3 else mask[:, :, None]


def _lined_up(
    values: Tensor, length: int, offsets: tuple[int, ...], less: int, fill: float
) -> Tensor:
    """[B, S, H]: values[b, t + offset_k - less], `fill` beyond their end."""
    first, heads = offsets[0] - less, len(offsets)
    if offsets == tuple(range(offsets[0], offsets[0] + heads)):
        span = max(length, 1) + heads - 1
        values = values[:, first : first + span]
        padded = F.pad(values, (0, span - values.shape[1]), value=fill)
        return padded.unfold(1, heads, 1)[:, :length]
    position = torch.arange(length, device=values.device)[:, None]
    position = position + torch.tensor(offsets, device=values.device) - less  # [S, H]
    padded = F.pad(values, (0, 1), value=fill)
    return padded[:, position.clamp(max=values.shape[1])]


def shift_to_heads(values: Tensor, horizon: int, fill: float) -> Tensor:
    """Line up a per-position tensor with the heads that predict those positions.

        shifted[b, t, k] = values[b, t + k + 1]   if t + k + 1 < S, else fill

    Args:
        values: [B, S], any dtype: unshifted `target_ids`, or any other per-position value.
        horizon: H >= 1, the number of heads.
        fill: what stands where the sequence has ended; `ignore_index` for `target_ids`.

    Returns:
        [B, S, H], a view of a padded copy of `values`.
    """
    return _lined_up(values, values.shape[1], tuple(range(1, horizon + 1)), 0, fill)


def has_target(target_ids: Tensor, horizon: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """[B, S, H] bool: where head k at position t has a target that is not `ignore_index`.

    >>> has_target(torch.tensor([[10, 11, -100]]), horizon=2)
    tensor([[[ True, False],
             [False, False],
             [False, False]]])
    """
    return Targets(target_ids, target_ids.shape[1], horizon, ignore_index).valid()


def as_targets(target_ids: Tensor, length: int, heads: int, ignore_index: int) -> Targets:
    """Those that `Targets.for_operators` has made tensors of."""
    return Targets(target_ids, length, heads, ignore_index, shifted=True)
