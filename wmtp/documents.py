"""Documents in packed rows, as other libraries say where they begin. B batch, T tokens a row."""

import torch
from torch import Tensor

from wmtp.kinds import check_integers, check_whole, is_readable


def documents_from_position_ids(position_ids: Tensor) -> Tensor:
    """The documents of packed rows whose positions begin anew with each.

        document_ids[b, t] = how often position_ids[b, s] != position_ids[b, s - 1] + 1, 0 < s <= t

    Args:
        position_ids: [B, T] integer.

    Returns:
        [B, T] int64, for `document_ids=`; counted from 0 in each row.

    Raises:
        TypeError: not integer. ValueError: not [B, T].

        >>> documents_from_position_ids(torch.tensor([[0, 1, 2, 0, 1, 0]]))
        tensor([[0, 0, 0, 1, 1, 2]])
    """
    check_integers("position_ids", position_ids, "[B, T]")
    if position_ids.dim() != 2:
        raise ValueError(
            f"position_ids must be [B, T], got {tuple(position_ids.shape)}: one row is "
            "position_ids[None]"
        )
    position_ids = position_ids.long()
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    first = begins.new_zeros(len(begins), min(position_ids.shape[1], 1))
    return torch.cat((first, begins), 1).long().cumsum(1)


def documents_from_cu_seqlens(cu_seqlens: Tensor, length: int | None = None) -> Tensor:
    """The documents of one flat row, from where they begin and the last one ends.

    Args:
        cu_seqlens: [documents + 1] integer, 0 and the sums of the documents' lengths, as
            FlashAttention's varlen functions take them.
        length: T of the row, what is beyond the last sum (padding) counts as a document of its own;
            None: the last sum. On a GPU None waits for the device.

    Returns:
        [1, T] int64, for `document_ids=`.

    Raises:
        TypeError: not integer.
        ValueError: not one-dimensional; `length` no whole number; on the CPU, not ascending from 0,
            or beyond `length`.

        >>> documents_from_cu_seqlens(torch.tensor([0, 3, 5]), length=6)
        tensor([[0, 0, 0, 1, 1, 2]])
    """
    check_integers("cu_seqlens", cu_seqlens, "[documents + 1]")
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(
            f"cu_seqlens must be [documents + 1], got {tuple(cu_seqlens.shape)}: it begins with 0"
        )
    if length is not None:
        check_whole("length", length, 0, "it is the number of tokens of the row, T")
    ends = cu_seqlens.long()
    total = int(ends[-1]) if length is None else length
    if is_readable(ends):
        ascending = bool((ends[1:] >= ends[:-1]).all())
        if int(ends[0]) != 0 or not ascending or int(ends[-1]) > total:
            raise ValueError(
                f"cu_seqlens must ascend from 0 to at most the row's length {total}, got "
                f"{ends[0]} ... {ends[-1]}: pass the sums of the documents' lengths"
            )
    position = torch.arange(total, device=ends.device)
    return torch.searchsorted(ends[1:].contiguous(), position, right=True)[None]
