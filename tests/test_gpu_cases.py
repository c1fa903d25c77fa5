"""The cases of the GPU suite: which there are, in which order, and what is predicted of them."""

import pytest
import torch

from support.gpu_jobs import MAIN, job
from wmtp.benchmarks.gpu_cases import (
    DTYPES,
    PREDICTED_CARD,
    importance,
    predicted_ms,
    predicted_tier,
    speed_jobs,
    tier_jobs,
)
from wmtp.benchmarks.providers import DIRECTIONS


def test_most_important_cases_first():
    jobs = speed_jobs(absent=["liger"])
    places = [importance(job) for job in jobs]
    assert places == sorted(places)
    assert (jobs[0].case.shape, jobs[0].case.dtype, jobs[0].case.provider) == (
        *(MAIN, "bfloat16"), "fused",
    )  # fmt: skip
    bf16 = [job.case.provider for job in jobs if job.case.dtype == "bfloat16"]
    assert [job.case.dtype for job in jobs[: len(bf16)]] == ["bfloat16"] * len(bf16)
    first = bf16.index("compiled")
    assert set(bf16[:first]) == {"fused", "fused_inplace", "copy", "eager"}
    assert not {"fused", "fused_inplace", "copy", "eager"} & set(bf16[first:])
    assert bf16[-1] == "cce_kernel"
    assert len(set(jobs)) == len(jobs)
    assert "liger" not in {job.case.provider for job in jobs}
    assert {job.case.provider for job in jobs if job.case.weighting == "none"} == {
        *("quack", "flash_attn", "cce_kernel", "linear_cross_entropy")
    }


def test_there_is_time_for_every_vocabulary_dtype_and_direction():
    jobs = speed_jobs(absent=["quack", "flash_attn", "linear_cross_entropy"])
    assert len(jobs) <= 120
    assert {job.case.shape for job in jobs} == {
        (1, 1024, 4, vocabulary) for vocabulary in (32000, 50257, 128256, 256000)
    }
    copies = [job for job in jobs if job.case.provider == "copy"]
    assert len(copies) == 4 * 2  # once a problem
    weightings = {
        (job.case.weighting, *job.case[2:4]) for job in jobs if job.case.shape[3] == 128256
    }
    assert weightings >= {
        (weighting, dtype, direction)
        for weighting in ("given", "ref_ce", "uniform")
        for dtype in DTYPES
        for direction in DIRECTIONS
    }


def test_tiers_are_forced_wherever_they_can_serve():
    forced = {(job.tier, job.case.weighting) for job in tier_jobs()}
    assert forced == {
        ("token", "given"),
        ("row", "given"),
        ("online", "given"),
        ("token", "ref_ce"),
        ("online", "ref_ce"),
    }


# 1024 x 4 x 32000 bf16 are 262.144 MB, at 0.9 x 3.35 TB/s 86.95 us.
@pytest.mark.parametrize(
    ("case", "tier", "units"),
    [
        (job(direction="forward"), "online", 1),
        # Two programs on each of 132 SMs, 64 KB each: 17 MB, of an L2 of 52.
        (job(), "online", 2),
        (job("fused_inplace", "inplace"), "online", 2),
        (job(weights="ref_ce"), "online", 2),  # one program an SM, 4 x 64 KB: 34 MB
        (job(tier="row"), "row", 2),
        (job(provider="copy"), "", 2),
        (job(weights="ref_ce", shape=(1, 256, 4, 128256)), "online", 3),
        (job(shape=(1, 256, 4, 128256)), "online", 2),
        (job(shape=(1, 256, 4, 256000)), "online", 3),
        # 16 tokens x 4 x 512 KB lie in the L2 when they are read again.
        (job(weights="ref_ce", tier="online", shape=(1, 16, 4, 256000)), "online", 2),
    ],
)
def test_prediction_by_hand(case, tier, units):
    assert predicted_tier(case) == tier
    elements = torch.Size(case.case.shape).numel()
    assert predicted_ms(case) == pytest.approx(units * 0.0869465 * elements / 131_072_000, rel=1e-5)


def test_no_prediction_for_other_peoples_code_or_an_impossible_tier():
    assert predicted_ms(job(provider="eager")) is None
    assert predicted_ms(job(weights="ref_ce", shape=(1, 8, 4, 256000), tier="token")) is None
    assert PREDICTED_CARD.bytes_a_second == 3.35e12
