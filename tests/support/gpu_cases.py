"""Cases of the GPU suite, and how they run where there is no GPU."""

from wmtp.benchmarks.gpu_worker import Recorder, new_record
from wmtp.benchmarks.problem import Case
from wmtp.benchmarks.timing import Times

MAIN = (1, 1024, 4, 32000)
SMALL = (1, 8, 2, 50)
BOTH = "forward+backward"


def speed_case(
    provider="fused", direction=BOTH, shape=MAIN, dtype="bfloat16", weights="given", tier=""
):
    return Case("speed", shape, dtype, direction, provider, weights, tier=tier)


class CountingTimer:
    """In place of one that needs events of a device."""

    def time(self, call, prepare):
        prepare()
        call()
        return Times(10, 2.0, 1.0, 3.0, 0.1)


def record_of(provider, direction=BOTH, **options):
    case = speed_case(provider, direction, SMALL, "float32", **options)
    return Recorder(CountingTimer(), "cpu").record(case)


def timed(case, milliseconds, peak=0, **chosen):
    """A record that nothing measured."""
    times = Times(10, milliseconds, 0.9 * milliseconds, 1.1 * milliseconds, 0.05)
    return {**new_record(case, "ok"), **times._asdict(), "peak_bytes": peak, **chosen}
