"""Numbers at the ends of the dtypes' ranges: the right value, or an infinity, never another one."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

from support.agreement import GRADIENT_TOLERANCE, LOSS_TOLERANCE, largest
from support.covering import in_pairs
from support.instruction_sets import HERE
from wmtp import fused_linear_weighted_mtp_loss, fused_weighted_mtp_loss
from wmtp.checks import FLOAT_DTYPES, REDUCTIONS
from wmtp.reduction import accumulation_dtype
from wmtp.reference import compute_weighted_mtp_loss

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("eager", "cpu")
WEIGHTS = [1e-45, 1e-40, 1e-30, 1e-6, 1.0, 1e10, 1e30, 3e38]
truth = partial(compute_weighted_mtp_loss, horizon=3)


def random_weights(size, dtype):
    """Of about this size, but for two: of one that counts for nothing, and of an ordinary one."""
    weights = (torch.rand(2, 5, 3, dtype=torch.float64) + 0.1) * size / 1.1
    weights[0, 1, 0], weights[1, 1, 1] = 0.0, 0.5
    return weights.to(dtype)


def step(function, leaves, target_ids, weights=None, **options):
    """[loss, gradients of the leaves, and of the weights], the ce."""
    leaves = [leaf.detach().requires_grad_() for leaf in (*leaves, weights) if leaf is not None]
    weights = None if weights is None else leaves[-1]
    inputs = leaves if weights is None else leaves[:-1]
    result = function(*inputs, target_ids, weights, **options)
    return [result.loss.detach(), *grad(result.loss, leaves)], result.ce_per_head


def in_double(values):
    return [value if value is None else value.double() for value in values]


def assert_right_or_infinite(found, wanted, rtol, floor):
    """Nothing is off by more than rtol of the largest, but for what is beyond the dtype's range."""
    limit = torch.finfo(found.dtype).max
    found, error = found.double(), (found.double() - wanted).abs()
    right = (error <= rtol * largest(wanted) + floor) | (found == wanted)
    beyond = (wanted.abs() > 0.99 * limit) & ~(found.abs() < 0.9 * limit)
    assert (right | beyond).all()


def assert_in_range(found, wanted, dtype, acc):
    """The loss, the gradient of the logits, and the weights', which cancels like ce - loss."""
    tiny = torch.finfo(acc).tiny
    rtol = LOSS_TOLERANCE.get(dtype, 2e-5)
    assert_right_or_infinite(found[0], wanted[0], 10 * rtol, tiny)
    floor = 2**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    assert_right_or_infinite(found[1], wanted[1], 5 * GRADIENT_TOLERANCE[dtype], floor)
    assert_right_or_infinite(found[2], wanted[2], 100 * rtol, tiny)


