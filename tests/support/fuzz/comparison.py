"""An answer against the truth."""

import torch
from torch import Tensor

from support.fuzz.answers import Answer, Truth, answer, truth
from support.fuzz.bounds import Bounds
from support.fuzz.options import Case, make_case
from support.fuzz.problem import Problem

__all__ = ["check", "compare", "make_case"]


def check(case: Case) -> None:
    """That the library answers a case rightly."""
    problem = Problem(case)
    compare(problem, answer(problem), truth(problem))


def compare(problem: Problem, found: Answer, exact: Truth) -> None:
    """Raises AssertionError, which says where `found` is wrong."""
    bounds = Bounds(problem, exact).found()
    own: Answer = {}
    assert found.keys() == exact.answer.keys()
    for name, wanted in exact.answer.items():
        ours = found[name]
        assert ours.shape == wanted.shape, f"{name}: shape {ours.shape}, not {wanted.shape}"
        if wanted.dtype == torch.bool:
            assert torch.equal(ours, wanted), f"{name}: {ours} for {wanted}"
            continue
        right = agrees(ours, wanted, bounds[name])
        if not right.all():
            own = own or truth(problem, dtype=None).answer
            right |= out_of_range(ours, wanted, own[name])
        assert right.all(), _message(name, ours, wanted, bounds[name], right)


def agrees(ours: Tensor, wanted: Tensor, bound: Tensor) -> Tensor:
    """Entry by entry: near enough, or NaN or inf where the truth is or rounds to it."""
    limit = torch.finfo(ours.dtype).max
    reaches = (ours == torch.inf * wanted.sign()) & (wanted.abs() + bound >= limit)
    near = ours.isfinite() & ((ours.double() - wanted).abs() <= bound)
    return near | reaches | (ours == wanted) | (ours.isnan() & wanted.isnan())


def out_of_range(ours: Tensor, wanted: Tensor, own: Tensor) -> Tensor:
    """Where eager torch leaves the range of its numbers on the way there, so may we: not finite
    then, or without the NaN of a row whose weight is too small to be told from 0."""
    above = ~(ours.isfinite() | own.isfinite() | wanted.isnan())
    return above | (ours.isfinite() & own.isfinite() & wanted.isnan())


def _message(name: str, ours: Tensor, wanted: Tensor, bound: Tensor, right: Tensor) -> str:
    wrong = (~right).nonzero().tolist()
    first = tuple(wrong[0])
    return (
        f"{name}: {len(wrong)} of {ours.numel()} wrong, the first at {list(first)}: "
        f"{ours[first].item():.9g} for {wanted[first].item():.9g} +- {bound[first].item():.3g}"
    )
