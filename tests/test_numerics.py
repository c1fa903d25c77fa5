"""Scaled and capped logits, z-loss and smoothing, padded columns: every backend against the truth.

WMTP_NUMERICS_CASES: how many generated cases on the CPU (`make fuzz`: 500), three twentieths as
many interpreted.
"""

import math
import os
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from support import linear_cases
from support.agreement import correctly_rounded
from support.covering import in_pairs
from support.numerics_cases import (
    COLUMNS,
    FORMS,
    NUMERICS,
    WEIGHTINGS,
    answers,
    assert_agrees,
    assert_metrics_agree,
    labels,
    possible,
    truth,
)
from wmtp import (
    fused_linear_weighted_mtp_loss,
    fused_weighted_mtp_loss,
    linear_next_token_cross_entropy,
    mtp_cross_entropy,
    next_token_cross_entropy,
)
from wmtp.checks import REDUCTIONS
from wmtp.reference import compute_weighted_mtp_loss

CASES = int(os.environ.get("WMTP_NUMERICS_CASES", "60"))
LOW = [torch.float32, torch.bfloat16, torch.float16]
FLOATS = [torch.float64, *LOW]
BOTH = ("cpu", "eager")
NAN, INF = float("nan"), float("inf")
by_name = pytest.mark.parametrize("name", NUMERICS)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:token_mean divides"),
]

