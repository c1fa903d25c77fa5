"""DTensors: what each process takes of them.

Logits and hidden states that are replicated, or sharded along batch or sequence, are taken as the
part that this process has; its gradient goes back as a DTensor placed alike. The loss is then of
that part alone. A weight is gathered.
"""

from typing import Any

import torch
from torch import Tensor

from wmtp.layout import PLAIN

BATCH, SEQUENCE = 0, 1  # dimensions that may be sharded
_LOCAL = (*PLAIN, type(None), float, int, str)  # no DTensor, nor a list that may hold some


def local_parts(name: str, scores: Any, **others: Any) -> tuple[Any, ...]:
    """`scores` [B, S, ...] or a list of such, and what goes with them; all but DTensors as it is.

    Raises:
        ValueError: scores of which no process has a whole row, or others placed elsewhere.
    """
    values = scores, *others.values()
    for value in values:
        if type(value) not in _LOCAL:
            break
    else:  # as good as always
        return values
    listed = isinstance(scores, (list, tuple))
    parts = scores if listed else (scores,)
    if not any(map(_is_dtensor, (*parts, *others.values()))):
        return values
    first = parts[0]
    local = [_part_of_scores(name, part, first) for part in parts]
    return (
        local if listed else local[0],
        *(_part(other, value, name, first) for other, value in others.items()),
    )


def gathered(weight: Tensor) -> Tensor:
    """A DTensor's whole; each process has a gradient of its own data, and theirs are averaged."""
    if not _is_dtensor(weight):
        return weight
    from torch.distributed.tensor import Partial

    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)  # type: ignore[attr-defined]


def _is_dtensor(value: Any) -> bool:
    if type(value) in PLAIN or not isinstance(value, Tensor):
        return False
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # here, for it takes a second

    return isinstance(value, DTensor)


def _part_of_scores(name: str, scores: Any, first: Any) -> Tensor:
    if not _placed_alike(scores, first):
        raise ValueError(
            f"all heads' {name} must be placed alike, got {_placed(first)} and {_placed(scores)}: "
            f"redistribute one of them"
        )
    if not _is_dtensor(scores):
        return scores
    whole = [_is_whole(placement, scores.dim()) for placement in scores.placements]
    if not all(whole):
        pairs = zip(scores.placements, whole, strict=True)
        wanted = ", ".join(repr(p) if kept else "Replicate()" for p, kept in pairs)
        raise ValueError(
            f"{name} may be sharded along batch and sequence alone, got {_placed(scores)}: gather "
            f"it first with {name}.redistribute(placements=[{wanted}])"
        )
    return scores.to_local()


def _part(name: str, value: Any, scores_name: str, scores: Any) -> Any:
    """Of what goes with the scores."""
    if isinstance(value, (list, tuple)):
        return [_part(name, each, scores_name, scores) for each in value]
    if not _is_dtensor(value):
        _check_local_shape(name, value, scores_name, scores)
        return value
    if value.dim() <= 1:
        if not all(placement.is_replicate() for placement in value.placements):
            raise ValueError(
                f"{name} must be the same for all processes, got {_placed(value)}: pass "
                f"{name}.full_tensor()"
            )
    elif not _placed_alike(value, scores):
        raise ValueError(
            f"{name} must be placed as {scores_name}, got {_placed(value)} and {_placed(scores)}: "
            f"pass the part that goes with this process's {scores_name}, a plain tensor"
        )
    if name == "ref_ce" and any(getattr(p, "dim", None) == SEQUENCE for p in value.placements):
        raise ValueError(
            f"ref_ce has no entry for the last position of each part, got {_placed(value)}: pass "
            f"this process's own, as next_token_cross_entropy of its part returns it"
        )
    return value.to_local()


def _check_local_shape(name: str, value: Any, scores_name: str, scores: Any) -> None:
    if not isinstance(value, Tensor) or not _is_dtensor(scores):
        return
    local = scores.to_local().shape[:2]
    if value.shape[:2] == scores.shape[:2] != local:
        raise ValueError(
            f"{name} must be of this process's part of {scores_name}, [B, S] = {tuple(local)}, got "
            f"the whole, {tuple(value.shape)}: pass its part, or a DTensor placed alike"
        )


def _placed_alike(a: Any, b: Any) -> bool:
    if not _is_dtensor(a) or not _is_dtensor(b):
        return _is_dtensor(a) == _is_dtensor(b)
    return a.device_mesh == b.device_mesh and a.placements == b.placements


def _is_whole(placement: Any, rank: int) -> bool:
    """Whether a process that has a token has all of its row."""
    dim = getattr(placement, "dim", None)  # strided shards have one too
    return placement.is_replicate() if dim is None else dim % rank in (BATCH, SEQUENCE)


def _placed(value: Any) -> str:
    if not _is_dtensor(value):
        return "a plain tensor"
    return f"a DTensor {value.placements}"
