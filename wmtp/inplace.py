"""inplace=True: which logits may be overwritten, and which have been.

Logits that hold their gradient now are noted at their storage, so that nobody takes it for logits.
A note keeps some of the gradient's values: where others stand by now, somebody has filled that
memory again. The version counter alone would not tell: `.data.copy_` leaves it as it is, and
whoever writes to another slice of the storage raises it too.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from wmtp.layout import Layout, has_storage, is_aligned, overlap, rows_overlap

SAMPLES = (4, 8, 4, 2)  # how many values a note keeps along B, S, H and V


def check_inplace(inplace: bool, logits: Sequence[Tensor]) -> None:
    """One tensor, or heads in memory of their own."""
    if not inplace:
        return
    for head in logits:
        _check_tensor(head)
    if len(logits) > 1:
        _check_alike(logits)


def _check_tensor(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(
            "inplace=True overwrites the logits, which torch.compile cannot trace: pass "
            "inplace=False inside compiled code"
        )
    if not has_storage(logits):  # then nothing is overwritten
        return
    if isinstance(logits, torch.nn.Parameter) or _is_view_of_leaf(logits):
        raise ValueError(
            "inplace=True would overwrite a Parameter with its gradient: pass inplace=False"
        )
    if logits.stride(-1) != 1 or rows_overlap(logits):
        raise ValueError(
            f"inplace=True needs rows of their own whose last dimension is contiguous, got shape "
            f"{tuple(logits.shape)} with strides {tuple(logits.stride())}: pass "
            f"logits.contiguous() or inplace=False"
        )
    if not is_aligned(logits):
        raise ValueError(
            f"inplace=True needs logits at a multiple of their {logits.element_size()} bytes, got "
            f"them at address {logits.data_ptr()}: pass logits.clone() or inplace=False"
        )
    if _autograd_forbids_overwriting(logits):
        raise ValueError(
            "inplace=True would overwrite one of several views that an operation returned together "
            "(chunk, split, unbind) or a view that autograd does not follow (a DTensor's part): "
            "pass a slice of your own, logits[begin:end], or inplace=False"
        )


def _check_alike(heads: Sequence[Tensor]) -> None:
    if len({head.stride() for head in heads}) > 1:
        raise ValueError(
            "inplace=True needs heads of the same strides, got "
            f"{sorted({head.stride() for head in heads})}: pass inplace=False"
        )
    layouts = [Layout.of(head) for head in heads]
    if any(overlap(*pair) for pair in combinations(layouts, 2)):
        raise ValueError(
            "inplace=True needs heads of memory of their own, got some that lie across each other: "
            "pass the tensor [B, S, H, V] that they are views of, or inplace=False"
        )


def _is_view_of_leaf(logits: Tensor) -> bool:
    base = logits._base
    return base is not None and base.is_leaf and base.requires_grad


def _autograd_forbids_overwriting(logits: Tensor) -> bool:
    if not (logits._is_view() and logits.requires_grad):
        return False
    autograd = torch._C._autograd
    return autograd._get_creation_meta(logits) != autograd.CreationMeta.DEFAULT


GRADIENT_IS_TAKEN = (
    "inplace=True left one gradient, where the logits were, and an earlier backward has it: pass "
    "inplace=False to go backward twice"
)


class Overwritten:
    """The gradients that stand where the heads' logits were, for one backward to have."""

    def __init__(self, heads: Sequence[Tensor]):
        self._gradients = [head.detach() for head in heads]
        self._notes = [note_overwritten(head) for head in heads]

    def take(self) -> list[Tensor]:
        """Raises where they are gone: autograd's own check would raise for other slices too."""
        for gradient, note in zip(self._gradients, self._notes, strict=True):
            gone = note not in _notes(gradient) or note.written_since
            if gone and gradient.numel():  # where there is nothing, notes replace one another
                raise RuntimeError(
                    "inplace=True put the gradient where the logits were, and it has been modified "
                    "by an inplace operation since: go backward before, or pass inplace=False"
                )
        return self._gradients

    def multiplied(self) -> None:
        """By backward: they stand where they stood, of other values."""
        for gradient, note in zip(self._gradients, self._notes, strict=True):
            note.sample(gradient)
            _keep(gradient, _notes(gradient))


