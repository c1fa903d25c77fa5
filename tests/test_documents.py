"""Where documents begin, as other libraries say it."""

import pytest
import torch

from wmtp import (
    documents_from_cu_seqlens,
    documents_from_position_ids,
    fused_weighted_mtp_loss,
)


def test_positions_that_begin_anew():
    positions = torch.tensor([[0, 1, 2, 0, 1], [5, 6, 0, 0, 1]])
    assert documents_from_position_ids(positions).tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 2, 2]]
    assert documents_from_position_ids(torch.zeros(2, 0, dtype=torch.int32)).shape == (2, 0)


def test_sums_of_lengths():
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)  # the second is empty
    assert documents_from_cu_seqlens(cu_seqlens).tolist() == [[0, 0, 2, 2, 2]]
    assert documents_from_cu_seqlens(cu_seqlens, 7).tolist() == [[0, 0, 2, 2, 2, 3, 3]]


def test_both_say_the_same_and_cut_the_same_pairs():
    lengths = [16, 16]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    by_positions = documents_from_position_ids(positions)
    by_sums = documents_from_cu_seqlens(torch.tensor([0, 16, 32]))
    assert torch.equal(by_positions, by_sums)
    logits, ids = torch.randn(1, 32, 4, 9), torch.randint(9, (1, 32))
    packed = fused_weighted_mtp_loss(logits, ids, document_ids=by_sums)
    apart = fused_weighted_mtp_loss(logits.view(2, 16, 4, 9), ids.view(2, 16))
    assert torch.equal(packed.ce_per_head.view(2, 16, 4), apart.ce_per_head)
    torch.testing.assert_close(packed.loss, apart.loss)
    across = (fused_weighted_mtp_loss(logits, ids).ce_per_head != 0) & (packed.ce_per_head == 0)
    assert across.sum() == 10  # 1 + 2 + 3 + 4 pairs predict across the border


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(3).long(), ValueError, r"position_ids must be \[B, T\], got \(3,\)"),
        (torch.zeros(1, 3), TypeError, "position_ids must hold integers"),
    ],
)
def test_bad_positions(bad, error, message):
    with pytest.raises(error, match=message):
        documents_from_position_ids(bad)


@pytest.mark.parametrize(
    ("bad", "length"), [([1, 3], None), ([0, 3, 2], None), ([0, 3], 2), ([[0, 3]], None)]
)
def test_bad_sums(bad, length):
    with pytest.raises(ValueError, match="cu_seqlens must"):
        documents_from_cu_seqlens(torch.tensor(bad), length)


@pytest.mark.parametrize("length", [6.5, True, "6", -1])
def test_a_length_that_is_no_whole_number(length):
    with pytest.raises(ValueError, match="length must be a whole number >= 0"):
        documents_from_cu_seqlens(torch.tensor([0, 3]), length)
