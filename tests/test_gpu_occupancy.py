"""The GPU suite's first minute: one or two CTAs an SM, or reading twice, forced and compared."""

import pytest
import torch

from support.gpu_jobs import BOTH, CountingTimer
from wmtp import fused_weighted_mtp_loss
from wmtp.benchmarks import gpu_occupancy, problem
from wmtp.benchmarks.gpu_cases import Job, predicted_ms
from wmtp.benchmarks.gpu_occupancy import forced_launch, occupancy_jobs, tokens_that_fit
from wmtp.benchmarks.gpu_worker import Bench
from wmtp.benchmarks.problem import Case

pytest.importorskip("triton")

from wmtp.kernels import launch, tiers

SMALL = (1, 2, 2, 17000)


def occupancy_job(tier="row", ctas_per_sm=0, shape=SMALL, provider="fused"):
    return Job(Case("occupancy", shape, "bfloat16", BOTH, provider), tier, ctas_per_sm)


def test_all_are_asked_of_each_vocabulary_on_the_same_logits():
    jobs = occupancy_jobs(80e9)
    assert [job.case.shape for job in jobs] == [
        (1, 4096, 4, vocabulary) for vocabulary in (32000, 50257, 128256, 152064) for _ in range(4)
    ]
    kinds = [(job.case.provider, job.tier, job.ctas_per_sm) for job in jobs[:4]]
    assert kinds == [
        ("fused", "online", 0),
        ("fused", "row", 1),
        ("fused", "row", 2),
        ("copy", "", 0),
    ]
    assert {job.case.dtype for job in jobs} == {"bfloat16"}
    assert all(predicted_ms(job) for job in jobs)
    assert predicted_ms(jobs[0]) == pytest.approx(1.5 * predicted_ms(jobs[1]))


def test_short_memory_takes_fewer_tokens():
    assert [tokens_that_fit(152064, memory) for memory in (80e9, 40e9, 20e9)] == [4096, 2048, 1024]
    assert {job.case.shape[1] for job in occupancy_jobs(20e9)} == {4096, 1024}


# By hand: 64 logits a thread; two CTAs of 256 threads x 128 registers, or one of 512, are an SM's
# 65536 registers. Without clusters one CTA holds all, and shares the registers that there are.
@pytest.mark.parametrize(
    ("vocabulary", "ctas_per_sm", "clusters", "warps", "num_ctas", "registers"),
    [
        (32000, 1, True, 16, 1, 128),
        (32000, 2, True, 8, 2, 128),
        (152064, 1, True, 16, 8, 128),
        (152064, 2, True, 8, 16, 128),
        (32000, 1, False, 16, 1, 128),
        (32000, 2, False, 16, 1, 64),
        (50257, 1, False, 32, 1, 64),
        (50257, 2, False, None, None, None),
        (128256, 1, False, None, None, None),
    ],
)
def test_launches_by_hand(vocabulary, ctas_per_sm, clusters, warps, num_ctas, registers):
    machine = tiers.Machine(32, 16 if clusters else 1, 132)
    if warps is None:
        with pytest.raises(ValueError, match=f"{vocabulary} logits need a cluster"):
            gpu_occupancy.launch(vocabulary, ctas_per_sm, machine)
        return
    found = gpu_occupancy.launch(vocabulary, ctas_per_sm, machine)
    assert found[2:] == (warps, num_ctas, registers)
    assert (found.tier, found.block) == ("row", max(1 << (vocabulary - 1).bit_length(), 128))


@pytest.fixture
def launched(monkeypatch):
    """What the library launches, in the interpreter."""
    found = []
    whole = launch.launch_as
    monkeypatch.setattr(
        launch, "launch_as", lambda as_, case: found.append(as_) or whole(as_, case)
    )
    monkeypatch.setattr(problem, "PROVIDERS", {**problem.PROVIDERS, "fused": triton_loss})
    return found


def triton_loss(logits, target_ids, head_weights, _ref_ce):
    loss, *_ = fused_weighted_mtp_loss(logits, target_ids, head_weights, backend="triton")
    return loss


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not in its interpreter")
def test_the_library_is_launched_as_forced_and_no_longer(launched):
    bench = Bench(CountingTimer(), "cpu")
    records = [bench.record(occupancy_job("row", ctas)) for ctas in (1, 2)]
    assert [record["outcome"] for record in records] == ["ok", "ok"], records
    wanted = [
        gpu_occupancy.launch(17000, ctas, tiers.machine(torch.device("cpu"))) for ctas in (1, 2)
    ]
    assert list(dict.fromkeys(launched)) == wanted
    assert [record["ctas_per_sm"] for record in records] == [1, 2]
    launched.clear()
    with forced_launch(occupancy_job("row"), "cpu"):
        bench.record(occupancy_job("online"))
    assert {as_.tier for as_ in launched} == {"online"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not in its interpreter")
def test_tiers_that_agree_with_eager_but_not_with_each_other_are_found(monkeypatch):
    """As at a size that eager torch is not asked for: only the timed one is spoilt."""
    spoilt = {"online": 1.0, "row": 1.1}
    checked = Bench._check
    tier = []

    def loss(logits, *arguments):
        found = problem_eager(logits, *arguments)
        return found * (1.0 if checking else spoilt[tier[-1]])

    checking = []

    def check(self, job):
        tier.append(job.tier)
        checking.append(True)
        checked(self, job)
        checking.clear()

    problem_eager = problem.PROVIDERS["eager"]
    monkeypatch.setattr(problem, "PROVIDERS", {**problem.PROVIDERS, "fused": loss})
    monkeypatch.setattr(Bench, "_check", check)
    bench = Bench(CountingTimer(), "cpu")
    online, row = (bench.record(occupancy_job(one)) for one in ("online", "row"))
    assert (online["outcome"], row["outcome"]) == ("ok", "failed")
    assert row["why"].startswith("AssertionError: fused disagrees with the first tier")
