"""What is demanded of labels, and of what is said with them: `Targets`, as checked."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wmtp.kinds import (
    are_finite,
    check_constant,
    check_flag,
    check_integers,
    check_same_device,
    check_shape,
    check_tensor,
    check_whole,
    is_readable,
    is_whole,
    shape_message,
    shown,
)
from wmtp.labels import IGNORE_INDEX, Targets


def targets_of(
    name: str,
    scores: Tensor,
    heads: int,
    target_ids: Tensor | Sequence[Tensor],
    *,
    ignore_index: int = IGNORE_INDEX,
    shifted: bool = False,
    offsets: Sequence[int] | None = None,
    document_ids: Tensor | None = None,
    target_mask: Tensor | None = None,
    position_mask: Tensor | None = None,
) -> Targets:
    """What `heads` heads of the scores are asked for, as checked."""
    ids: Any = target_ids
    if is_listed(ids):
        ids = stacked_labels(ids, heads)
    distances: Any = offsets
    if is_listed(distances) or isinstance(distances, range):
        distances = tuple(distances)
    check_tensor("target_ids", ids, "[B, T]")
    targets = Targets(
        ids=ids,
        length=scores.shape[1],
        heads=heads,
        ignore_index=ignore_index,
        shifted=shifted,
        offsets=distances,
        document_ids=document_ids,
        target_mask=target_mask,
        position_mask=position_mask,
    )
    check_targets(name, scores, targets)
    if document_ids is not None:  # unsigned ones, with which torch does little
        targets = replace(targets, document_ids=document_ids.long())
    if type(ignore_index) is int:
        return targets
    return replace(targets, ignore_index=int(ignore_index))  # numpy's, which no operator takes


def is_listed(value: object) -> bool:
    return isinstance(value, (list, tuple))


def stacked_labels(labels: Sequence[Tensor], heads: int) -> Tensor:
    """[B, S, H] of each head's own."""
    for of_head in labels:
        check_integers("each head's target_ids", of_head, "[B, S]")
    # One with the other: a set would hash the sizes, and torch.compile make a graph of each length.
    alike = all(of_head.dim() == 2 and of_head.shape == labels[0].shape for of_head in labels)
    if len(labels) != heads or not alike:
        found = [tuple(of_head.shape) for of_head in labels]
        raise ValueError(
            f"target_ids must be H = {heads} tensors [B, S], got {found}: pass one for each head"
        )
    return torch.stack([of_head.long() for of_head in labels], -1)


def check_targets(name: str, scores: Tensor, targets: Targets) -> None:
    """The targets of `name`, [B, S, H, ...] or, of one head alone, [B, S, ...]."""
    check_flag("shifted", targets.shifted)
    check_integers("target_ids", targets.ids, "[B, T]")
    check_ignore_index(targets.ignore_index)
    if targets.own:
        _check_own_labels(name, scores, targets)
    else:
        _check_target_ids(name, scores, targets)
    _check_offsets(targets)
    _check_document_ids(targets)
    _check_masks(name, scores, targets)
    check_same_device(
        name,
        scores,
        target_ids=targets.ids,
        document_ids=targets.document_ids,
        target_mask=targets.target_mask,
        position_mask=targets.position_mask,
    )


def check_no_weights(targets: Targets) -> None:
    if targets.has_factor:
        raise TypeError(
            "masks must be of bools or integers here, got floats, which multiply weights: pass "
            "mask != 0"
        )


def check_next_tokens(targets: Targets) -> None:
    """Of one head's logits [B, S, V]."""
    check_no_weights(targets)
    most = targets.length + (not targets.shifted)
    if targets.own or targets.ids.shape[1] > most:
        axes = "[B, S]" if targets.shifted else "[B, T], T = S or S + 1"
        remedy = f"the logits have {targets.length} positions"
        raise ValueError(shape_message("target_ids", axes, None, targets.ids, remedy))


def _check_own_labels(name: str, scores: Tensor, targets: Targets) -> None:
    shape = (*scores.shape[:2], targets.heads)
    remedy = f"a target for each position and head of {name}, or ids [B, T]"
    check_shape("target_ids", targets.ids, "[B, S, H]", shape, remedy)
    others = {
        "shifted": targets.shifted or None,
        "offsets": targets.offsets,
        "document_ids": targets.document_ids,
        "target_mask": targets.target_mask,
    }
    for other, value in others.items():
        if value is not None:
            raise ValueError(
                f"{other} goes with target_ids [B, T], got each head's own, [B, S, H]: put "
                "ignore_index where a pair does not count, or pass position_mask [B, S, H]"
            )


