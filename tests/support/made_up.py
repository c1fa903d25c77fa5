"""Results that nothing measured, and what a table says of them."""

from wmtp.benchmarks.problem import Case


def made_up(*cases):
    """Results of (study, shape, provider, direction, medians, other fields of the case)."""
    rows = [
        {
            **Case(study, shape, "float32", direction, provider, **others)._asdict(),
            "peak_bytes": 160,
            "rounds": [5] * len(medians),
            **{name: medians for name in ("median_ms", "q1_ms", "q3_ms")},
        }
        for study, shape, provider, direction, medians, others in cases
    ]
    return {"environment": {"cpu": "x", "gpu": None}, "absent": {"cce": "not here"}, "cases": rows}


def columns_of(table):
    return {column.header: list(column.cells)[1:] for column in table.columns}
