"""How a strided tensor lies in memory, and whether two of them share any of it."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)
MOST_STEPS = 4096  # of the search for a common element, some 2 ms; then it counts as found


class Layout(NamedTuple):
    """Where the elements of a tensor lie, in bytes."""

    begin: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        itemsize = tensor.element_size()
        strides = tuple(itemsize * stride for stride in tensor.stride())
        return cls(tensor.data_ptr(), tuple(tensor.shape), strides, itemsize)

    @property
    def end(self) -> int:
        """Behind the last element; `begin` where there is none."""
        if 0 in self.sizes:
            return self.begin
        steps = zip(self.sizes, self.strides, strict=True)
        return self.begin + self.itemsize + sum((size - 1) * stride for size, stride in steps)


def overlap(a: Layout, b: Layout) -> bool:
    """Whether two layouts have a byte in common: a False is certain.

    A True is certain too, but for layouts whose strides have so little in common that the search
    gives up. Slices of one tensor share theirs; there it takes a few steps.
    """
    if 0 in a.sizes + b.sizes or a.begin >= b.end or b.begin >= a.end:
        return False
    # A common byte solves sum(stride * x) = distance, x being an index into a less one into b.
    highest, lowest = _last_index(a), _last_index(b)
    terms: list[_Term] = []
    for stride in sorted(highest.keys() | lowest.keys()):
        term = _Term(stride, -lowest[stride], highest[stride])
        if terms and (both := terms[-1].joined(term)):
            terms[-1] = both
        else:
            terms.append(term)
    return _Search(terms[::-1]).reaches(b.begin - a.begin)


def _last_index(layout: Layout) -> Counter[int]:
    """Stride by stride, that of the bytes in an element too."""
    steps = zip((*layout.strides, 1), (*layout.sizes, layout.itemsize), strict=True)
    last: Counter[int] = Counter()
    for stride, size in steps:
        last[stride] += size - 1
    del last[0]  # expanded: the same elements again
    return last


class _Term(NamedTuple):
    """stride * x for all whole x in [low, high]."""

    stride: int
    low: int
    high: int

    def joined(self, outer: "_Term") -> "_Term | None":
        """Their sum, where that is every multiple of this stride from the least to the greatest."""
        times, rest = divmod(outer.stride, self.stride)
        if rest or self.high - self.low < times - 1:
            return None
        return _Term(self.stride, self.low + times * outer.low, self.high + times * outer.high)


class _Search:
    """Whether a sum of terms, the greatest stride first, reaches a number."""

    def __init__(self, terms: list[_Term]):
        self.terms = terms
        self.steps = 0
        self.rest = [(0, 0)]  # of the terms from k on: least and greatest sum
        for stride, low, high in reversed(terms):
            least, greatest = self.rest[-1]
            self.rest.append((least + stride * low, greatest + stride * high))
        self.rest.reverse()

    def reaches(self, distance: int, k: int = 0) -> bool:
        least, greatest = self.rest[k]
        self.steps += 1
        if self.steps > MOST_STEPS:
            return True
        if not least <= distance <= greatest:
            return False
        if k == len(self.terms):
            return True
        # Only few x leave a distance that the smaller strides can still reach.
        stride, low, high = self.terms[k]
        least, greatest = self.rest[k + 1]
        first = max(low, -((greatest - distance) // stride))
        last = min(high, (distance - least) // stride)
        return any(self.reaches(distance - stride * x, k + 1) for x in range(first, last + 1))


def has_storage(tensor: Tensor) -> bool:
    """Whether its memory may be looked at: not a subclass's, nor inside torch.compile or
    torch.func."""
    if torch.compiler.is_compiling() or type(tensor) not in PLAIN:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def heads_share_storage(logits: Tensor) -> bool:
    """One row of logits per token, seen H times: `logits[:, :, None].expand(-1, -1, H, -1)`."""
    return logits.shape[2] > 1 and logits.stride(2) == 0


def is_aligned(tensor: Tensor) -> bool:
    """Whether its elements begin at multiples of their size, as compiled code takes for granted;
    `torch.frombuffer` promises nothing of the kind."""
    return tensor.data_ptr() % tensor.element_size() == 0


@overload
def aligned(tensor: Tensor) -> Tensor: ...
@overload
def aligned(tensor: None) -> None: ...
def aligned(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy that is aligned."""
    return tensor if tensor is None or is_aligned(tensor) else tensor.clone()


def unit_stride(logits: Tensor) -> Tensor:
    """The tensor, or a copy whose last stride is 1."""
    logits = aligned(logits.resolve_neg())
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def alike(heads: Sequence[Tensor]) -> list[Tensor]:
    """The heads with one set of strides, the last of them 1."""
    heads = [unit_stride(head) for head in heads]
    if any(head.stride() != heads[0].stride() for head in heads):
        heads = [head.contiguous() for head in heads]
    return heads


def one_tensor(logits: Sequence[Tensor]) -> Tensor:
    """[B, S, H, V]: itself, or H [B, S, V] stacked."""
    return logits[0] if logits[0].dim() == 4 else torch.stack(tuple(logits), 2)


def as_rows(logits: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...] | None]:
    """[B, S, H, V] of one tensor, or of H [B, S, V] as if each were the one of the lowest address;
    then also how many elements after it each of them begins."""
    if logits[0].dim() == 4:
        return logits[0], None
    lowest = min(logits, key=Tensor.data_ptr)
    begin = lowest.data_ptr()
    offsets = tuple((head.data_ptr() - begin) // head.element_size() for head in logits)
    return lowest[:, :, None].expand(-1, -1, len(logits), -1), offsets


def rows_overlap(logits: Tensor) -> bool:
    """Whether two elements share memory; heads of stride 0 are one row by design."""
    if not logits.numel():
        return False
    rows = logits[:, :, :1] if heads_share_storage(logits) else logits
    end = 1
    for stride, size in sorted(zip(rows.stride(), rows.shape, strict=True)):
        if size > 1:
            if stride < end:
                return True
            end += stride * (size - 1)
    return False
