"""The cases of the GPU suite: which there are, in which order, and what is predicted of them."""

import json

import pytest
import torch

from support.gpu_cases import BOTH, MAIN, speed_case
from wmtp.benchmarks import ROOT
from wmtp.benchmarks.gpu_cases import (
    DTYPES,
    LATE,
    LINEAR_SIZES,
    PREDICTED_CARD,
    all_cases,
    importance,
    linear_cases,
    predicted_ms,
    predicted_tier,
    products_flops,
    speed_cases,
    tier_cases,
)
from wmtp.benchmarks.problem import Case
from wmtp.benchmarks.providers import DIRECTIONS, FLOORS, LINEAR, PEERS, absent

FROZEN = "frozen"


def test_most_important_cases_first():
    cases = speed_cases()
    places = [importance(case) for case in cases]
    assert places == sorted(places)
    assert (cases[0].shape, cases[0].dtype, cases[0].provider) == (
        *(MAIN, "bfloat16"), "fused",
    )  # fmt: skip
    bf16 = [case.provider for case in cases if case.dtype == "bfloat16"]
    assert [case.dtype for case in cases[: len(bf16)]] == ["bfloat16"] * len(bf16)
    first = bf16.index("liger")
    assert set(bf16[:first]) == {"fused", "fused_inplace", "copy", "eager"}
    assert not {"fused", "fused_inplace", "copy", "eager"} & set(bf16[first:])
    assert bf16[-1] == "cce_kernel"
    assert len(set(cases)) == len(cases)
    assert {case.provider for case in cases if case.weighting == "none"} == set(PEERS)


def test_there_is_time_for_every_vocabulary_dtype_and_direction():
    rare = ("quack", "flash_attn", "linear_cross_entropy")
    cases = [case for case in speed_cases() if case.provider not in rare]
    assert len(cases) <= 120
    assert {case.shape for case in cases} == {
        (1, 1024, 4, vocabulary) for vocabulary in (32000, 50257, 128256, 256000)
    }
    copies = [case for case in cases if case.provider == "copy"]
    assert len(copies) == 4 * 2  # once a problem
    weightings = {(case.weighting, *case[2:4]) for case in cases if case.shape[3] == 128256}
    assert weightings >= {
        (weighting, dtype, direction)
        for weighting in ("given", "ref_ce", "uniform")
        for dtype in DTYPES
        for direction in DIRECTIONS
    }


def test_tiers_are_forced_wherever_they_can_serve():
    forced = {(case.tier, case.weighting) for case in tier_cases()}
    assert forced == {
        ("token", "given"),
        ("row", "given"),
        ("online", "given"),
        ("token", "ref_ce"),
        ("online", "ref_ce"),
    }


# 1024 x 4 x 32000 bf16 are 262.144 MB, at 0.9 x 3.35 TB/s 86.95 us; on 132 SMs.
@pytest.mark.parametrize(
    ("case", "tier", "units", "waves"),
    [
        (speed_case(direction="forward"), "online", 1, 8),  # 4 programs an SM
        (speed_case(), "online", 2, 16),  # 2, of 64 KB: 17 MB, of an L2 of 52 that holds 0.7
        (speed_case("fused_inplace", "inplace"), "online", 2, 16),
        (speed_case(weights="ref_ce"), "online", 2, 8),  # 1, of 4 x 64 KB: 34 MB
        (speed_case(tier="row"), "row", 2, 32),
        (speed_case(shape=(1, 256, 4, 128256)), "online", 2, 8),
        # 132 x 512000 bytes: 0.5431 of them fit 0.7 of the L2.
        (speed_case(shape=(1, 256, 4, 256000)), "online", 3 - 0.543052, 8),
        # 16 tokens x 4 x 512 KB do.
        (
            speed_case(weights="ref_ce", tier="online", shape=(1, 16, 4, 256000)),
            *("online", 2, 1),
        ),
    ],
)
def test_prediction_by_hand(case, tier, units, waves):
    assert predicted_tier(case) == tier
    elements = torch.Size(case.shape).numel()
    moved = units * 0.0869465 * elements / 131_072_000
    assert predicted_ms(case) == pytest.approx(moved + 0.012 + 0.001 * waves, rel=1e-5)


