"""Threads of the C++ kernel: over tokens, over the columns of few tokens, side by side."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from support.agreement import (
    GRADIENT_TOLERANCE,
    assert_agrees,
    assert_identical,
    cpu_loss,
    largest,
    loss_and_gradients,
    make_case,
)
from support.covering import in_pairs
from support.instruction_sets import HERE
from wmtp import fused_weighted_mtp_loss
from wmtp.backends import cpu
from wmtp.checks import FLOAT_DTYPES
from wmtp.labels import has_target

missing = cpu.unavailable()
needs_kernel = pytest.mark.skipif(missing is not None, reason=f"no CPU kernel: {missing}")
every_instruction_set = pytest.mark.usefixtures("instruction_set", "unwritten_is_nan")
fused = partial(fused_weighted_mtp_loss, backend="cpu")

# Threads share the columns where tokens are few: one or three for two threads, four for three. And
# no more threads than 2^17 logits for each, or than there are blocks of 4096 columns.
FEW_TOKENS = [(1, 2, 1, 200_000), (1, 4, 2, 50_000), (1, 2, 32, 9001), (3, 2, 3, 50_257)]


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@every_instruction_set
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_number_of_threads_gives_the_same_numbers(dtype):
    case = make_case((2, 16, 2, 20000), dtype, ignored=0.3)
    one = loss_and_gradients(fused, case)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_identical(loss_and_gradients(fused, case), one)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("shape", FEW_TOKENS, ids=str)
def test_few_tokens_are_split_by_columns(shape):
    """Sums of parts round differently: were they the same bits each time, there were no parts."""
    for seed in range(8):
        case = make_case(shape, ignored=0, seed=seed)
        torch.set_num_threads(1)
        alone = cpu_loss(case.logits, case.target_ids, gradient="new").grad
        torch.set_num_threads(2)
        together = cpu_loss(case.logits, case.target_ids, gradient="new").grad
        if not torch.equal(alone, together):
            return
    pytest.fail("no seed tells two threads from one")


@every_instruction_set
@in_pairs(instruction_set=HERE, shape=FEW_TOKENS, weighting=["given", "ref_ce"], threads=[2, 5])
def test_teams_agree_with_the_truth_and_with_one_thread(shape, weighting, threads):
    case = make_case(shape, weighting=weighting, ignored=0)
    if weighting == "given":
        case.options["head_weights"] += 0.1  # no token without weight
    alone, gradients = loss_and_gradients(fused, case)
    torch.set_num_threads(threads)
    assert_agrees(fused, case)
    together, shared_gradients = loss_and_gradients(fused, case)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)
    error = GRADIENT_TOLERANCE[torch.float32] * largest(gradients)
    torch.testing.assert_close(shared_gradients, gradients, rtol=0, atol=error)


@every_instruction_set
@in_pairs(instruction_set=HERE, dtype=FLOAT_DTYPES, falling=[False, True])
def test_teams_on_rows_whose_parts_are_far_apart(dtype, falling):
    """Each thread has a shift of its own; all but one hold next to nothing of the sum."""
    torch.set_num_threads(3)
    case = make_case((1, 5, 2, 40_000), dtype, ignored=0)
    case.logits = case.logits.sort(-1, descending=falling).values * 10
    assert_agrees(fused, case)


@every_instruction_set
@in_pairs(instruction_set=HERE, dtype=FLOAT_DTYPES, excess=[False, True], shared=[False, True])
def test_teams_in_place(dtype, excess, shared):
    """A thread overwrites its columns only when all have read what they need of the row."""
    torch.set_num_threads(3)
    case = make_case((1, 5, 3, 30_000), dtype, ignored=0)
    logits = case.logits
    if shared:
        logits = logits[:, :, :1].contiguous().expand(-1, -1, 3, -1)
    acc = torch.promote_types(dtype, torch.float32)
    ref_ce = 16 * torch.rand(1, 4, dtype=acc) if excess else None
    new = cpu_loss(logits, case.target_ids, None, ref_ce, gradient="new")
    for _ in range(5):
        copy = logits[:, :, :1].clone().expand_as(logits) if shared else logits.clone()
        found = cpu_loss(copy, case.target_ids, None, ref_ce, gradient="inplace")
        assert all(map(torch.equal, found[:-1], new[:-1]))
        assert torch.equal(copy, new.grad.expand_as(copy))


@every_instruction_set
@in_pairs(
    instruction_set=HERE,
    poison=[math.nan, math.inf, -math.inf],
    column=[0, 40_000, 79_999],
)
def test_teams_with_a_special_value_in_one_part(poison, column):
    case = make_case((1, 4, 1, 80_000), ignored=0)
    case.target_ids.fill_(5)
    case.logits[0, 1, 0, column] = poison
    if poison == -math.inf:  # that thread's part and more
        case.logits[0, 1, 0, column // 40_000 * 40_000 :][:40_000] = poison
        case.target_ids.fill_(45_000 - column // 40_000 * 40_000)
    alone = cpu_loss(case.logits, case.target_ids, gradient="new")
    torch.set_num_threads(2)
    for gradient in ("new", "inplace"):
        together = cpu_loss(case.logits.clone(), case.target_ids, gradient=gradient)
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
    special = alone.grad[0, :, 0].isfinite().logical_not().any(-1).tolist()
    assert special == [False, poison != -math.inf, False, False]


@pytest.mark.usefixtures("instruction_set")
def test_teams_ignore_rows_without_a_target():
    torch.set_num_threads(2)
    case = make_case((1, 8, 2, 40_000), ignored=0)
    case.target_ids[0, 2:7] = -100  # leaves the first token and the last but one and two
    unread = ~has_target(case.target_ids, 2)
    assert unread[0].all(-1).tolist() == [False, True, True, True, True, False, False, True]
    case.logits[unread] = math.nan
    out = cpu_loss(case.logits, case.target_ids, gradient="new")
    assert out.loss.isfinite()
    assert torch.count_nonzero(out.grad[unread]) == 0
    assert (torch.count_nonzero(out.grad[~unread], -1) > 10_000).all()


@needs_kernel
@pytest.mark.usefixtures("restored_threads")
def test_two_python_threads_at_once():
    """The kernel runs without the interpreter's lock: each call has scratch and team of its own."""
    torch.set_num_threads(2)
    cases = [
        make_case((1, 4, 2, 40_000), weighting="ref_ce", ignored=0, seed=1),
        make_case((2, 40, 2, 3000), torch.bfloat16, "given", seed=2),
    ]
    expected = [loss_and_gradients(fused, case) for case in cases]

    def work(case, wanted):
        for _ in range(20):
            assert_identical(loss_and_gradients(fused, case), wanted)

    with ThreadPoolExecutor(2) as workers:
        list(workers.map(work, cases, expected))  # raises what either has raised
