"""Only the pairs with the largest losses, entropies or excesses: selection as in Rho-1.

    w[b, t, k] = 1 where the score of (t, k) is one of the max(1, int(ratio n + 1/2)) largest of the
                 n valid pairs of its group, else 0

Lin et al. 2024, arXiv 2404.07965, eq. 4, which keeps the tokens of a batch with the largest signed
excess over a reference and divides by how many are kept. B batch, S sequence, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wmtp import checks
from wmtp.kinds import check_choice, check_same_device, check_whole
from wmtp.labels import Targets
from wmtp.weightings.base import Weighting, as_tensor, rule_of
from wmtp.weightings.excess import Excess, difference

SCORES, SCOPES = ("loss", "entropy"), ("batch", "chunk", "token", "head")


@dataclass(frozen=True, eq=False)
class KeepTop(Weighting):
    """w[b, t, k] = 1 for the largest scores of each group of pairs, 0 for the others.

    Rows that are left out are read once, and neither read again nor multiplied. Of equal scores the
    first (b, t, k) is kept; NaN is larger than all, so that it surfaces. Float masks and
    `head_prior` multiply what is kept.

    Attributes:
        ratio: in (0, 1], a number or a 0-d tensor: which part is kept; 1 is uniform.
        by: the score, "loss" (the cross entropy), "entropy", or the excess of an `Excess`, which
            `excess="signed"` makes Rho-1's.
        scope: whose pairs compete: all of this call ("batch"), those of `chunk_tokens` consecutive
            positions ("chunk"), of one position ("token"), of one head ("head").
        chunk_tokens: >= 1, positions of the batch laid out in a row, [B S].
        group: the processes whose pairs compete as one batch, or head; None: this call's.

    Raises, with the loss:
        ValueError: ratio outside (0, 1], unknown `by` or `scope`, chunk_tokens < 1, a group with
            another scope than "batch" and "head"; what `Excess` raises.

        >>> ce = torch.tensor([[[0.1, 0.9], [0.5, 0.2]]])
        >>> KeepTop(0.5).weights(ce, torch.ones(1, 2, 2, dtype=torch.bool))
        tensor([[[0., 1.],
                 [1., 0.]]])
    """

    ratio: Tensor | float
    by: "str | Excess" = "loss"
    scope: str = "batch"  # type: ignore[misc]
    chunk_tokens: Tensor | int = 512
    group: "dist.ProcessGroup | None" = None

    reduction = "weight_mean"
    at_most_one = selects = True
    numbers = ("ratio", "chunk_tokens")

    @property
    def compares(self) -> bool:  # type: ignore[override]
        return isinstance(self.by, Excess)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("entropy",) if self.by == "entropy" else ()

    @property
    def ref_ce(self) -> Tensor | None:
        """Of the excess, and so the next two."""
        return self.by.ref_ce if isinstance(self.by, Excess) else None

    @property
    def ref_logits(self) -> Tensor | None:
        return self.by.ref_logits if isinstance(self.by, Excess) else None

    @property
    def center(self) -> Tensor | None:
        return self.by.center if isinstance(self.by, Excess) else None

    def weights(
        self,
        ce: Tensor,
        valid: Tensor,
        ref_ce: Tensor | None = None,
        entropy: Tensor | None = None,
    ) -> Tensor:
        """Also what the score follows from, [B, S, H]; of some of a batch's tokens all may be
        [tokens, H]."""
        score = ce if entropy is None else entropy
        if isinstance(self.by, Excess):
            assert ref_ce is not None
            score = difference(ce, self.by.centered(ref_ce), self.by.excess)
        return self.kept(score, valid).to(ce.dtype)

    def kept(self, score: Tensor, valid: Tensor) -> Tensor:
        """[..., H] bool, of scores [..., H]."""
        if self.group is None:
            return self._kept(score, valid)
        return _of_all(self.group, score, valid, self._kept)

    def _kept(self, score: Tensor, valid: Tensor) -> Tensor:
        rows = self._groups(score.flatten(0, -2))
        asked = self._groups(valid.flatten(0, -2))
        largest = _largest(rows, asked, self._counts(asked))
        positions = valid[..., 0].numel()
        return self._ungrouped(largest, positions, valid.shape[-1]).view(valid.shape)

    def count(self, valid: Tensor) -> Tensor:
        """[] float64: how many of the pairs [B, S, H] are kept."""
        return self._counts(self._groups(valid.flatten(0, -2))).sum(dtype=torch.float64)

    @property
    def together(self) -> int:
        """So many consecutive positions must be ranked at once."""
        return int(self.chunk_tokens) if self.scope == "chunk" else 1

    def within_chunks(self, positions: int) -> bool:
        """Whether no pairs compete that are of different runs of so many positions."""
        return self.scope in ("token", "chunk") and self.together <= positions

    def _counts(self, asked: Tensor) -> Tensor:
        """[groups] int64, of [groups, pairs] bool."""
        n = asked.sum(-1)
        ratio = as_tensor(self.ratio).to(n.device, torch.float64)
        return torch.where(n > 0, (ratio * n + 0.5).floor().long().clamp(min=1), 0)

    def _groups(self, pairs: Tensor) -> Tensor:
        """[groups, pairs of one], in the order of their (b, t, k), of [positions, H]; what a last
        chunk lacks is 0."""
        if self.scope == "token":
            return pairs
        if self.scope == "head":
            return pairs.T
        if self.scope == "batch":
            return pairs.reshape(1, -1)
        missing = -len(pairs) % self.together
        padded = torch.nn.functional.pad(pairs, (0, 0, 0, missing))
        return padded.reshape(-1, self.together * pairs.shape[1])

    def _ungrouped(self, groups: Tensor, positions: int, heads: int) -> Tensor:
        if self.scope == "head":
            return groups.T
        return groups.reshape(-1, heads)[:positions]

    def check(self, name: str, scores: Tensor, targets: Targets) -> None:
        checks.check_share("ratio", self.ratio)
        check_choice("scope", self.scope, SCOPES)
        chunk_tokens: Any = self.chunk_tokens
        check_whole("chunk_tokens", chunk_tokens, 1, "it is a number of positions")
        if self.group is not None and self.scope not in ("batch", "head"):
            raise ValueError(
                f"group goes with scope='batch' and 'head', got {self.scope!r}: leave it out, the "
                "others rank nothing across processes"
            )
        if not isinstance(self.by, Excess):
            check_choice("by", self.by, SCORES)
            return
        self.by.check(name, scores, targets)
        check_same_device(name, scores, **vars(self.by))

    def with_fields(self, **fields: Any) -> "KeepTop":
        """Of its own, and of its excess."""
        own = {name: value for name, value in fields.items() if name in vars(self)}
        theirs = {name: value for name, value in fields.items() if name not in own}
        if theirs:
            assert isinstance(self.by, Excess)
            own["by"] = self.by.with_fields(**theirs)
        return KeepTop(**{**vars(self), **own})

    def key(self) -> str:
        by = self.by.key() if isinstance(self.by, Excess) else self.by
        return f"{self._name} { {'by': by, 'scope': self.scope} }"

    @classmethod
    def _known_by(cls, fields: dict[str, Any]) -> "KeepTop":
        by = fields["by"]
        return cls(**{**fields, "by": by if by in SCORES else rule_of(by)})


def _largest(score: Tensor, asked: Tensor, counts: Tensor) -> Tensor:
    """[groups, pairs] bool: of each group's pairs that are asked for so many, by falling score."""
    order = _falling(score)  # NaN first
    order = order.gather(-1, _falling(asked.gather(-1, order)))
    rank = torch.arange(score.shape[-1], device=score.device)
    return torch.zeros_like(asked).scatter_(-1, order, rank < counts[:, None])


def _falling(values: Tensor) -> Tensor:
    """[groups, pairs]: the order of each group's values; equal ones stay in theirs."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices


def _of_all(
    group: "dist.ProcessGroup", score: Tensor, valid: Tensor, kept: Callable[..., Tensor]
) -> Tensor:
    """What is kept of this process's pairs where those of all processes compete, in their order."""
    flat, asked = score.flatten(0, -2), valid.flatten(0, -2)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    lengths = [torch.tensor(0, device=flat.device) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor(len(flat), device=flat.device), group=group)
    sizes = [int(length) for length in lengths]

    def gathered(values: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, 0, 0, max(sizes) - len(values)))
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded.contiguous(), group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    whole: Tensor = kept(gathered(flat), gathered(asked.to(torch.uint8)) > 0)
    mine: Tensor = whole.split(sizes)[rank]
    return mine.view(valid.shape)