@pytest.mark.usefixtures("instruction_set")
@in_pairs(instruction_set=HERE, dtype=FLOAT_DTYPES, reduction=REDUCTIONS)
def test_weights_and_logits_of_any_size_on_every_instruction_set(dtype, reduction):
    sizes_of_weights("cpu", dtype, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_weights_and_logits_of_any_size_in_eager(dtype, reduction):
    sizes_of_weights("eager", dtype, reduction)


def sizes_of_weights(backend, dtype, reduction):
    acc = accumulation_dtype(torch.empty(0, dtype=dtype))
    function = partial(fused_weighted_mtp_loss, backend=backend)
    target_ids = torch.randint(17, (2, 5))
    for size in (1.0, 100.0, min(torch.finfo(dtype).max / 4, 1e37)):
        logits = (torch.rand(2, 5, 3, 17, dtype=torch.float64) * size).to(dtype)
        for weight in WEIGHTS:
            weights = random_weights(weight, acc)
            # As for gradient accumulation: the sum of the weights, which may be out of range.
            total = max(weights.double().sum().item(), 1e-3)
            if reduction == "head_mean":  # the inverse of which is a number of its own
                total = min(total, 1e37)
            for normalizer in (None, total):
                how = {"reduction": reduction, "normalizer": normalizer}
                found, _ = step(function, [logits], target_ids, weights, **how)
                exact = in_double((logits, weights))
                wanted, _ = step(truth, exact[:1], target_ids, exact[1], **how)
                assert_in_range(found, wanted, dtype, acc)


@in_pairs(
    op=["logits", "linear"],
    backend=BACKENDS,
    weight=WEIGHTS,
    reduction=["token_mean", "weight_mean"],
    where=lambda op, backend, weight, reduction: (
        weight > 1e-8 or reduction == "weight_mean"  # a token whose weights are less has none
    ),
)
def test_only_the_ratios_of_weights_matter_to_a_mean(op, backend, weight, reduction):
    """Equal ones, of any size that float32 has: their sum may be infinite, or next to 0."""
    target_ids = torch.randint(17, (2, 5))
    leaves = {
        "logits": [torch.randn(2, 5, 3, 17)],
        "linear": [torch.randn(2, 5, 3, 4), torch.randn(17, 4)],
    }[op]
    function = {"logits": fused_weighted_mtp_loss, "linear": fused_linear_weighted_mtp_loss}[op]
    weights = torch.full((2, 5, 3), weight)
    how = {"reduction": reduction, "backend": backend}
    found, wanted = (
        step(function, leaves, target_ids, given, **how)[0][: 1 + len(leaves)]
        for given in (weights, torch.ones(2, 5, 3))
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("instruction_set")
@in_pairs(
    instruction_set=HERE,
    dtype=[torch.float32, torch.bfloat16],
    weight=[1e-30, 1e-20, 1e-15, 1e20, 1e38],
    climb=[0.0, 39.0, 80.0],
)
def test_gradients_of_any_size_have_all_their_digits(dtype, weight, climb):
    """Where the maximum is met late, exponentials as large as e^40 meet a factor of e^-40."""
    logits = torch.randn(1, 2, 1, 9001)
    logits[..., 4500] = climb
    logits = logits.to(dtype)
    weights, target_ids = torch.full((1, 2, 1), weight), torch.tensor([[0, 5]])
    function = partial(fused_weighted_mtp_loss, backend="cpu")
    found, _ = step(function, [logits], target_ids, weights, reduction="sum")
    exact = in_double((logits, weights))
    wanted, _ = step(
        partial(compute_weighted_mtp_loss, horizon=1), exact[:1], target_ids, exact[1],
        reduction="sum",
    )  # fmt: skip
    gradient, true = found[1].double(), wanted[1]
    seen = true.abs() > 1e-36
    error = ((gradient - true).abs() / true.abs())[seen]
    assert error.max() < (3e-5 if dtype == torch.float32 else 5e-3)
    assert seen[0, 0].any()


@in_pairs(
    op=["logits", "linear"],
    backend=BACKENDS,
    excess=["abs", "signed"],
    size=[1.0, 1e4, 1e30, 1e37],
    temperature=[1e-3, 0.7, 1e3],
)
def test_excesses_of_any_size_over_any_temperature(op, backend, excess, size, temperature):
    logits, target_ids = torch.rand(2, 5, 3, 17) * size, torch.randint(17, (2, 5))
    how = {"excess": excess, "temperature": temperature, "ref_ce": torch.rand(2, 4) * size}
    leaves, function = [logits], partial(fused_weighted_mtp_loss, backend=backend)
    if op == "linear":
        leaves, function = [logits, torch.eye(17)], fused_linear_weighted_mtp_loss
        function = partial(function, backend=backend, chunk_bytes=1)
    found, _ = step(function, leaves, target_ids, **how)
    how["ref_ce"] = how["ref_ce"].double()
    wanted, _ = step(truth, [logits.double()], target_ids, **how)
    # The excess itself is rounded, and seen through 1 / temperature.
    rtol = 1e-5 + (1e-6 if size > 1e4 else 1e-6 * size) / temperature
    assert_right_or_infinite(found[0], wanted[0], min(rtol, 0.5), 0.0)
    assert_right_or_infinite(found[1], wanted[1], min(rtol, 0.5), 0.0)


@in_pairs(
    backend=BACKENDS,
    op=["logits", "linear"],
    reduction=REDUCTIONS,
    reference=[math.inf, -math.inf, math.nan],
    excess=["abs", "signed"],
)
def test_references_that_are_not_finite(backend, op, reduction, reference, excess):
    """A signed excess of -inf is a weight of 0; all else is NaN, in its tokens' gradients alone."""
    logits, target_ids = torch.randn(1, 6, 2, 9), torch.tensor([[1, 2, 3, 4, 5, -100]])
    ref_ce = torch.rand(1, 5)
    ref_ce[0, 1], ref_ce[0, 4] = reference, math.nan  # the second is about no target: not read
    how = {"ref_ce": ref_ce, "excess": excess, "reduction": reduction, "backend": backend}
    leaves, function = [logits], fused_weighted_mtp_loss
    if op == "linear":
        leaves, function = [logits, torch.eye(9)], fused_linear_weighted_mtp_loss
    (loss, gradient, *_), _ = step(function, leaves, target_ids, **how)
    spoiled = torch.zeros(1, 6, dtype=torch.bool)
    spoiled[0, 0:2] = True  # the heads that are asked for token 2
    if excess == "signed" and reference == math.inf:
        assert loss.isfinite()
        assert (gradient[0, 0, 1] == 0).all()
        assert (gradient[0, 1, 0] == 0).all()
        assert (gradient[0, 0, 0] != 0).all()
    else:
        assert loss.isnan()
        valid = torch.tensor([[[1, 1], [1, 1], [1, 1], [1, 0], [0, 0], [0, 0]]]).bool()
        assert torch.equal(gradient.isnan().any(-1), spoiled[..., None] & valid)
        assert gradient[~spoiled].isfinite().all()


@in_pairs(
    accum_dtype=[torch.float16, None],
    size=[1.0, 300.0, 3000.0, 60000.0],
    weighting=["uniform", "ref_ce"],
)
def test_float16_sums_of_large_numbers(accum_dtype, size, weighting):
    """g @ weight sums up to twice the largest weight, and g.T @ hidden as much as there are rows:
    in float16's range, as in eager torch."""
    weight = ((torch.rand(61, 16) * 2 - 1) * size).half()
    hidden = (torch.randn(2, 200, 3, 16) / size).half()
    hidden[..., 0] = 20.0
    weight[:, 0] = 0.0
    target_ids = torch.full((2, 200), 5)
    target_ids[torch.rand(2, 200) < 0.5] = 7
    how = {"ref_ce": torch.rand(2, 199)} if weighting == "ref_ce" else {}

    def plain(hidden, weight, *rest, **more):
        return truth(F.linear(hidden, weight), *rest, **more)

    ours = partial(
        fused_linear_weighted_mtp_loss,
        backend="cpu",
        chunk_bytes=30_000,
        grad_accum_dtype=accum_dtype,
    )
    found, _ = step(ours, [hidden, weight], target_ids, **how)
    eager, _ = step(plain, [hidden, weight], target_ids, **how)
    exact = {name: value.double() for name, value in how.items()}
    wanted, _ = step(plain, in_double((hidden, weight)), target_ids, **exact)
    for ours_, theirs, true in zip(found[1:], eager[1:], wanted[1:], strict=True):
        error = largest(ours_.double() - true)
        assert error <= 1.2 * largest(theirs.double() - true) + 3e-3 * largest(true) + 2**-24
