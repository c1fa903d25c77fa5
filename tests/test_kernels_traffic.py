"""Bytes that the Triton kernels move, counted lane by lane in the interpreter: one pass."""

import pytest
import torch

from support.backends import row_settings
from support.covering import in_pairs
from wmtp import fused_weighted_mtp_loss, kernels
from wmtp.kernels import tiers
from wmtp.labels import has_target
from wmtp.records import RowInputs
from wmtp.weightings import DFT, Decay, DPace, EntropyGate, Focal

if not kernels.interpreted():
    pytest.skip("counted in Triton's interpreter only", allow_module_level=True)

from wmtp.benchmarks.traffic import (
    IGNORED,
    OPTIONS,
    TIERS,
    WEIGHTINGS,
    Traffic,
    measure,
    measure_chunk,
    serves,
)

ODD, ALIGNED = 8191, 8192
DTYPES = [torch.float32, torch.bfloat16]


@in_pairs(weighting=WEIGHTINGS, dtype=DTYPES, vocabulary=[ODD, ALIGNED])
def test_forward_reads_the_valid_logits_once(weighting, dtype, vocabulary):
    moved = measure(weighting, "", False, vocabulary, dtype)
    assert 1.0 <= moved.read <= 1.01
    assert moved.read_reference <= 1.01
    assert (moved.read_reference >= 1.0) == (weighting == "ref_logits")
    assert moved.written <= 0.01
    assert moved.others <= 0.01


@in_pairs(
    tier=TIERS,
    weighting=WEIGHTINGS,
    vocabulary=[ODD, ALIGNED],
    where=lambda tier, weighting, _: serves(tier, weighting),
)
def test_loss_and_gradient_write_once_and_read_once_or_twice(tier, weighting, vocabulary):
    moved = measure(weighting, tier, True, vocabulary)
    reads = 2 if tier == "online" else 1
    assert reads <= moved.read <= reads + 0.01
    assert moved.read_reference <= 1.01
    assert 1.0 <= moved.written <= 1.01
    assert moved.others <= 0.01


@pytest.mark.parametrize("tier", TIERS)
def test_in_place_moves_no_more(tier):
    moved = measure("given", tier, True, ODD, torch.float32, inplace=True)
    reads = 2 if tier == "online" else 1
    assert reads <= moved.read <= reads + 0.01
    assert 1.0 <= moved.written <= 1.01


@in_pairs(tier=[*TIERS, ""], option=OPTIONS, vocabulary=[2047, 2048], shared=[False, True])
def test_no_option_moves_more(tier, option, vocabulary, shared):
    """But 16 bytes a row, where it is asked which logit is the first of the largest, and what is
    found: two numbers and a bit."""
    case, row = ("uniform", tier, tier != "", vocabulary), vocabulary * 2
    plain, moved = measure(*case, shared=shared), measure(*case, shared=shared, **OPTIONS[option])
    measured = OPTIONS[option].get("metrics", False)
    assert 0 <= moved.read - plain.read <= 16.01 * measured / row
    assert 0 <= moved.written - plain.written <= 9.01 * (4 if shared else 1) / row


@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_makes_parts_of_rows_move_more(option, monkeypatch):
    monkeypatch.setattr(tiers, "machine", lambda _: tiers.Machine(32, 1000))
    moved = measure("uniform", "online", True, 40_001, **OPTIONS[option])
    assert 2 <= moved.read <= 2.01
    assert 1 <= moved.written <= 1.01


RULES = {
    "dft": (DFT(), "row"),
    "focal": (Focal(), "row"),
    "gate": (EntropyGate(), "row"),
    "dft x focal": (DFT() * Focal(), "row"),
    "dft x decay": (DFT() * Decay(0.5), "row"),
    "pace": (DPace(), "token"),
    "gate x pace": (EntropyGate() * DPace(), "token"),
}


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_moves_what_known_weights_or_excess_do(name, online):
    """Rules of rows as known weights, rules of tokens as excess; entropies 16 bytes a row more."""
    rule, scope = RULES[name]
    tier, like = "online" if online else scope, "uniform" if scope == "row" else "ref_ce"
    plain, moved = measure(like, tier, True, 2047), measure(rule, tier, True, 2047)
    small = 40 / (2 * 2047)  # numbers of a row
    assert abs(moved.read - plain.read) <= small
    assert abs(moved.written - plain.written) <= small