def test_a_copy_is_its_bytes():
    assert predicted_ms(speed_case(provider="copy")) == pytest.approx(2 * 0.0869465, rel=1e-5)


def test_an_h100_took_what_is_predicted():
    """`results/gpu-h100.jsonl`: ours, the copies and the bare products."""
    lines = (ROOT / "benchmarks" / "results" / "gpu-h100.jsonl").read_text().splitlines()
    shares = []
    for record in map(json.loads, lines[1:]):
        fields = {name: record[name] for name in Case._fields if name in record and name != "tier"}
        case = Case(**{**fields, "shape": tuple(record["shape"])})
        if predicted := predicted_ms(case):
            shares.append(predicted / record["median_ms"])
    assert len(shares) >= 40
    assert min(shares) > 0.85
    assert max(shares) < 1.15


def test_no_prediction_for_other_peoples_code_or_an_impossible_tier():
    assert predicted_ms(speed_case(provider="eager")) is None
    assert predicted_ms(speed_case(weights="ref_ce", shape=(1, 8, 4, 256000), tier="token")) is None
    assert PREDICTED_CARD.bytes_a_second == 3.35e12


# --- linear --------------------------------------------------------------------------------------


def linear_case(
    provider="fused", direction=BOTH, shape=(1, 1024, 4, 128256), dim=4096, weights="uniform"
):
    return Case("linear", shape, "bfloat16", direction, provider, weights, dim=dim)


def test_ours_the_products_and_eager_at_every_size_before_any_peer():
    cases = linear_cases()
    first, later = cases[: 7 * len(LINEAR_SIZES)], cases[7 * len(LINEAR_SIZES) :]
    assert [case.shape for case in first] == [shape for shape, _ in LINEAR_SIZES for _ in range(7)]
    assert {found.provider for found in first} == {"fused", "eager", *FLOORS.values()}
    assert [(case.provider, case.shape) for case in later] == [
        (peer, shape) for peer in LATE for shape, _ in LINEAR_SIZES
    ]
    assert {"fused", "eager", *LATE} == set(LINEAR)
    assert (first[0].provider, first[0].dim) == ("fused", 4096)
    assert len(set(cases)) == len(cases)
    assert all_cases()["linear"] == [case for case in cases if case.provider not in absent(LINEAR)]


def test_products_are_counted_over_the_rows_with_a_target():
    small = linear_case(shape=(2, 5, 2, 10), dim=3)  # 2 x (4 + 3) rows
    assert products_flops(small) == 3 * 2 * 14 * 3 * 10
    assert products_flops(small._replace(direction=FROZEN)) == 2 * 2 * 14 * 3 * 10


def test_predictions_by_hand():
    rows, vocabulary, dim = 4096 - 10, 32000, 4096
    sizes = {"shape": (1, 1024, 4, vocabulary), "dim": dim}
    product = 2 * rows * vocabulary * dim / (0.74 * 989e12)
    assert predicted_ms(linear_case("three_products", **sizes)) == pytest.approx(3e3 * product)
    assert predicted_ms(linear_case("two_products", FROZEN, **sizes)) == pytest.approx(
        2e3 * product
    )
    bandwidth = 0.9 * 3.35e12
    kernel = 2 * rows * vocabulary * 2 / bandwidth  # one read and one write
    wait = 1e-3
    assert predicted_ms(linear_case(direction=FROZEN, **sizes)) == pytest.approx(
        1e3 * (2 * product + kernel + wait)
    )
    # One chunk: it takes no more memory than the sum of two.
    assert predicted_ms(linear_case(**sizes)) == pytest.approx(1e3 * (3 * product + kernel + wait))
    assert predicted_ms(linear_case("eager", **sizes)) is None


def test_small_chunks_wait_for_the_sum():
    """512 MiB are 1044 rows at V = 256000: a chunk's sum takes longer than its operations."""
    wide = linear_case(shape=(1, 2048, 4, 256000), dim=2304)
    floor = predicted_ms(linear_case("three_products", shape=wide.shape, dim=wide.dim))
    kernel = 1e3 * 2 * (8192 - 10) * 256000 * 2 / (0.9 * 3.35e12)
    assert predicted_ms(wide) > floor + kernel + 1.0