# Two columns, x = (log 3, 0), so that p = (3/4, 1/4); the target is the first.
LOG3, LOG4 = math.log(3), math.log(4)
CE = LOG4 - LOG3
BY_HAND = {  # logits, options, f, df/dx
    "none": ([LOG3, 0.0], {}, CE, [-0.25, 0.25]),
    "scale": ([LOG3 / 2, 0.0], {"logit_scale": 2.0}, CE, [-0.5, 0.5]),
    "softcap": (
        [2 * math.atanh(LOG3 / 2), 0.0],
        {"softcap": 2.0},
        CE,
        [-0.25 * (1 - LOG3**2 / 4), 0.25],
    ),
    # a sigmoid(-1000) is 0 and flat; at (x + b) / c = 0 it is a / 2, of slope a / 4c.
    "sigmoid": (
        [-0.5, -1000.0],
        {"sigmoid_cap": (2 * LOG3, 0.5, 3.0)},
        CE,
        [-0.25 * LOG3 / 6, 0.0],
    ),
    "z_loss": (
        [LOG3, 0.0],
        {"z_loss": 0.5},
        CE + 0.5 * LOG4**2,
        [-0.25 + 0.75 * LOG4, 0.25 + 0.25 * LOG4],
    ),
    "smoothing": (
        [LOG3, 0.0],
        {"label_smoothing": 0.2},
        0.8 * CE + 0.2 * (LOG4 - LOG3 / 2),
        [-0.15, 0.15],
    ),
    "vocab_size": ([LOG3, 0.0, 99.0], {"vocab_size": 2}, CE, [-0.25, 0.25, 0.0]),
    "scale and smoothing": (
        [LOG3 / 2, 0.0],
        {"logit_scale": 2.0, "label_smoothing": 0.2},
        0.8 * CE + 0.2 * (LOG4 - LOG3 / 2),
        [-0.3, 0.3],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(target, name):
    backend, device = target
    row, options, wanted, slope = BY_HAND[name]
    logits = torch.tensor(row, device=device).expand(1, 2, 1, -1).clone().requires_grad_()
    ids = torch.tensor([[1, 0]], device=device)
    result = fused_weighted_mtp_loss(logits, ids, **options, metrics=True, backend=backend)
    (gradient,) = torch.autograd.grad(result.loss, logits)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(result.loss.cpu(), torch.tensor(wanted))
    close(gradient[0, 0, 0].cpu(), torch.tensor(slope))
    close(result.ce_per_head[0, :, 0].cpu(), torch.tensor([CE, 0.0]))
    close(result.metrics.lse[0, :, 0].cpu(), torch.tensor([LOG4, 0.0]))
    close(result.metrics.entropy[0, :, 0].cpu(), torch.tensor([LOG4 - 0.75 * LOG3, 0.0]))
    assert result.metrics.correct.flatten().tolist() == [True, False]


@in_pairs(name=NUMERICS, backend=BOTH, padded=[False, True], reduction=["token_mean", "head_mean"])
def test_gradcheck(name, backend, padded, reduction):
    logits = (2 * torch.randn(1, 4, 2, 5, dtype=torch.float64)).requires_grad_()
    weights = (0.1 + torch.rand(1, 4, 2, dtype=torch.float64)).requires_grad_()
    ids = torch.randint(4, (1, 4))
    how = NUMERICS[name] | ({"vocab_size": 4} if padded else {}) | {"reduction": reduction}

    def both(logits, weights):
        result = fused_weighted_mtp_loss(logits, ids, weights, **how, backend=backend)
        return result.loss, result.ce_per_head

    def terms(logits):
        own = {key: value for key, value in how.items() if key != "reduction"}
        return mtp_cross_entropy(logits, ids, **own, backend=backend)

    assert torch.autograd.gradcheck(both, (logits, weights))
    assert torch.autograd.gradcheck(terms, (logits,))


@in_pairs(name=NUMERICS, backend=BOTH, padded=[False, True], bias=[False, True])
def test_gradcheck_of_the_linear_loss(name, backend, padded, bias):
    leaves, options = linear_cases.make_case(torch.float64, "uniform", bias, (1, 4, 2, 2, 5))
    options["target_ids"] = options["target_ids"].clamp(max=3)
    options |= NUMERICS[name] | ({"vocab_size": 4} if padded else {})
    weights = (0.1 + torch.rand(1, 4, 2, dtype=torch.float64)).requires_grad_()

    def both(weights, hidden, lm_head, lm_head_bias=None):
        result = fused_linear_weighted_mtp_loss(
            hidden, lm_head, head_weights=weights, lm_head_bias=lm_head_bias, chunk_bytes=300,
            backend=backend, **options,
        )  # fmt: skip
        return result.loss, result.ce_per_head

    inputs = (weights, *(leaf for leaf in leaves if leaf is not None))
    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("name", ["soft all", "sigmoid all"])
def test_second_derivatives_are_eagers(name):
    logits = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    loss = partial(fused_weighted_mtp_loss, target_ids=torch.randint(4, (1, 3)), **NUMERICS[name])
    assert torch.autograd.gradgradcheck(lambda x: loss(x, backend="eager").loss, (logits,))
    (gradient,) = torch.autograd.grad(loss(logits).loss, logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@in_pairs(
    lambda name, dtype, weighting, reduction, form, columns: possible(weighting, reduction),
    name=NUMERICS,
    dtype=FLOATS,
    weighting=WEIGHTINGS,
    reduction=REDUCTIONS,
    form=FORMS,
    columns=COLUMNS,
)
def test_agrees_with_the_truth(target, name, dtype, weighting, reduction, form, columns):
    if target[0] == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels take no float64")
    assert_agrees(target, dtype, NUMERICS[name], weighting, reduction, form, columns)


@pytest.mark.parametrize("name", ["soft all", "sigmoid all", "z_loss"])
def test_longer_rows(target, name):
    for columns in ((5000, 4097), (8191, None)):
        shape = (1, 4, 2)
        for form in ("one", "shared"):
            assert_agrees(
                target, torch.bfloat16, NUMERICS[name], "ref_ce", "pair_mean", form, columns,
                shape=shape,
            )  # fmt: skip


@in_pairs(
    name=NUMERICS,
    dtype=FLOATS,
    weighting=["uniform", "given", "ref_ce", "critic"],
    reduction=REDUCTIONS,
    bias=[False, True],
    padded=[False, True],
)
def test_the_linear_loss_agrees_with_the_truth(
    target, name, dtype, weighting, reduction, bias, padded
):
    backend, device = target
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels take no float64")
    leaves, options = linear_cases.make_case(dtype, weighting, bias, (1, 8, 2, 8, 61))
    options |= NUMERICS[name] | {"reduction": reduction}
    if padded:
        ids = options["target_ids"]
        options |= {"vocab_size": 50, "target_ids": ids.clamp(max=49)}
    leaves = [
        leaf if leaf is None else leaf.detach().to(device).requires_grad_() for leaf in leaves
    ]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    upstream = torch.randn(()).item(), torch.randn(1, 8, 2, device=device) / 9
    how = {"chunk_bytes": linear_cases.SOME // 3, "backend": backend}
    linear_cases.assert_agrees(leaves, options, **how)
    linear_cases.assert_agrees(leaves, options, upstream, **how)
    result = fused_linear_weighted_mtp_loss(
        leaves[0], leaves[1], lm_head_bias=leaves[2], **options, **how, metrics=True
    )
    if dtype in (torch.float64, torch.float32):  # in others the logits are rounded
        exact, of_exact = linear_cases.cast(leaves, options)
        hidden, weight, head = exact
        wanted = linear_cases.truth(hidden, weight, lm_head_bias=head, **of_exact, metrics=True)
        assert_metrics_agree(result.metrics, wanted.metrics, 1e-4, 1e-5)


@in_pairs(name=NUMERICS, std=[1.0, 60.0], padded=[False, True])
def test_a_gradient_is_rounded_once(target, name, std, padded):
    """Of bf16 entries at least 99 % are the exact gradient's, beyond the cap too."""
    backend, device = target
    logits = (std * torch.randn(1, 6, 2, 1003)).to(device, torch.bfloat16)
    ids = torch.randint(900, (1, 6), device=device)
    weights = torch.rand(1, 6, 2, device=device)
    how = NUMERICS[name] | ({"vocab_size": 950} if padded else {})

    def gradient(function, logits, **more):
        logits = logits.detach().requires_grad_()
        loss = function(logits, ids, head_weights=weights.double(), **how, **more).loss
        return torch.autograd.grad(loss, logits)[0]

    found = gradient(fused_weighted_mtp_loss, logits, backend=backend)
    exact = gradient(truth, logits.double())
    normal = exact.abs() >= torch.finfo(torch.float32).tiny  # in fp32 no digits are left below
    assert correctly_rounded(found[normal], exact[normal]) >= 0.99


@in_pairs(name=NUMERICS, poison=[NAN, INF, -INF], place=["target", "elsewhere", "all", "padding"])
def test_non_finite_logits_behave_as_in_eager(target, name, poison, place):
    backend, device = target
    logits, ids = 3 * torch.randn(1, 5, 2, 37), torch.randint(32, (1, 5))
    goal = int(ids[0, 4])
    column = {"target": goal, "elsewhere": (goal + 1) % 32, "all": slice(None)}.get(place, 34)
    logits[0, 2, 1, column] = poison
    how, upstream = NUMERICS[name] | {"vocab_size": 33}, (1.5, torch.randn(1, 5, 2).to(device) / 9)
    where = (logits.to(device), ids.to(device), how, upstream, "one", 2)
    result, gradients = answers(fused_weighted_mtp_loss, *where, backend=backend)
    eager, true_gradients = answers(compute_weighted_mtp_loss, *where, horizon=2)
    close = partial(torch.testing.assert_close, rtol=2e-5, atol=2e-6, equal_nan=True)
    close(result.loss, eager.loss)
    close(result.ce_per_head, eager.ce_per_head)
    # Of a row of -inf alone, whose loss is NaN, kernels have NaN for lse too.
    lse = eager.metrics.lse.masked_fill(eager.metrics.lse == -INF, NAN)
    assert_metrics_agree(result.metrics, eager.metrics._replace(lse=lse), 2e-5, 2e-5)
    for ours, theirs in zip(gradients, true_gradients, strict=True):
        finite = theirs.isfinite().all(-1)
        close(ours[finite], theirs[finite])
        assert torch.equal(ours.isfinite().all(-1), finite)


@by_name
@pytest.mark.parametrize("reduction", ["token_mean", "weight_mean", "sum"])
def test_a_weight_of_0_beside_nan(target, name, reduction):
    """What has no weight is not in the loss, whatever stands there."""
    backend, device = target
    logits, ids = torch.randn(1, 5, 2, 37, device=device), torch.randint(37, (1, 5), device=device)
    weights = torch.rand(1, 5, 2, device=device) + 0.1
    weights[0, 1, 0] = 0.0
    how = NUMERICS[name] | {"reduction": reduction}

    def call(logits):
        logits = logits.clone().requires_grad_()
        loss = fused_weighted_mtp_loss(logits, ids, weights, **how, backend=backend).loss
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    wanted = call(logits)
    logits[0, 1, 0, 3:20] = NAN
    found = call(logits)
    torch.testing.assert_close(found, wanted)
    assert not found[1][0, 1, 0].any()


@by_name
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_cross_entropies(target, name, dtype):
    """Of each pair, and a reference's of logits and of hidden states, which has no f."""
    backend, device = target
    numerics, vocab = NUMERICS[name], {"vocab_size": 50}
    logits = (3 * torch.randn(2, 6, 2, 61)).to(device, dtype).requires_grad_()
    ids, upstream = labels(2, 6, 50).to(device), torch.randn(2, 6, 2).to(device)
    ours = mtp_cross_entropy(logits, ids, **numerics, **vocab, backend=backend)
    exact = logits.detach().double().requires_grad_()
    theirs = mtp_cross_entropy(exact, ids, **numerics, **vocab, backend="eager")
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6)
    found = torch.autograd.grad((ours * upstream).sum(), logits)[0]
    wanted = torch.autograd.grad((theirs * upstream).sum(), exact)[0]
    assert correctly_rounded(found, wanted) >= 0.99 or dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)
    own = {key: value for key, value in numerics.items() if "loss" not in key and "smo" not in key}
    rows = logits.detach()[:, :, 0]
    ref_ce = next_token_cross_entropy(rows, ids, **own, **vocab, backend=backend)
    exact_ce = next_token_cross_entropy(rows.double(), ids, **own, **vocab, backend="eager")
    torch.testing.assert_close(ref_ce.double(), exact_ce, rtol=2e-5, atol=2e-6)
    hidden, weight = torch.randn(2, 6, 8).to(device, dtype), torch.randn(61, 8).to(device, dtype)
    linear = {"chunk_bytes": 3000, "backend": backend}
    found = linear_next_token_cross_entropy(hidden, weight, ids, **own, **vocab, **linear)
    product = F.linear(hidden, weight)
    wanted = next_token_cross_entropy(product, ids, **own, **vocab, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["logits", "linear"])
def test_off_is_the_same(target, op):
    """Bit by bit, in every answer."""
    backend, device = target
    logits, ids = torch.randn(2, 5, 3, 37, device=device), labels(2, 5, 37).to(device)
    weight = torch.randn(37, 37, device=device)
    ref_ce = torch.rand(2, 4, device=device)

    def call(**more):
        leaf = logits.clone().requires_grad_()
        tensors = (leaf, ids) if op == "logits" else (leaf, weight, ids)
        function = {"logits": fused_weighted_mtp_loss, "linear": fused_linear_weighted_mtp_loss}[op]
        result = function(*tensors, ref_ce=ref_ce, **more, backend=backend)
        gradient = torch.autograd.grad(result.loss + result.ce_per_head.square().sum(), leaf)
        return [*result, *gradient]

    off = {"logit_scale": 1.0, "softcap": None, "sigmoid_cap": None, "z_loss": 0.0}
    off |= {"label_smoothing": 0.0, "vocab_size": None, "metrics": False}
    others = (off, {"logit_scale": 1, "z_loss": 0}, {"vocab_size": 37}, {"metrics": True})
    for ours in others:
        for found, wanted in zip(call(**ours), call(), strict=True):
            assert torch.equal(found, wanted), ours


def drawn(number, triton):
    """The arguments of `assert_agrees`; the same of every number."""
    rng = random.Random(number)
    numerics = {}
    if rng.random() < 0.5:
        numerics["logit_scale"] = rng.choice([0.0625, 0.5, 1.0, 3.0, 16.0])
    cap = rng.choice(["none", "softcap", "sigmoid_cap"])
    if cap == "softcap":
        numerics[cap] = rng.choice([0.5, 5.0, 30.0, 1000.0])
    elif cap == "sigmoid_cap":
        numerics[cap] = (
            rng.choice([1.0, 30.0]),
            rng.choice([-2.0, 0.0, 5.0]),
            rng.choice([1, 7.5]),
        )
    if rng.random() < 0.5:
        numerics["z_loss"] = rng.choice([1e-4, 0.01, 1.0])
    if rng.random() < 0.5:
        numerics["label_smoothing"] = rng.choice([1e-3, 0.1, 0.9])
    weighting = rng.choice(WEIGHTINGS)
    columns = rng.choice([1, 2, 7, 63, 64, 65, 129, 500, 1031])
    return {
        "dtype": rng.choice(LOW if triton else FLOATS),
        "numerics": numerics,
        "weighting": weighting,
        "reduction": rng.choice([each for each in REDUCTIONS if possible(weighting, each)]),
        "form": rng.choice(FORMS),
        "columns": (columns, rng.choice([None, rng.randint(1, columns)])),
        "std": rng.choice([0.1, 1.0, 3.0, 10.0, 60.0]),
        "shape": rng.choice([(1, 1, 1), (1, 7, 1), (2, 5, 3), (3, 4, 4)]),
    }


def test_generated_cases(target):
    triton = target[0] == "triton"
    for number in range(CASES * 3 // 20 if triton else CASES):
        how = drawn(number, triton)
        torch.manual_seed(number)
        try:
            assert_agrees(target, **how)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise AssertionError(f"case {number}, {how}") from error