class _Note:
    """That a gradient stands where these logits were."""

    def __init__(self, logits: Tensor):
        self.layout = Layout.of(logits)
        self.written_since = False  # somebody else has written, somewhere in the storage
        self.sizes, self.strides = [], []
        for size, stride, most in zip(logits.shape, logits.stride(), SAMPLES, strict=False):
            samples = min(size, most)
            self.sizes.append(samples)
            self.strides.append((size - 1) // (samples - 1) * stride if samples > 1 else 0)
        self.offset = logits.storage_offset()
        self.sample(logits)

    def sample(self, logits: Tensor) -> None:
        self.values = torch.as_strided_copy(logits, self.sizes, self.strides)

    def stands(self, storage: torch.UntypedStorage, where: Layout) -> bool:
        """Whether some of the gradient is still there, on a GPU if need be by waiting for it."""
        values = self.values
        if self.layout.end > storage.data_ptr() + storage.nbytes():
            return False
        if values.is_cuda and self._need_not_wait(storage, where):
            return not self.written_since
        now = values.new_empty(0).set_(storage, self.offset, self.sizes, self.strides)
        same = now == values
        if where == self.layout and not same.any() and not values.isnan().any():
            return False  # the usual refill, told by three operators
        same |= now.isnan() & values.isnan()
        if self._some_lie_in(where, same & values.isfinite() & (values != 0)):
            return True
        if self._some_lie_in(where, ~same):
            return False
        return not self.written_since  # zeros tell nothing, or none of the values lies there

    def _need_not_wait(self, storage: torch.UntypedStorage, where: Layout) -> bool:
        """While a graph is captured nobody can; and logits that fill their storage, to which
        somebody has written since, are the usual refill: no other slice was meant."""
        refilled = self.written_since and where == self.layout
        whole = where.end - where.begin == storage.nbytes()
        return (refilled and whole) or torch.cuda.is_current_stream_capturing()

    def _some_lie_in(self, where: Layout, chosen: Tensor) -> bool:
        if where == self.layout:
            return bool(chosen.any())
        itemsize = self.layout.itemsize
        for indices in chosen.nonzero().tolist():
            steps = zip(indices, self.strides, strict=True)
            begin = self.layout.begin + itemsize * sum(i * stride for i, stride in steps)
            if overlap(Layout(begin, (), (), itemsize), where):
                return True
        return False


def note_overwritten(logits: Tensor) -> _Note:
    """These logits hold their gradient now. Whoever saved them for a backward gets autograd's
    error, and whoever passes them in again gets ours, until they are filled again."""
    note = _Note(logits)
    others = [other for other in _notes(logits) if other.layout != note.layout]
    _keep(logits, [*others, note])
    return note


def _keep(logits: Tensor, notes: list[_Note]) -> None:
    torch.autograd.graph.increment_version(logits)
    logits.untyped_storage()._wmtp_notes = logits._version, notes  # type: ignore[attr-defined]


def check_not_overwritten(name: str, logits: Tensor) -> None:
    if not has_storage(logits) or logits.is_inference():  # which counts no versions
        return
    notes = _notes(logits)
    if not notes:
        return
    storage, where = logits.untyped_storage(), Layout.of(logits)
    for note in notes.copy():
        if note.layout != where and not overlap(note.layout, where):
            continue
        if note.stands(storage, where):
            raise ValueError(
                f"{name} have been overwritten by their gradient: an earlier loss was computed "
                f"from them with inplace=True; compute them again, or pass inplace=False there"
            )
        note.written_since = True
        if note.layout == where or not note.stands(storage, note.layout):
            notes.remove(note)


def _notes(logits: Tensor) -> list[_Note]:
    """Those at its storage, which learn here whether somebody else has written to it."""
    version, notes = getattr(logits.untyped_storage(), "_wmtp_notes", (None, []))
    if version != logits._version:
        for note in notes:
            note.written_since = True
    return notes
