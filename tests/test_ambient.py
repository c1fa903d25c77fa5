"""What is set around a call must not change it: autocast, default dtype and device, modes of torch.

Forward, backward or both run under each of them, and the answer is the one without.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from support.agreement import make_case
from support.backends import ON_CPU
from support.covering import in_pairs
from wmtp import fused_linear_weighted_mtp_loss, fused_weighted_mtp_loss, next_token_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")
B, S, H, D, V = 2, 9, 3, 16, 61


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AMBIENT = {
    "autocast to float16": partial(torch.autocast, "cpu", torch.float16),
    "autocast to bfloat16": partial(torch.autocast, "cpu", torch.bfloat16),
    "default float64": partial(default_dtype, torch.float64),
    "default bfloat16": partial(default_dtype, torch.bfloat16),
    "default device meta": partial(torch.device, "meta"),
    "deterministic": deterministic,
    "anomaly mode": torch.autograd.detect_anomaly,
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
}
WITHOUT_GRAD = ("no_grad", "inference mode")
AUTOCAST = [name for name in AMBIENT if name.startswith("autocast")]


def logits_op(case, weights, form):
    leaf = case.logits.clone().requires_grad_()
    rows = leaf * 1
    logits = {
        "tensor": lambda: rows,
        "list": lambda: [rows[:, :, k] for k in range(H)],
        "shared": lambda: rows[:, :, :1].expand(-1, -1, H, -1),
    }[form]()
    return [leaf, *weights], partial(fused_weighted_mtp_loss, logits, case.target_ids)


def linear_op(case, weights, form):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, S, H, D, generator=g).requires_grad_()
    lm_head = torch.randn(V, D, generator=g).requires_grad_()
    bias = torch.randn(V, generator=g).requires_grad_()
    more = {"lm_head_bias": bias, "chunk_bytes": 8000}
    op = partial(fused_linear_weighted_mtp_loss, hidden, lm_head, case.target_ids, **more)
    return [hidden, lm_head, bias, *weights], op


def answer(op, form, weighting, forward=nullcontext, backward=nullcontext, backend="cpu"):
    """Loss, mask, ce and every gradient."""
    case = make_case((B, S, H, V), torch.float32, weighting, reduction="weight_mean")
    weights = []
    if weighting == "given":
        weights = [case.options["head_weights"].requires_grad_()]
    leaves, call = op(case, weights, form)
    upstream = torch.tensor(-1.5)
    with forward():
        result = call(**case.options, backend=backend)
    if not result.loss.requires_grad:
        return result
    with backward():
        return (*result, *torch.autograd.grad(result.loss, leaves, upstream))


FORMS = [(logits_op, "tensor"), (logits_op, "list"), (logits_op, "shared"), (linear_op, "tensor")]


def can_be(name, form, weighting, backend):
    """Eager torch multiplies, forward and backward, in what autocast says. Triton's interpreter
    makes tensors of its own, and is slow: there one of each."""
    if backend == "eager":
        return not (name in AUTOCAST and form[0] is linear_op)
    once = (FORMS[0], "ref_ce"), (FORMS[-1], "given")
    return backend == "cpu" or (name != "default device meta" and (form, weighting) in once)


@in_pairs(name=AMBIENT, form=FORMS, weighting=["given", "ref_ce"], backend=ON_CPU, where=can_be)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_the_answer_is_the_one_without(name, form, weighting, backend):
    op, form = form
    narrows = name in AUTOCAST and op is linear_op  # the one that has a product
    ambient = AMBIENT[name]
    forward = ambient if narrows else nullcontext
    expected = answer(op, form, weighting, forward, backend=backend)
    places = [(nullcontext, ambient), (ambient, nullcontext), (ambient, ambient)]
    for place in places[1:] if narrows else places:
        found = answer(op, form, weighting, *place, backend=backend)
        assert len(found) == (3 if name in WITHOUT_GRAD and place[0] is ambient else len(expected))
        for ours, theirs in zip(found, expected, strict=False):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("places", ["forward", "backward", "both"])
def test_large_sums_of_a_narrow_product_stay_wide(name, places):
    """65 rows of hidden states of 100: the product of a chunk is float16, its gradient is not."""
    ambient = AMBIENT[name]
    hidden = torch.full((1, 65, 1, 8), 100.0, requires_grad=True)
    weight = (torch.arange(320.0).view(40, 8) * 1e-5).requires_grad_()
    ids = torch.full((1, 65), 7)
    logits = F.linear(hidden.double(), weight.double())
    ce = F.cross_entropy(logits[0, :-1, 0], ids[0, 1:])
    (truth,) = torch.autograd.grad(ce, weight)
    with ambient() if places != "backward" else nullcontext():
        loss = fused_linear_weighted_mtp_loss(hidden, weight, ids).loss
    for twice in (False, True):
        with ambient() if places != "forward" else nullcontext():
            (found,) = torch.autograd.grad(loss, weight, retain_graph=not twice)
        torch.testing.assert_close(found, truth, rtol=2e-2, atol=0.5)


@pytest.mark.parametrize("name", AMBIENT)
def test_a_reference_is_the_one_without(name):
    case = make_case((B, S, 1, V))
    arguments = (case.logits[:, :, 0], case.target_ids)
    expected = next_token_cross_entropy(*arguments)
    with AMBIENT[name]():
        assert torch.equal(next_token_cross_entropy(*arguments), expected)
