"""Cross entropies of rows, and what is left where the logits were: each backend against fp64."""

import pytest
import torch
import torch.nn.functional as F

from support.agreement import GRADIENT_TOLERANCE
from support.backends import row_settings
from support.covering import in_pairs
from support.instruction_sets import HERE
from wmtp.backends import BACKENDS, cpu
from wmtp.checks import FLOAT_DTYPES

LOW = [torch.float32, torch.bfloat16, torch.float16]


def truth(logits, targets, row_scalar):
    exact = logits.double()
    ce = F.cross_entropy(exact, targets, reduction="none")
    return ce, row_scalar[:, None] * (exact.softmax(-1) - F.one_hot(targets, logits.shape[1]))


def assert_agrees(function, rows, vocabulary, dtype, device="cpu"):
    logits = (3 * torch.randn(rows, vocabulary + 3)).to(device, dtype)[:, 2:-1]  # odd strides
    target_ids = torch.randint(vocabulary, (rows,), device=device)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    row_scalar = torch.randn(rows, device=device, dtype=acc)
    before = logits.clone()
    ce, left = truth(before, target_ids, row_scalar.double())
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    found = function(logits, target_ids, None, row_settings()).ce
    torch.testing.assert_close(found.double(), ce, rtol=tolerance, atol=tolerance)
    assert torch.equal(logits, before)
    found = function(logits, target_ids, row_scalar, row_settings()).ce
    torch.testing.assert_close(found.double(), ce, rtol=tolerance, atol=tolerance)
    assert (logits.double() - left).abs().max() <= GRADIENT_TOLERANCE[dtype] * left.abs().max()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 33), (7, 1003), (2, 40001)])
def test_rows(target, rows, vocabulary, dtype):
    backend, device = target
    assert_agrees(BACKENDS[backend].rows_ce_, rows, vocabulary, dtype, device)


@in_pairs(instruction_set=HERE, dtype=FLOAT_DTYPES, shape=[(1, 1), (6, 130), (3, 9001)])
@pytest.mark.usefixtures("instruction_set")
def test_rows_with_every_instruction_set(shape, dtype):
    assert_agrees(cpu.rows_ce_, *shape, dtype)


def test_no_rows():
    none = torch.empty(0, 9)
    assert cpu.rows_ce_(
        none, torch.zeros(0, dtype=torch.long), torch.empty(0), row_settings()
    ).ce.shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(target, bad):
    backend, device = target
    logits = torch.randn(3, 50, device=device)
    logits[1, 7] = bad
    target_ids = torch.tensor([3, 4, 5], device=device)
    scalars = torch.ones(3, device=device)
    ce = BACKENDS[backend].rows_ce_(logits, target_ids, scalars, row_settings()).ce
    assert ce.isfinite().tolist() == [True, False, True]
    assert logits[[0, 2]].isfinite().all()
    assert logits[1].isnan().any()


def test_a_target_outside_is_found():
    with pytest.raises(IndexError, match="for 9, outside"):
        cpu.rows_ce_(torch.randn(2, 9), torch.tensor([1, 9]), None, row_settings())
