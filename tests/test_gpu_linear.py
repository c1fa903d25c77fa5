"""The linear loss in the GPU suite, without a GPU: order, predictions, one job, the table."""

import pytest

from support.gpu_jobs import BOTH, CountingTimer
from wmtp.benchmarks import gpu, linear_providers
from wmtp.benchmarks.gpu_cases import Job
from wmtp.benchmarks.gpu_linear import (
    LATE,
    SIZES,
    compared_linear,
    linear_jobs,
    predicted_linear_ms,
    products_flops,
)
from wmtp.benchmarks.gpu_report import compared, markdown, predicted_records
from wmtp.benchmarks.gpu_timing import Times
from wmtp.benchmarks.gpu_worker import Bench, new_record
from wmtp.benchmarks.problem import Case

FROZEN = "frozen"


def case(provider="fused", direction=BOTH, shape=(1, 1024, 4, 128256), dim=4096, weights="uniform"):
    return Case("linear", shape, "bfloat16", direction, provider, weights, dim=dim)


def test_ours_the_products_and_eager_at_every_size_before_any_peer():
    jobs = linear_jobs()
    first = [job.case for job in jobs[: 7 * len(SIZES)]]
    assert [case.shape for case in first] == [shape for shape, _ in SIZES for _ in range(7)]
    assert {found.provider for found in first} == {"fused", "eager", *linear_providers.FLOORS}
    later = [job.case for job in jobs[7 * len(SIZES) :]]
    assert [(case.provider, case.shape) for case in later] == [
        (peer, shape) for peer in LATE for shape, _ in SIZES
    ]
    assert {"fused", "eager", *LATE} == set(linear_providers.PROVIDERS)
    assert (first[0].provider, first[0].dim) == ("fused", 4096)
    assert len(set(jobs)) == len(jobs)
    assert "liger" not in {job.case.provider for job in linear_jobs(absent=["liger"])}
    assert gpu.all_jobs()["linear"] == linear_jobs(linear_providers.absent(compiling=True))


def test_products_are_counted_over_the_rows_with_a_target():
    small = case(shape=(2, 5, 2, 10), dim=3)  # 2 x (4 + 3) rows
    assert products_flops(small) == 3 * 2 * 14 * 3 * 10
    assert products_flops(small._replace(direction=FROZEN)) == 2 * 2 * 14 * 3 * 10


def test_predictions_by_hand():
    rows, vocabulary, dim = 4096 - 10, 32000, 4096
    sizes = {"shape": (1, 1024, 4, vocabulary), "dim": dim}
    product = 2 * rows * vocabulary * dim / 989e12
    assert predicted_linear_ms(case("three_products", **sizes)) == pytest.approx(3e3 * product)
    assert predicted_linear_ms(case("two_products", FROZEN, **sizes)) == pytest.approx(
        2e3 * product
    )
    bandwidth = 0.9 * 3.35e12
    kernel = 2 * rows * vocabulary * 2 / bandwidth  # one read and one write
    assert predicted_linear_ms(case(direction=FROZEN, **sizes)) == pytest.approx(
        1e3 * (2 * product + kernel)
    )
    # Two chunks, whose sum becomes bfloat16 at last.
    finish = vocabulary * dim * (4 + 2) / bandwidth
    assert predicted_linear_ms(case(**sizes)) == pytest.approx(
        1e3 * (3 * product + kernel + finish)
    )
    assert predicted_linear_ms(case("eager", **sizes)) is None


def test_small_chunks_wait_for_the_sum():
    """512 MiB are 1044 rows at V = 256000: a chunk's sum takes longer than its operations."""
    wide = case(shape=(1, 2048, 4, 256000), dim=2304)
    floor = predicted_linear_ms(case("three_products", shape=wide.shape, dim=wide.dim))
    kernel = 1e3 * 2 * (8192 - 10) * 256000 * 2 / (0.9 * 3.35e12)
    assert predicted_linear_ms(wide) > floor + kernel + 1.0


def timed(milliseconds, peak=0, **fields):
    times = Times(10, milliseconds, 0.9 * milliseconds, 1.1 * milliseconds, 0.05)
    return {**new_record(Job(case(**fields)), "ok"), **times._asdict(), "peak_bytes": peak}


def test_times_stand_beside_the_products():
    gradients = 2 * 4096 * (4096 + 128256)
    records = compared_linear(
        [
            timed(20.0, gradients + 3 * 2**20),
            timed(16.0, provider="three_products"),
            timed(15.0, direction=FROZEN, weights="given"),
            timed(12.0, direction=FROZEN, provider="two_products"),
            new_record(Job(case("liger")), "refused", "no"),
        ]
    )
    ours, three, frozen, two, refused = records
    assert (ours["of_products"], three["of_products"], frozen["of_products"]) == (0.8, 1.0, 0.8)
    assert ours["mib"] == 3.0
    assert ours["tflops"] == round(products_flops(case()) / 20e-3 / 1e12, 1)
    assert two["predicted_ms"] == predicted_linear_ms(case("two_products", FROZEN))
    assert refused["predicted_ms"] is None
    page = {"command": "c", "environment": {}, "absent": {}, "steps": [], "cases": records}
    text = markdown(page)
    row = "| 1x1024x4x128256 x 4096 | bfloat16 | fused | uniform | 20.000 | 18.000-22.000 | "
    predicted = f"{predicted_linear_ms(case()):.3f} *predicted*"
    assert row + f"{ours['tflops']:.0f} | 80 % | 3.0 | {predicted} |" in text
    assert "refused (no)" in text.split("## Without a time")[1]


def test_both_kinds_of_records_go_on_one_page():
    jobs = [Job(Case("speed", (1, 8, 2, 50), "bfloat16", BOTH, "fused")), Job(case())]
    records = predicted_records(jobs)
    assert [record["tier"] for record in records][1] == ""
    again = compared([{**record, "why": ""} for record in records])
    assert [record["predicted_ms"] for record in again] == [
        record["predicted_ms"] for record in records
    ]
    text = markdown({"command": "c", "environment": {}, "absent": {}, "steps": [], "cases": again})
    assert "## linear, forward+backward" in text
    assert "## speed, forward+backward" in text


SMALL = {"shape": (1, 8, 2, 50), "dim": 16}


@pytest.mark.parametrize(
    ("provider", "direction"),
    [("fused", BOTH), ("fused", FROZEN), ("eager", BOTH), ("three_products", BOTH)],
)
def test_a_job_is_compared_counted_and_timed(provider, direction):
    bench = Bench(CountingTimer(), "cpu")
    for weights in ("uniform", "ref_ce"):
        record = bench.record(Job(case(provider, direction, weights=weights, **SMALL)))
        assert (record["outcome"], record["median_ms"]) == ("ok", 2.0), record["why"]
        assert (record["tier"], record["dim"]) == ("", 16)
        assert record["peak_bytes"] > 0


def test_a_wrong_result_of_ours_fails_and_a_peers_is_refused(monkeypatch):
    def wrong(hidden, weight, *rest):
        return (hidden.sum() + weight.sum()).square()

    for provider, outcome in (("fused", "failed"), ("liger", "refused")):
        monkeypatch.setitem(linear_providers.PROVIDERS, provider, wrong)
        record = Bench(CountingTimer(), "cpu").record(Job(case(provider, **SMALL)))
        assert record["outcome"] == outcome
        assert record["why"].startswith(f"AssertionError: {provider} disagrees with eager torch")
