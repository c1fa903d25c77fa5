"""Generated cases of every operator and option: none is answered wrongly, a fault is seen.

WMTP_FUZZ_CASES: how many on the CPU (`make fuzz`: 2000), three twentieths as many interpreted.
WMTP_FUZZ_SEED: others.
"""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import seed as seeded

from support.covering import in_pairs
from support.fuzz.answers import OPS, answer, truth
from support.fuzz.comparison import check, compare
from support.fuzz.options import cases, changes, make_case
from support.fuzz.problem import Problem
from wmtp import kernels
from wmtp.checks import REDUCTIONS

CASES = int(os.environ.get("WMTP_FUZZ_CASES", "100"))
SEED = os.environ.get("WMTP_FUZZ_SEED")
pytestmark = pytest.mark.usefixtures("one_thread", "unwritten_is_nan")


def fuzz(count, shrink=True, **restricted):
    """A test of `count` cases: the same ones every time, unless there is a seed."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    def decorate(test):
        test = given(case=cases(**restricted))(test)
        test = seeded(int(SEED))(test) if SEED else test
        return settings(
            max_examples=count,
            derandomize=not SEED,
            database=None,
            deadline=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        )(test)

    return decorate


def assert_right(case):
    told = ", ".join(f"{name}={value!r}" for name, value in changes(case).items())
    note(f"from math import inf, nan; from fuzz.comparison import *; check(make_case({told}))")
    check(case)


@fuzz(CASES)
def test_no_case_is_wrong(case):
    assert_right(case)


@pytest.mark.skipif(not kernels.interpreted(), reason="a GPU was found: Triton is not interpreted")
@fuzz(CASES * 3 // 20, shrink=False, backend=["triton"])
def test_no_case_is_wrong_interpreted(case):
    assert_right(case)


# What was wrong once, and is seldom drawn.
PINNED = [
    {"ignored": 1.0, "normalizer": ("float32", 0.0)},
    {"weighting": "given", "weights": "denormal", "reduction": "weight_mean"},
    {"weighting": "given", "weights": "huge"},
    {"weighting": "given", "weights": "huge", "reduction": "weight_mean"},
    {"weighting": "given", "weights": "huge", "reduction": "sum", "normalizer": ("int64", 5)},
    {"length": 0, "form": "list", "leaf": False, "inplace": True, "objectives": ("loss",)},
    {"weighting": "ref_ce", "reference": math.inf, "reduction": "weight_mean"},
]


@pytest.mark.parametrize("options", PINNED, ids=str)
def test_what_was_wrong_once(options):
    check(make_case(**options))


@pytest.mark.skipif(not kernels.interpreted(), reason="a GPU was found: Triton is not interpreted")
@pytest.mark.parametrize("forced", ["token", "row", "online"])
@pytest.mark.parametrize("options", PINNED, ids=str)
def test_what_was_wrong_once_interpreted(options, forced):
    if forced == "row" and options.get("weighting") == "ref_ce":
        forced = ""  # that tier has known weights alone: as the library chooses
    check(make_case(**options, backend="triton", tier=forced))


# An operator with one thing wrong, in what it is given or in what it returns.


def a_pair(problem):
    """One that counts, of a token with others that do."""
    token = (problem.valid.sum(-1) > 1).nonzero()[0].tolist()
    return (*token, int(problem.valid[*token].nonzero()[0]))


def a_target_of_one_head(op, problem):
    """In head 0 the columns of its targets and of the ids after them change places."""
    vocab = problem.case["vocab"]
    ids = problem.targets[:, :, 0, None].clamp(min=0)

    def call(logits, *others, **more):
        order = torch.arange(vocab).expand(logits.shape).clone()
        order[:, :, 0].scatter_(-1, ids, (ids + 1) % vocab).scatter_(-1, (ids + 1) % vocab, ids)
        return op(logits.gather(-1, order), *others, **more)

    return call


def a_label(op, problem):
    def call(*tensors, **more):
        *before, ids = tensors
        ids = torch.where(ids == problem.target_ids[:, -1:], (ids + 1) % problem.case["vocab"], ids)
        return op(*before, ids, **more)

    return call


def an_ignored_label(op, problem):
    def call(*tensors, **more):
        *before, ids = tensors
        return op(*before, torch.where(ids == problem.ignore_index, 0, ids), **more)

    return call


def a_weight(op, problem):
    """By a hundredth, of one pair."""

    def call(*tensors, head_weights, **more):
        factor = torch.ones_like(head_weights)
        factor[a_pair(problem)] = 1.01
        return op(*tensors, head_weights=head_weights * factor, **more)

    return call


def the_denominator(op, problem):
    """By one token."""

    def call(*tensors, **more):
        result = op(*tensors, **more)
        tokens = result.valid_mask.sum()
        return result._replace(loss=result.loss * tokens / (tokens + 1))

    return call


def the_gradient_of_a_column(op, problem):
    def call(rows, *others, **more):
        first = torch.arange(rows.shape[-1]) == 0
        return op(torch.where(first, rows.detach(), rows), *others, **more)

    return call


def the_gradient_of_a_row(op, problem):
    def call(rows, *others, **more):
        row = torch.zeros_like(problem.valid)
        row[a_pair(problem)] = True
        return op(torch.where(row[..., None], rows.detach(), rows), *others, **more)

    return call


def the_gradient_of_ce(op, problem):
    def call(*tensors, **more):
        result = op(*tensors, **more)
        return result._replace(ce_per_head=result.ce_per_head.detach())

    return call


def the_gradient_of_the_weights(op, problem):
    """By a thousandth."""

    def call(*tensors, head_weights, **more):
        more_of_it = head_weights * 1.001
        head_weights = more_of_it - (more_of_it - head_weights).detach()
        return op(*tensors, head_weights=head_weights, **more)

    return call


def the_upstream_gradient(op, problem):
    """Taken for 1."""

    def call(*tensors, **more):
        result = op(*tensors, **more)
        value = result.loss.detach()
        loss = value + (result.loss - value) / problem.case["grad_loss"]
        return result._replace(loss=loss)

    return call


def the_temperature(op, problem):
    """By a hundredth."""

    def call(*tensors, temperature, **more):
        return op(*tensors, temperature=1.01 * temperature, **more)

    return call


FAULTS = {
    a_target_of_one_head: {"op": ["logits"]},
    a_label: {},
    an_ignored_label: {},
    a_weight: {"weighting": ["given", "learning"]},
    the_denominator: {},
    the_gradient_of_a_column: {},
    the_gradient_of_a_row: {},
    the_gradient_of_ce: {},
    the_gradient_of_the_weights: {"weighting": ["learning"]},
    the_upstream_gradient: {},
    the_temperature: {"weighting": ["ref_ce"]},
}


def can_be(fault, op, weighting, reduction):
    only = FAULTS[fault]
    return op in only.get("op", ["logits", "linear"]) and weighting in only.get(
        "weighting", ["none", "learning", "ref_ce"]
    )


@in_pairs(
    fault=FAULTS,
    op=["logits", "linear"],
    weighting=["none", "given", "learning", "ref_ce"],
    reduction=REDUCTIONS,
    where=can_be,
)
def test_a_fault_is_seen(fault, op, weighting, reduction):
    problem = Problem(make_case(op=op, weighting=weighting, reduction=reduction))
    exact = truth(problem)
    compare(problem, answer(problem), exact)
    with pytest.raises(AssertionError, match="wrong"):
        compare(problem, answer(problem, fault(OPS[op], problem)), exact)
