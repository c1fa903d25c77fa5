"""The shift, pinned by `arange`: every value says where it came from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wmtp.labels import shift_to_heads


@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 6))
def test_head_k_at_t_predicts_t_plus_k_plus_1(batch, length, horizon):
    ids = torch.arange(batch * length).reshape(batch, length)
    shifted = shift_to_heads(ids, horizon, fill=-100)
    assert shifted.shape == (batch, length, horizon)
    for b in range(batch):
        for t in range(length):
            for k in range(horizon):
                inside = t + k + 1 < length
                assert shifted[b, t, k] == (b * length + t + k + 1 if inside else -100)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_keeps_dtype_and_fill(dtype):
    shifted = shift_to_heads(torch.arange(4, dtype=dtype)[None], 2, fill=-7)
    assert shifted.dtype == dtype
    assert shifted[0].tolist() == [[1, 2], [2, 3], [3, -7], [-7, -7]]


def test_non_contiguous_values():
    ids = torch.arange(12).reshape(6, 2).T
    assert torch.equal(shift_to_heads(ids, 2, -1), shift_to_heads(ids.contiguous(), 2, -1))