@pytest.mark.parametrize("vocabulary", [ODD, ALIGNED])
@pytest.mark.parametrize("tier", ["row", "online", ""])
def test_a_chunk_of_the_linear_op_is_read_once_and_written_once(tier, vocabulary):
    moved = measure_chunk(tier, bool(tier), vocabulary)
    reads = 2 if tier == "online" else 1
    assert reads <= moved.read <= reads + 0.01
    assert bool(tier) <= moved.written <= bool(tier) + 0.01
    assert moved.others <= 0.01


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("weighting", ["uniform", "ref_ce"])
def test_one_row_for_all_heads_is_read_once(weighting, gradient):
    moved = measure(weighting, "", gradient, ODD, torch.float32, shared=True)
    assert 1.0 <= moved.read <= 1.01
    assert gradient <= moved.written <= gradient + 0.01


def row_traffic(shape, vocabulary, dtype):
    """Logits, targets of which some are ignored, and the bytes of the rows that have one."""
    logits = torch.randn(*shape, vocabulary).to(dtype)
    target_ids = torch.randint(vocabulary, shape[:2]).index_fill_(1, torch.tensor([2]), IGNORED)
    valid = has_target(target_ids, shape[2], IGNORED)
    return logits, target_ids, int(valid.sum()) * vocabulary * dtype.itemsize


@pytest.mark.parametrize("vocabulary", [ODD, ALIGNED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_cross_entropies_reads_once_and_writes_once(dtype, vocabulary):
    logits, target_ids, valid_bytes = row_traffic((2, 4, 2), vocabulary, dtype)
    small = {"row_max": torch.zeros(2, 4, 2), "log_sum": torch.zeros(2, 4, 2)}
    small |= {"row_scalar": torch.rand(2, 4, 2)}
    traffic = Traffic(logits=logits, target_ids=target_ids, **small)
    with traffic.counted():
        kernels.row_gradient(RowInputs(logits, target_ids[:, 1:], **small), row_settings())
    valid_rows = valid_bytes // (vocabulary * logits.element_size())
    entries = valid_rows * logits.element_size()  # each row's target, by itself
    assert traffic.loaded["logits"] == valid_bytes + entries
    assert traffic.loaded["elsewhere"] == 0
    assert traffic.stored["elsewhere"] == traffic.stored.total() == logits.nbytes + entries


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_logits_are_read_once(dtype):
    logits, target_ids, valid_bytes = row_traffic((2, 4, 1), ODD, dtype)
    reference = logits[:, :, 0].contiguous()
    traffic = Traffic(logits=reference, target_ids=target_ids)
    with traffic.counted():
        kernels.next_token_ce(reference, target_ids[:, 1:], row_settings())
    assert 1.0 <= traffic.loaded["logits"] / valid_bytes <= 1.01
    assert traffic.loaded["elsewhere"] <= 8 * 8  # a row scalar and its factor a position


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_gradient_is_touched_only_if_the_factor_is_not_1(factor):
    grad = torch.randn(1, 3, 1, 5000)
    traffic = Traffic(grad=grad)
    with traffic.counted():
        kernels.multiply_(grad, torch.tensor(factor))
    moved = 0 if factor == 1 else grad.nbytes
    assert traffic.loaded["grad"] == traffic.stored["grad"] == moved


FORMS = {
    "documents": {"document_ids": torch.arange(6).expand(2, 6) // 3},
    "shifted": {"shifted": True},
    "masks": {"target_mask": torch.arange(12).view(2, 6) % 4 > 0},
    "by head": {"reduction": "head_mean"},
    "multiplied": {"position_mask": torch.rand(2, 6) + 0.5, "reduction": "pair_mean"},
}


@pytest.mark.parametrize(("tier", "form"), [(t, f) for t in ("token", "online") for f in FORMS])
def test_no_form_reads_more_than_the_rows_of_the_pairs_that_count(tier, form, monkeypatch):
    monkeypatch.setenv("WMTP_TRITON_TIER", tier)
    logits = torch.randn(2, 6, 4, ODD).requires_grad_()
    ids, how = torch.randint(ODD, (2, 6)), FORMS[form]
    how = how | {"ref_ce": torch.rand(2, 6 if form == "shifted" else 5)}
    traffic = Traffic(logits=logits)
    with traffic.counted():
        result = fused_weighted_mtp_loss(logits, ids, **how, backend="triton")
    rows = int((result.ce_per_head != 0).sum())
    assert rows < 2 * 6 * 4
    reads = 2 if tier == "online" else 1
    assert reads <= traffic.loaded["logits"] / (rows * ODD * 4) <= reads + 0.01
    written = sum(traffic.stored.values()) / logits.nbytes
    assert 1.0 <= written <= 1.01