def _check_target_ids(name: str, scores: Tensor, targets: Targets) -> None:
    (batch, length), found = scores.shape[:2], tuple(targets.ids.shape)
    if len(found) == 2 and found[0] == batch and found[1] >= length:
        return
    remedy = f"pass ids, at least one for each position of {name}, or labels [B, S, H]"
    if found == (batch, length - 1):
        remedy = f"pass the ids uncut, or {name}[:, :-1] and labels ids[:, 1:] with shifted=True"
    elif scores.dim() == 4 and found == (batch, scores.shape[2]):
        remedy = f"{name} seems to be [B, H, S, ...], pass {name}.transpose(1, 2)"
    elif found == (length, batch):
        remedy = f"{name} seems to be [S, B, ...], pass {name}.transpose(0, 1)"
    axes = f"[B, T >= S] = ({batch}, >= {length})"
    raise ValueError(shape_message("target_ids", axes, None, targets.ids, remedy))


def _check_offsets(targets: Targets) -> None:
    offsets: Any = targets.offsets
    if offsets is None:
        return
    if not isinstance(offsets, tuple):
        raise TypeError(
            f"offsets must be a list of H = {targets.heads} whole numbers, got {shown(offsets)}: "
            "head k at t predicts the token at t + offsets[k]"
        )
    fit = all(is_whole(each) and 1 <= each < 2**31 for each in offsets)  # sums stay in int64
    if len(offsets) != targets.heads or not fit:
        raise ValueError(
            f"offsets must be H = {targets.heads} whole numbers >= 1 (and < 2**31), got {offsets}: "
            "head k at t predicts the token at t + offsets[k]"
        )


def _check_document_ids(targets: Targets) -> None:
    documents = targets.document_ids
    if documents is None:
        return
    check_integers("document_ids", documents, "[B, T]")
    batch, tokens = targets.ids.shape
    if tuple(documents.shape) == (batch, tokens + 1) and targets.shifted:
        return
    remedy = "the document of each token, as target_ids has them"
    remedy += ", or of the T + 1 that they were cut from" * targets.shifted
    if tuple(documents.shape) == (batch, targets.length):
        remedy = (
            f"append those of the {tokens - targets.length} tokens beyond the input, e.g. "
            "torch.cat((document_ids, document_ids[:, -1:]), 1) where the last document goes on"
        )
    check_shape("document_ids", documents, "[B, T]", (batch, tokens), remedy)


def _check_masks(name: str, scores: Tensor, targets: Targets) -> None:
    if targets.target_mask is not None:
        shape, remedy = tuple(targets.ids.shape), "one entry for each of target_ids"
        _check_mask("target_mask", targets.target_mask, "[B, T]", shape, remedy)
    mask = targets.position_mask
    if mask is not None:
        axes, shape = "[B, S]", tuple(scores.shape[:2])
        if isinstance(mask, Tensor) and mask.dim() == 3:
            axes, shape = "[B, S, H]", (*shape, targets.heads)
        _check_mask("position_mask", mask, axes, shape, f"one entry for each position of {name}")


def _check_mask(name: str, mask: Tensor, axes: str, shape: tuple[int, ...], remedy: str) -> None:
    check_tensor(name, mask, axes)
    check_shape(name, mask, axes, shape, remedy)
    if mask.is_complex():
        raise TypeError(f"{name} must hold bools, integers or floats, got {mask.dtype}: {remedy}")
    check_constant(name, mask)
    if mask.dtype.is_signed and is_readable(mask) and not are_finite(mask):
        place = (~((mask >= 0) & mask.isfinite())).nonzero()[0].tolist()
        raise ValueError(
            f"{name}{place} is {mask[tuple(place)].item()}: entries must be finite and >= 0; "
            "set it to 0 to leave the pair out"
        )


def check_ignore_index(ignore_index: int) -> None:
    remedy = "pass the id of the targets to leave out; one that is no id, as -100, leaves out none"
    check_whole("ignore_index", ignore_index, -(2**63), remedy)
