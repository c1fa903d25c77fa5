"""The suite itself: contestants agree, bytes are counted exactly, the report reads its JSON."""

import pytest
import torch

from wmtp.benchmarks.memory import loss_peak_bytes, peak_bytes, profile_table
from wmtp.benchmarks.providers import PROVIDERS, make_arguments
from wmtp.benchmarks.report import table

SHAPE = (1, 64, 2, 1000)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_providers_agree(provider):
    arguments = make_arguments(SHAPE, torch.float32)
    truth = PROVIDERS["eager"](*arguments)
    loss = PROVIDERS[provider](*arguments)
    torch.testing.assert_close(loss, truth)
    (expected,) = torch.autograd.grad(truth, arguments[0])
    (gradient,) = torch.autograd.grad(loss, arguments[0])
    torch.testing.assert_close(gradient, expected)


def test_peak_counts_what_was_held_at_once():
    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        second = torch.empty(600, dtype=torch.uint8)
        third = torch.empty(500, dtype=torch.uint8)
        return second, third

    assert peak_bytes(call) == 1100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_holds_one_gradient_and_in_place_none(dtype):
    logits_bytes = 64 * 2 * 1000 * dtype.itemsize
    small = 64 * 2 * 4 * 20  # a score of [B, S, H] tensors
    assert logits_bytes <= loss_peak_bytes("fused", SHAPE, dtype, "cpu") <= logits_bytes + small
    assert loss_peak_bytes("fused_inplace", SHAPE, dtype, "cpu") <= small
    assert loss_peak_bytes("eager", SHAPE, dtype, "cpu") > 1.9 * logits_bytes


def test_profile_has_a_row_for_each_vocabulary():
    found = profile_table([100, 1000], 16, 2, torch.bfloat16, "cpu")
    assert found.row_count == 2
    assert len(found.columns) == 2 + len(PROVIDERS)


def test_report_puts_every_time_beside_eager_and_the_copy():
    def case(provider, median):
        return {
            "shape": [1, 2, 2, 10],
            "dtype": "float32",
            "provider": provider,
            "median_ms": median,
            "peak_bytes": 160,
        }

    cases = [case("eager", 8.0), case("fused", 2.0), case("copy", 1.0)]
    found = table({"environment": {"cpu": "x"}, "cases": cases})
    columns = {column.header: list(column.cells) for column in found.columns}
    assert columns["provider"] == ["eager", "fused", "copy"]
    assert columns["eager /"] == ["1.00x", "4.00x", "8.00x"]
    assert columns["/ copy"] == ["8.00x", "2.00x", "1.00x"]
    assert columns["peak"] == ["1.000"] * 3
