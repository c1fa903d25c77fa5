"""Bytes that the Triton kernels move, counted lane by lane in the interpreter: one pass."""

from collections import Counter

import pytest
import torch

from wmtp import kernels
from wmtp.labels import shift_to_heads

if not kernels.interpreted():
    pytest.skip("counted in Triton's interpreter only", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder

IGNORED = -100


class Traffic:
    """Bytes loaded from and stored to each named tensor; lanes elsewhere are named `elsewhere`."""

    def __init__(self, monkeypatch, **tensors: torch.Tensor):
        self.tensors = tensors
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(builder, ptrs, mask, *rest):
            self._count(self.loaded, ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def counted_store(builder, ptrs, value, mask, *rest):
            self._count(self.stored, ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)

    def _count(self, counter, ptrs, mask):
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        active = ptrs.data[mask.data]
        counted = 0
        for name, tensor in self.tensors.items():
            begin = tensor.data_ptr()
            end = begin + tensor.untyped_storage().nbytes()
            inside = int(((active >= begin) & (active < end)).sum())
            counter[name] += inside * width
            counted += inside
        counter["elsewhere"] += (active.size - counted) * width


@pytest.fixture(params=[8192, 8191], ids=["aligned", "odd"])
def vocabulary(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def logits(request, vocabulary):
    return torch.randn(2, 4, 2, vocabulary).to(request.param)


@pytest.fixture
def target_ids(vocabulary):
    return torch.randint(vocabulary, (2, 4)).index_fill_(1, torch.tensor([2]), IGNORED)


def valid_bytes(logits, target_ids):
    """Bytes of the rows that have a target."""
    valid = shift_to_heads(target_ids, logits.shape[2], IGNORED) != IGNORED
    return int(valid.sum()) * logits.shape[-1] * logits.element_size()


@pytest.mark.parametrize("weighting", ["uniform", "given", "ref_ce"])
def test_forward_reads_the_valid_logits_once(monkeypatch, logits, target_ids, weighting):
    inputs = {"logits": logits, "target_ids": target_ids}
    if weighting == "given":
        inputs["head_weights"] = torch.rand(2, 4, 2)
    elif weighting == "ref_ce":
        inputs["ref_ce"] = torch.rand(2, 3)
    traffic = Traffic(monkeypatch, **inputs)
    kernels.token_loss(
        logits, target_ids, inputs.get("head_weights"), inputs.get("ref_ce"),
        0.7, False, True, IGNORED,
    )  # fmt: skip
    assert 1.0 <= traffic.loaded["logits"] / valid_bytes(logits, target_ids) <= 1.01
    assert traffic.loaded["elsewhere"] == 0
    assert traffic.stored["logits"] == 0
    assert traffic.stored.total() <= 0.01 * logits.nbytes


def test_shared_heads_are_read_once_for_all_targets(monkeypatch, logits, target_ids):
    rows = logits[:, :, 0].contiguous()
    valid = (shift_to_heads(target_ids, 4, IGNORED) != IGNORED).any(-1).sum()
    once = int(valid) * rows.shape[-1] * rows.element_size()
    shared = rows[:, :, None].expand(-1, -1, 4, -1)
    traffic = Traffic(monkeypatch, logits=rows)
    *_, lse = kernels.token_loss(shared, target_ids, None, None, 0.7, False, True, IGNORED)
    assert 1.0 <= traffic.loaded["logits"] / once <= 1.01

    traffic = Traffic(monkeypatch, logits=rows)
    kernels.row_gradient(shared, target_ids, lse, torch.rand(2, 4, 4), IGNORED)
    assert traffic.loaded["logits"] == once
    assert traffic.stored.total() == rows.nbytes


@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_reads_once_and_writes_once(monkeypatch, logits, target_ids, inplace):
    lse, row_scalar = torch.zeros(2, 4, 2), torch.rand(2, 4, 2)
    inputs = {"logits": logits, "target_ids": target_ids, "lse": lse, "row_scalar": row_scalar}
    traffic = Traffic(monkeypatch, **inputs)
    kernels.row_gradient(logits, target_ids, lse, row_scalar, IGNORED, inplace=inplace)
    assert traffic.loaded["logits"] == valid_bytes(logits, target_ids)
    assert traffic.loaded["elsewhere"] == 0
    assert traffic.stored["logits" if inplace else "elsewhere"] == logits.nbytes
    assert traffic.stored.total() == logits.nbytes


def test_reference_logits_are_read_once(monkeypatch, logits, target_ids):
    reference = logits[:, :, 0].contiguous()
    traffic = Traffic(monkeypatch, logits=reference, target_ids=target_ids)
    kernels.next_token_ce(reference, target_ids, IGNORED)
    valid = valid_bytes(reference[:, :, None], target_ids)
    assert 1.0 <= traffic.loaded["logits"] / valid <= 1.01
    assert traffic.loaded["elsewhere"] == 0
