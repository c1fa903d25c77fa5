"""What a call answers to a problem, and what the truth does: the eager reference in float64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.fuzz import layouts
from support.fuzz.options import OPTIONS
from support.fuzz.problem import Problem, as_dtype
from wmtp import (
    fused_linear_weighted_mtp_loss,
    fused_weighted_mtp_loss,
    mtp_cross_entropy,
    next_token_cross_entropy,
)
from wmtp.backends import cpu_library
from wmtp.reference import compute_weighted_mtp_loss

Answer = dict[str, Tensor]  # "loss", "valid_mask", "ce"; gradients by `gradient_name`
OPS: dict[str, Callable[..., Any]] = {
    "logits": fused_weighted_mtp_loss,
    "linear": fused_linear_weighted_mtp_loss,
    "cross_entropy": mtp_cross_entropy,
    "next_token": next_token_cross_entropy,
}
# Where the tensors lie: a table of layouts, and the option that names one.
TABLES = {
    "rows": (layouts.ROWS, "layout"),
    "matrix": (layouts.MATRICES, "matrix_layout"),
    "head_weights": (layouts.WEIGHTS, "weights_layout"),
}


def arrange(problem: Problem, name: str, dense: Tensor) -> Tensor | list[Tensor]:
    """The tensor of that name as the call gets it; differentiable in the dense one."""
    case = problem.case
    if name not in TABLES:
        return dense
    table, option = TABLES[name]
    lay = table[case[option]].arrange
    if name == "rows" and case["op"] == "next_token":
        return lay(dense)[:, :, 0]
    if name == "rows" and case["form"] == "list":
        return [
            lay(head)[:, :, 0] for head in (dense[:, :, k : k + 1] for k in range(dense.shape[2]))
        ]
    if name == "rows" and case["form"] == "unbound":
        return list(lay(dense).unbind(2))
    return lay(dense)


def pieces(given: Tensor | list[Tensor]) -> list[Tensor]:
    return given if isinstance(given, list) else [given]


class Tensors(NamedTuple):
    """Of one call.

    Attributes:
        given: to it, a tensor or a list of heads.
        leaves: what is differentiated, what is given itself or a dense tensor it is a view of.
    """

    given: dict[str, Any]
    leaves: dict[str, list[Tensor]]


def make_tensors(problem: Problem, dtype: torch.dtype | None = None) -> Tensors:
    """Anew, for a call may overwrite them; all of `dtype`, or each of its own."""
    found = Tensors({}, {})
    for name, number in problem.numbers.items():
        dense = number.to(dtype or number.dtype, copy=True)
        wanted = differentiated(problem, name)
        if problem.case["leaf"]:
            given = arrange(problem, name, dense)
            leaves = [piece.detach().requires_grad_(wanted) for piece in pieces(given)]
            given = leaves if isinstance(given, list) else leaves[0]
        else:
            leaves = [dense.requires_grad_(wanted)]
            given = arrange(problem, name, dense * 1)
        found.given[name] = given
        if wanted:
            found.leaves[name] = leaves
    return found


def differentiated(problem: Problem, name: str) -> bool:
    if name == "head_weights":
        return problem.case["weighting"] == "learning"
    return name in ("rows", "matrix", "bias") and problem.case["differentiated"] in ("all", name)


def keywords(problem: Problem, *whose: str) -> dict[str, Any]:
    case = problem.case
    found = {o.name: case[o.name] for o in OPTIONS if o.keyword in whose and o.applies(case)}
    found["ignore_index"] = problem.ignore_index
    if isinstance(divisor := found.get("normalizer"), tuple):
        found["normalizer"] = torch.tensor(divisor[1], dtype=as_dtype(divisor[0]))
    if case["temperature_as"] != "number":
        dtype = as_dtype(case["temperature_as"])
        found["temperature"] = torch.tensor(found["temperature"], dtype=dtype)
    return found


def objectives(problem: Problem) -> tuple[str, ...]:
    """What is differentiated, one backward after the other."""
    if problem.case["op"] == "next_token":
        return ()
    return ("ce",) if problem.case["op"] == "cross_entropy" else problem.case["objectives"]


def gradients(
    problem: Problem, outputs: Answer, leaves: dict[str, list[Tensor]], keep: bool = False
) -> Answer:
    """`keep`: the graph, after the last of them too."""
    found: Answer = {}
    named = {(name, i): leaf for name, some in leaves.items() for i, leaf in enumerate(some)}
    done = objectives(problem) if named else ()
    for turn, objective in enumerate(done):
        names = ("loss", "ce") if objective == "both" else (objective,)
        upstream = dict(zip(("loss", "ce"), problem.upstream, strict=True))
        of = [name for name in names if outputs[name].requires_grad]
        grads: Any = [None] * len(named)
        if of:
            grads = torch.autograd.grad(
                [outputs[name] for name in of],
                [*named.values()],
                [upstream[name].to(outputs[name].dtype) for name in of],
                retain_graph=keep or turn + 1 < len(done),
                allow_unused=True,
            )
        for (name, i), leaf, grad in zip(named, named.values(), grads, strict=True):
            grad = torch.zeros_like(leaf) if grad is None else grad.detach().clone()
            found[gradient_name(turn, objective, name, i)] = grad
    return found


def gradient_name(turn: int, objective: str, name: str, piece: int) -> str:
    return f"{turn}: d {objective} / d {name}[{piece}]"


def answer(problem: Problem, call: Callable[..., Any] | None = None) -> Answer:
    """What the op of the problem answers, or another `call` in its place."""
    case = problem.case
    function = call if call is not None else OPS[case["op"]]
    tensors = make_tensors(problem)
    given = dict(tensors.given)
    before = {name: [piece.clone() for piece in pieces(some)] for name, some in given.items()}
    positional = [given.pop("rows")]
    positional += [given.pop("matrix")] if "matrix" in given else []
    more = keywords(problem, "both", "call")
    if case["horizon"]:
        more["horizon"] = case["heads"]
    if "bias" in given:
        more["lm_head_bias"] = given.pop("bias")
    if case["grad_accum_dtype"]:
        own = case["grad_accum_dtype"] == "own" or case["dtype"] == "float64"
        more["grad_accum_dtype"] = as_dtype(case["dtype"] if own else "float32")
    with surroundings(problem):
        result = function(*positional, problem.target_ids, **given, **more)
        outputs = {"ce": result}
        if isinstance(result, tuple):
            outputs = dict(zip(("loss", "valid_mask", "ce"), result, strict=True))
        found = {name: output.detach().clone() for name, output in outputs.items()}
        found |= gradients(problem, outputs, tensors.leaves)
    for name, some in before.items():
        for was, now in zip(some, pieces(tensors.given[name]), strict=True):
            if not (case["inplace"] and name == "rows"):
                torch.testing.assert_close(now.detach(), was, rtol=0, atol=0, equal_nan=True)
    return found


@contextmanager
def surroundings(problem: Problem) -> Iterator[None]:
    """Which kernel runs, and on how many threads."""
    case, threads = problem.case, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WMTP_TRITON_TIER", case["tier"])
        torch.set_num_threads(case["threads"])
        if case["backend"] == "cpu":
            cpu_library.select_instruction_set(cpu_library.load(), case["instruction_set"])
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            if case["backend"] == "cpu":
                cpu_library.select_instruction_set(cpu_library.load(), "")


class Product(torch.autograd.Function):
    """hidden @ matrix.T, in whose gradients 0 times NaN or inf is 0: what does not count is not
    to be seen in them, and what counts has a gradient that is not 0."""

    @staticmethod
    def forward(ctx, hidden, matrix):
        ctx.save_for_backward(hidden, matrix)
        return F.linear(hidden, matrix)

    @staticmethod
    def backward(ctx, grad):
        hidden, matrix = ctx.saved_tensors
        counts = (grad != 0).any(-1, keepdim=True)
        rows = torch.where(counts, hidden, 0.0)
        return torch.where(counts, grad @ matrix, 0.0), grad.flatten(0, 2).T @ rows.flatten(0, 2)


class Truth(NamedTuple):
    """The answer, and on the way to it:"""

    answer: Answer
    tensors: Tensors
    logits: Tensor  # [B, S, H, V]
    slope: Tensor  # [B, S, H], dloss/dce


def truth(problem: Problem, dtype: torch.dtype | None = torch.float64) -> Truth:
    """By the eager reference; in the tensors' own dtypes for `dtype=None`."""
    case = problem.case
    tensors = make_tensors(problem, dtype)
    rows = tensors.given["rows"]
    if isinstance(rows, list):
        rows = torch.stack(rows, 2)
    elif case["op"] == "next_token":
        rows = rows[:, :, None]
    if case["op"] == "linear":
        logits = Product.apply(rows, tensors.given["matrix"])
        if "bias" in tensors.given:
            logits = logits + tensors.given["bias"]
    else:
        logits = rows
    options: dict[str, Any] = {
        name: tensors.given.get(name) for name in ("head_weights", "ref_ce", "ref_logits")
    }
    result = compute_weighted_mtp_loss(
        logits if logits.requires_grad else logits.detach().requires_grad_(),
        problem.target_ids,
        horizon=case["heads"],
        **(options | keywords(problem, "both")),
    )
    outputs = result._asdict()
    outputs["ce"] = outputs.pop("ce_per_head")
    (slope,) = torch.autograd.grad(
        result.loss, [outputs["ce"]], retain_graph=True, allow_unused=True
    )
    slope = torch.zeros_like(outputs["ce"]) if slope is None else slope
    found = {name: output.detach() for name, output in outputs.items()}
    found |= gradients(problem, outputs, tensors.leaves, keep=True)
    if case["op"] == "next_token":
        found = {"ce": found["ce"][:, : max(case["length"] - 1, 0), 0]}
    elif case["op"] == "cross_entropy":
        del found["loss"], found["valid_mask"]
    return Truth(found, tensors, logits.detach(), slope)
