"""The results as tables: one for each direction of the loss, one for each study of its scaling."""

from collections.abc import Callable, Iterator
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from wmtp.benchmarks.problem import Case
from wmtp.benchmarks.providers import DIRECTIONS, FLOORS, UNCOMPILED
from wmtp.benchmarks.report import cases_by_key, spread

SHORT = {"float32": "fp32", "bfloat16": "bf16"}
Cells = Callable[["Times", Case], tuple[str, ...]]


class Times:
    """What was measured, a case a row, and how one compares with another: within each run."""

    def __init__(self, results: dict[str, Any]):
        self.rows = cases_by_key(results)

    def median(self, case: Case) -> float:
        return spread(self.rows[case]["median_ms"])[0]

    def told(self, case: Case) -> str:
        """Its median."""
        milliseconds = self.median(case)
        if milliseconds >= 1000:
            return f"{milliseconds / 1000:.2f} s"
        return f"{milliseconds:.2f} ms" if milliseconds >= 1 else f"{1e3 * milliseconds:.1f} us"

    def ratio(self, case: Case, peer: Case) -> str:
        """The first's time per element over the second's; of several runs their spread below."""
        if case not in self.rows or peer not in self.rows:
            return ""
        pairs = zip(self.rows[case]["median_ms"], self.rows[peer]["median_ms"], strict=True)
        elements = prod(peer.shape) / prod(case.shape)
        values = [elements * mine / other for mine, other in pairs]
        median, least, most = map(_number, spread(values))
        return f"{median}x" if len(values) == 1 else f"{median}x\n{least}-{most}"


class Study(NamedTuple):
    """How a study's cases are compared."""

    title: str
    field: str  # what varies, if not the shape
    ratio: str
    peer: Callable[[Case], Case]
    speedup: bool  # the ratio is the peer's time over the case's, else the other way round

    def cells(self, times: Times, case: Case) -> tuple[str, ...]:
        ends = (self.peer(case), case) if self.speedup else (case, self.peer(case))
        varied = (str(getattr(case, self.field)),) if self.field else ()
        return case.direction, *varied, times.told(case), times.ratio(*ends)


def _peer(case: Case, provider: str) -> Case:
    """What the case is compared with; in place is an answer to forward + backward."""
    if case.direction == "inplace" and provider != "copy":
        case = case._replace(direction="forward+backward")
    return case._replace(provider=provider)


def _aligned(case: Case) -> Case:
    batch, length, heads, vocabulary = case.shape
    return case._replace(shape=(batch, length, heads, -(-vocabulary // 64) * 64))


def _one_thread(case: Case) -> Case:
    return case._replace(threads=1)


STUDIES = {
    "sweep": Study("from tiny to large", "", "eager /", lambda case: _peer(case, "eager"), True),
    "threads": Study("threads", "threads", "1 thread /", _one_thread, True),
    "weightings": Study(
        *("weightings", "weighting", "/ given"),
        lambda case: case._replace(weighting="given"),
        False,
    ),
    "rules": Study(
        *("rules, each in one pass", "weighting", "/ uniform"),
        lambda case: case._replace(weighting="uniform"),
        False,
    ),
    "odd vocabulary": Study("odd vocabulary, per element", "", "/ 64n", _aligned, False),
    "few rows": Study("few rows", "threads", "1 thread /", _one_thread, True),
    "compiled": Study(
        *("inside torch.compile(fullgraph=True)", "", "/ uncompiled"),
        lambda case: case._replace(provider=UNCOMPILED.get(case.provider, case.provider)),
        False,
    ),
    "options": Study(
        *("head numerics and metrics", "", "/ without"),
        lambda case: case._replace(provider="fused"),
        False,
    ),
}


def tables(results: dict[str, Any]) -> list[Table]:
    """Everything that was measured; where it was measured stands under the last."""
    found = [table for table in _tables(Times(results)) if table.row_count]
    known = {name: value for name, value in results["environment"].items() if value is not None}
    lines = [", ".join(f"{name} {value}" for name, value in known.items())]
    lines += [f"absent: {name}, {why}" for name, why in results["absent"].items()]
    found[-1].caption = "\n".join(lines)
    return found


def _tables(times: Times) -> Iterator[Table]:
    numbers: tuple[str, ...] = ("median", "eager /", "comp. /", "/ copy", "peak", "GB/s")
    for direction in DIRECTIONS:
        yield _table(times, f"loss, {direction}", ("loss", direction), (), numbers, _loss_cells)
    for name, study in STUDIES.items():
        names = ("direction", *filter(None, [study.field]))
        yield _table(times, study.title, (name,), names, ("median", study.ratio), study.cells)
    numbers = ("median", "/ products", "/ fused", "MiB")
    for direction, floor in FLOORS.items():
        title = f"linear, {direction}: / {floor.replace('_', ' ')}"
        yield _table(times, title, ("linear", direction), ("weights",), numbers, _linear_cells)


def _loss_cells(times: Times, case: Case) -> tuple[str, ...]:
    return (
        times.told(case),
        times.ratio(_peer(case, "eager"), case),
        times.ratio(_peer(case, "compiled"), case),
        times.ratio(case, _peer(case, "copy")),
        f"{times.rows[case]['peak_bytes'] / case.logits_bytes():.3f}",
        f"{case.gigabytes_per_second(times.median(case)):.1f}",
    )


def _linear_cells(times: Times, case: Case) -> tuple[str, ...]:
    return (
        case.weighting,
        times.told(case),
        times.ratio(case, case.floor()),
        times.ratio(case, case._replace(provider="fused", weighting="uniform")),
        f"{(times.rows[case]['peak_bytes'] - case.gradient_bytes()) / 2**20:.1f}",
    )


def _table(
    times: Times,
    title: str,
    chosen: tuple[str, ...],
    names: tuple[str, ...],
    numbers: tuple[str, ...],
    cells: Cells,
) -> Table:
    """The cases of a study (and direction) in sections, each headed by its logits; narrow enough
    for 80 columns."""
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("logits, provider", *names):
        table.add_column(name, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    mine = [case for case in times.rows if (case.study, case.direction)[: len(chosen)] == chosen]
    for (shape, dim, dtype), section in groupby(mine, lambda c: (c.shape, c.dim, c.dtype)):
        hidden = f" D={dim}" if dim else ""
        table.add_row(f"{'x'.join(map(str, shape))} {SHORT.get(dtype, dtype)}{hidden}")
        for case in section:
            table.add_row(f"  {case.provider}", *cells(times, case))
        table.add_section()
    return table


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"
