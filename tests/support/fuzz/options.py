"""What may vary from call to call, a table. A later option of the library is one entry here.

A case is a dict of plain values, one for each option: printed, it can be run again.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from support.fuzz import layouts
from wmtp.backends import cpu_library
from wmtp.checks import EXCESSES

Case = dict[str, Any]
Values = Sequence[Any] | SearchStrategy
INF, NAN = float("inf"), float("nan")


def always(case: Case) -> bool:
    return True


class Option(NamedTuple):
    """One thing that may vary.

    Attributes:
        name: of a keyword argument too, where there is a `keyword`.
        plain: the value wherever it does not apply, and in tests that vary other things.
        values: what it may be, perhaps depending on what has been drawn above it.
        applies: whether the case drawn so far can have it.
        keyword: who takes it as a keyword argument: "both" the call and the truth, or the "call"
            alone; None: it is none, and the problem is made with it.
    """

    name: str
    plain: Any
    values: Values | Callable[[Case], Values]
    applies: Callable[[Case], bool] = always
    keyword: str | None = None

    def strategy(self, case: Case) -> SearchStrategy:
        values = self.values(case) if callable(self.values) else self.values
        return values if isinstance(values, SearchStrategy) else st.sampled_from(values)


def often(common: Sequence[Any], *rare: Any) -> list[Any]:
    """`common` about three times out of four."""
    return [*common] * max(3 * len(rare) // len(common), 1) + [*rare]


def weighted(case: Case) -> bool:
    return case["op"] in ("logits", "linear")


def linear(case: Case) -> bool:
    return case["op"] == "linear"


def takes_lists(case: Case) -> bool:
    return case["op"] == "logits"


def on(backend: str) -> Callable[[Case], bool]:
    return lambda case: case["backend"] == backend


def excess(case: Case) -> bool:
    return case["weighting"] in ("ref_ce", "ref_logits")


def given(case: Case) -> bool:
    return case["weighting"] in ("given", "learning")


def can_be_overwritten(case: Case) -> bool:
    layout = layouts.ROWS[case["layout"]]
    mine = layout.unit_stride and layout.own_rows and not case["leaf"] and case["form"] != "unbound"
    return mine and case["op"] == "logits" and case["differentiated"] == "all"


def nobody_has_a_target(case: Case) -> bool:
    return case["ignored"] == 1.0 or case["batch"] == 0 or case["length"] < 2


def slow(case: Case) -> bool:
    """In Triton's interpreter, where every row takes milliseconds."""
    return case["backend"] == "triton"


def lengths(case: Case) -> Values:
    return often((3, 2), 0, 1, 4) if slow(case) else often((5, 2, 9, 3), 0, 1)


def head_counts(case: Case) -> Values:
    if case["op"] == "next_token":
        return (1,)
    return often((3, 1, 2), 5) if slow(case) else (3, 1, 2, 4, 5, 8)


def dtypes(case: Case) -> Values:
    found = ("float32", "bfloat16", "float16", "float64")
    return found[:3] if case["backend"] == "triton" else found


@cache
def instruction_sets() -> tuple[str, ...]:
    """The best, then all that this machine has."""
    found = [""]
    for name in ("avx512_bf16", "avx512", "avx2", "baseline"):
        try:
            cpu_library.select_instruction_set(cpu_library.load(), name)
        except RuntimeError:
            continue
        found.append(name)
    cpu_library.select_instruction_set(cpu_library.load(), "")
    return tuple(found)


# Those of the operators; the two that are made of them are drawn in support/batches.py.
REDUCTIONS = ("token_mean", "weight_mean", "sum")
WHERE = ("entry", "target", "row", "others", "half", "no target")
SPECIALS = {
    "logits": (NAN, INF, -INF, 65504.0, -65504.0, 1e30, -1e30, 3.3e38),
    "hidden": (NAN, INF, 65504.0, -3000.0),
}


WEIGHTS = ("ones", "zero", "denormal", "huge")  # the rarer kinds


def specials(case: Case) -> Values:
    values = SPECIALS["hidden" if linear(case) else "logits"]
    where = st.sampled_from(WHERE)
    if linear(case) and case["backend"] == "eager":
        # torch's own product: 0 times NaN is NaN, so that states of weight 0 are seen in it.
        where = st.just("no target")
    one = st.tuples(where, st.sampled_from(values))
    return st.just(()) | st.just(()) | st.lists(one, max_size=3).map(tuple)


def row_layouts(case: Case) -> Values:
    shared = case["form"] == "tensor"
    return [name for name in layouts.ROWS if shared or not name.startswith("shared")]


def weightings(case: Case) -> Values:
    found = ("none", "given", "learning", "ref_ce", "ref_logits")
    if case["tier"] == "row" and case["heads"] > 1:  # it cannot know the other heads' ce
        return found[:3]
    return found[:4] if linear(case) else found


