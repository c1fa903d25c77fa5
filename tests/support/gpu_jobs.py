"""Jobs of the GPU suite, and how they run where there is no GPU."""

from wmtp.benchmarks.gpu_cases import Job
from wmtp.benchmarks.gpu_timing import Times
from wmtp.benchmarks.gpu_worker import Bench
from wmtp.benchmarks.problem import Case

MAIN = (1, 1024, 4, 32000)
SMALL = (1, 8, 2, 50)
BOTH = "forward+backward"


def job(provider="fused", direction=BOTH, shape=MAIN, dtype="bfloat16", weights="given", tier=""):
    return Job(Case("speed", shape, dtype, direction, provider, weights), tier)


class CountingTimer:
    """In place of one that needs events of a device."""

    def time(self, call, prepare):
        prepare()
        call()
        return Times(10, 2.0, 1.0, 3.0, 0.1)


def record_of(provider, direction=BOTH, **options):
    case = job(provider, direction, SMALL, "float32", **options)
    return Bench(CountingTimer(), "cpu").record(case)
