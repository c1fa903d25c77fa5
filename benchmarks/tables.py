"""The results as tables: one for each direction of the loss, one for each study of its scaling."""

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from wmtp.benchmarks import linear_providers
from wmtp.benchmarks.problem import Case
from wmtp.benchmarks.providers import DIRECTIONS, UNCOMPILED
from wmtp.benchmarks.report import (
    cases_by_key,
    floor_of,
    gigabytes_per_second,
    gradient_bytes,
    in_units_of,
    logits_bytes,
    peer_of,
    spread,
)

Cases = dict[Case, dict[str, Any]]
MEBI = 2**20
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


class Study(NamedTuple):
    """How a study's cases are compared."""

    title: str
    field: str  # what varies, if not the shape
    ratio: str
    peer: Callable[[Case], Case]
    speedup: bool  # the ratio is the peer's time over the case's, else the other way round


def _aligned(case: Case) -> Case:
    batch, length, heads, vocabulary = case.shape
    return case._replace(shape=(batch, length, heads, -(-vocabulary // 64) * 64))


def _eager(case: Case) -> Case:
    return peer_of(case, "eager")


def _one_thread(case: Case) -> Case:
    return case._replace(threads=1)


def _given(case: Case) -> Case:
    return case._replace(weighting="given")


def _uncompiled(case: Case) -> Case:
    return case._replace(provider=UNCOMPILED.get(case.provider, case.provider))


STUDIES = {
    "sweep": Study("from tiny to large", "", "eager /", _eager, True),
    "threads": Study("threads", "threads", "1 thread /", _one_thread, True),
    "weightings": Study("weightings", "weighting", "/ given", _given, False),
    "odd vocabulary": Study("odd vocabulary, per element", "", "/ 64n", _aligned, False),
    "few rows": Study("few rows", "threads", "1 thread /", _one_thread, True),
    "compiled": Study(
        "inside torch.compile(fullgraph=True)", "", "/ uncompiled", _uncompiled, False
    ),
}


def tables(results: dict[str, Any]) -> list[Table]:
    """Everything that was measured; where it was measured stands under the last."""
    cases = cases_by_key(results)
    found = [_loss_table(cases, direction) for direction in DIRECTIONS]
    found += [_study_table(cases, name) for name in STUDIES]
    found += [_linear_table(cases, direction) for direction in linear_providers.DIRECTIONS]
    found = [table for table in found if table.row_count]
    found[-1].caption = _caption(results)
    return found


def _caption(results: dict[str, Any]) -> str:
    known = {name: value for name, value in results["environment"].items() if value is not None}
    lines = [", ".join(f"{name} {value}" for name, value in known.items())]
    lines += [f"absent: {name}, {why}" for name, why in results["absent"].items()]
    return "\n".join(lines)


def _loss_table(cases: Cases, direction: str) -> Table:
    def cells(case: Case) -> tuple[str, ...]:
        median, _, _ = spread(cases[case]["median_ms"])
        return (
            _time(median),
            _ratio(cases, peer_of(case, "eager"), case),
            _ratio(cases, peer_of(case, "compiled"), case),
            _ratio(cases, case, peer_of(case, "copy")),
            f"{cases[case]['peak_bytes'] / logits_bytes(case):.3f}",
            f"{gigabytes_per_second(case, median):.1f}",
        )

    chosen = [case for case in cases if (case.study, case.direction) == ("loss", direction)]
    numbers = ("median", "eager /", "comp. /", "/ copy", "peak", "GB/s")
    return _table(f"loss, {direction}", (), numbers, chosen, cells)


def _study_table(cases: Cases, name: str) -> Table:
    study = STUDIES[name]

    def cells(case: Case) -> tuple[str, ...]:
        ends = (study.peer(case), case) if study.speedup else (case, study.peer(case))
        varied = (str(getattr(case, study.field)),) if study.field else ()
        median, _, _ = spread(cases[case]["median_ms"])
        return case.direction, *varied, _time(median), _ratio(cases, *ends)

    names = ("direction", *filter(None, [study.field]))
    chosen = [case for case in cases if case.study == name]
    return _table(study.title, names, ("median", study.ratio), chosen, cells)


def _linear_table(cases: Cases, direction: str) -> Table:
    def cells(case: Case) -> tuple[str, ...]:
        row = cases[case]
        median, _, _ = spread(row["median_ms"])
        ours = case._replace(provider="fused", weighting="uniform")
        return (
            case.weighting,
            _time(median),
            _ratio(cases, case, floor_of(case)),
            _ratio(cases, case, ours),
            f"{(row['peak_bytes'] - gradient_bytes(case)) / MEBI:.1f}",
        )

    floor = linear_providers.DIRECTIONS[direction].replace("_", " ")
    numbers = ("median", "/ products", "/ fused", "MiB")
    chosen = [case for case in cases if (case.study, case.direction) == ("linear", direction)]
    return _table(f"linear, {direction}: / {floor}", ("weights",), numbers, chosen, cells)


def _table(
    title: str,
    names: tuple[str, ...],
    numbers: tuple[str, ...],
    cases: list[Case],
    cells: Callable[[Case], tuple[str, ...]],
) -> Table:
    """The cases in sections, each headed by its logits; narrow enough for 80 columns."""
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("logits, provider", *names):
        table.add_column(name, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    for (shape, dim, dtype), section in groupby(cases, lambda c: (c.shape, c.dim, c.dtype)):
        hidden = f" D={dim}" if dim else ""
        table.add_row(f"{'x'.join(map(str, shape))} {SHORT.get(dtype, dtype)}{hidden}")
        for case in section:
            table.add_row(f"  {case.provider}", *cells(case))
        table.add_section()
    return table


def _ratio(cases: Cases, case: Case, peer: Case) -> str:
    """The first's time over the second's, with its spread below when there are several runs."""
    if case not in cases or peer not in cases:
        return ""
    values = in_units_of(cases[case], cases[peer])
    median, least, most = spread(values)
    text = f"{_number(median)}x"
    return text if len(values) == 1 else f"{text}\n{_number(least)}-{_number(most)}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _time(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds:.2f} ms" if milliseconds >= 1 else f"{1e3 * milliseconds:.1f} us"