def normalizers(case: Case) -> Values:
    """Numbers, and 0-d tensors as (dtype, number); 0 means something where no pair counts."""
    tensors = [("float32", 12.0), ("float64", 3e4), ("int64", 5)]
    found = often((None,), 7.5, 1, 1e-3, *tensors)
    return [*found, ("float32", 0.0)] if nobody_has_a_target(case) else found


def objectives(case: Case) -> Values:
    """What is differentiated, one backward after the other."""
    if case["inplace"]:  # what else would need the logits again
        return (("loss",),)
    return (("loss", "both"), ("both",), ("loss",), ("loss", "loss"), ("both", "loss"))


OPTIONS = (
    # The call.
    Option("op", "logits", often(("logits", "linear"), "cross_entropy", "next_token")),
    Option("backend", "cpu", ("cpu", "cpu", "eager"), keyword="call"),
    Option("tier", "", ("", "online", "token", "row"), on("triton")),
    Option("instruction_set", "", lambda _: instruction_sets(), on("cpu")),
    Option("threads", 1, (1, 2), on("cpu")),
    # The numbers: B batch, S length, H heads, V vocab, D dim.
    Option("dtype", "float32", dtypes),
    Option("batch", 2, often((2, 1), 0)),
    Option("length", 5, lengths),
    Option("heads", 3, head_counts),
    Option("vocab", 37, often((37, 100, 129, 257), 1, 2, 3, 16, 1000)),
    Option("dim", 8, (8, 1, 2, 5, 17), linear),
    Option("seed", 0, st.integers(0, 2**32 - 1)),
    Option("scale", 3.0, often((3.0, 1.0), 0.0, 30.0, 1e3)),
    Option("matrix_scale", 1.0, often((1.0,), 0.0, 1e-4, 30.0, 3e3), linear),
    Option("offset", 0.0, often((0.0,), -20.0, 3e4, -1e8), lambda case: not linear(case)),
    Option("specials", (), specials),
    Option("bias", False, (False, True), linear),
    # How they lie in memory, and which are differentiated.
    Option("form", "tensor", ("tensor", "list", "unbound"), takes_lists),
    Option("layout", "dense", row_layouts),
    Option("leaf", True, lambda case: (True, layouts.ROWS[case["layout"]].leaf_only)),
    Option("matrix_layout", "dense", [*layouts.MATRICES], linear),
    Option("differentiated", "all", often(("all",), "none", "rows", "matrix", "bias")),
    Option("inplace", False, (False, True, True), can_be_overwritten, keyword="call"),
    Option("objectives", ("loss", "both"), objectives, weighted),
    Option("grad_loss", -0.7, often((1.0, -0.7), 0.0, 1e-3, 1024.0)),
    Option("grad_ce", 0.1, often((0.1,), 0.0, 30.0)),
    # The labels.
    Option("ids", "int64", ("int64", "int32", "int16", "strided")),
    Option("drawn_ids", "any", ("any", "first", "last", "ends")),
    Option("ignored", 0.2, often((0.2, 0.0), 0.7, 1.0)),
    Option("ignore_index", -100, (-100, -1, 0, "last", 12345), keyword="both"),
    # The weights.
    Option("weighting", "none", weightings, weighted),
    Option("weights", "uniform", often(("uniform", "some", "wide"), *WEIGHTS), given),
    Option("weights_dtype", "float32", ("float32", "bfloat16", "float64"), given),
    Option("weights_layout", "dense", [*layouts.WEIGHTS], given),
    Option("reference", None, often((None,), 0.0, 1e3, INF, NAN), excess),
    Option("reference_dtype", "float32", ("float32", "bfloat16", "float64"), excess),
    Option("temperature", 0.7, st.floats(-3, 3).map(lambda x: round(10**x, 6)), excess, "both"),
    Option("temperature_as", "number", ("number", "float32", "float64"), excess),
    Option("excess", "abs", EXCESSES, excess, "both"),
    # The sum.
    Option("reduction", "token_mean", REDUCTIONS, weighted, "both"),
    Option("normalizer", None, normalizers, weighted, "both"),
    Option("horizon", False, (False, True), weighted),
    # The linear op's memory.
    Option("chunk_bytes", None, (None, 1, 700, 3000), linear, "call"),
    Option("grad_accum_dtype", None, (None, "own", "float32"), linear),
)


def make_case(**chosen: Any) -> Case:
    """The plain case but for what is `chosen`."""
    case = {option.name: option.plain for option in OPTIONS}
    if unknown := chosen.keys() - case.keys():
        raise ValueError(f"no such options: {', '.join(sorted(unknown))}")
    return case | chosen


def changes(case: Case) -> Case:
    """What `make_case` wants to be told to make this case."""
    return {o.name: case[o.name] for o in OPTIONS if case[o.name] != o.plain}


@st.composite
def cases(draw: Any, **restricted: Sequence[Any]) -> Case:
    """Every option that applies, drawn, some of them from `restricted` values alone."""
    case = make_case()
    for option in OPTIONS:
        if option.name in restricted:
            case[option.name] = draw(st.sampled_from(restricted[option.name]))
        elif option.applies(case):
            case[option.name] = draw(option.strategy(case))
    return case
