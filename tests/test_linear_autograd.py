"""The linear loss as a training step meets it: which products are made, and what backward gets."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from support.linear_cases import LOW, SOME, cast, gradients, make_case, truth
from wmtp import fused_linear_weighted_mtp_loss
from wmtp.checks import REDUCTIONS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighting", ["given", "ref_ce"])
@pytest.mark.parametrize("chunk_bytes", [SOME, None])
def test_a_second_backward_and_an_upstream_gradient(dtype, weighting, chunk_bytes):
    leaves, options = make_case(dtype, weighting, bias=True)
    hidden, weight, bias = leaves
    loss = fused_linear_weighted_mtp_loss(
        hidden, weight, lm_head_bias=bias, chunk_bytes=chunk_bytes, **options
    ).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(loss * 2.0, leaves, retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    allowed = 5e-3 if dtype in LOW else 1e-6  # made anew, they are rounded elsewhere
    for once, double, again in zip(first, twice, third, strict=True):
        assert (double - 2 * once).norm() <= 2 * allowed * once.norm()
        assert (again - once).norm() <= allowed * once.norm()


def test_weights_that_require_grad():
    for reduction in REDUCTIONS:
        leaves, options = make_case(torch.float64, "given", reduction=reduction)
        options["head_weights"].requires_grad_()
        exact_leaves, exact = cast(leaves, options)
        exact["head_weights"].requires_grad_()
        upstream = -1.5, torch.randn(2, 11, 3)
        _, found = gradients(fused_linear_weighted_mtp_loss, leaves, options, upstream)
        _, wanted = gradients(truth, exact_leaves, exact, upstream)
        torch.testing.assert_close(found, wanted)


@pytest.fixture
def products(monkeypatch):
    """The rows of every matrix product that makes logits, [R, D] @ [D, V]; and of all others."""
    made, mm = {"logits": [], "others": []}, torch.mm

    def recorded(a, b, **more):
        made["logits" if "out" in more else "others"].append((tuple(a.shape), tuple(b.shape)))
        return mm(a, b, **more)

    monkeypatch.setattr(torch, "mm", recorded)
    return made


def test_rows_without_a_target_are_not_computed(products):
    (hidden, weight, _), options = make_case(torch.float32)
    options["target_ids"][0] = -100
    targets = (truth(hidden, weight, **options).ce_per_head != 0).sum().item()
    fused_linear_weighted_mtp_loss(hidden, weight, **options, chunk_bytes=SOME)
    assert len(products["logits"]) > 1
    assert sum(rows for (rows, _), _ in products["logits"]) == targets


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_costs_no_product(products, monkeypatch, frozen):
    (hidden, weight, _), options = make_case(torch.float32)
    summed, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: summed.append(1) or addmm(*a, **k))
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    fused_linear_weighted_mtp_loss(hidden, weight, **options)
    assert len(products["logits"]) == 1
    assert len(products["others"]) == (frozen == "weight")
    assert len(summed) == (frozen == "hidden")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_gradients_the_logits_are_only_read(products, dtype):
    (hidden, weight, _), options = make_case(dtype, "ref_ce")
    with torch.no_grad():
        result = fused_linear_weighted_mtp_loss(hidden, weight, **options, chunk_bytes=SOME)
    assert not products["others"]
    assert not result.loss.requires_grad
    torch.testing.assert_close(
        result.loss, fused_linear_weighted_mtp_loss(hidden, weight, **options).loss.detach()
    )


def test_the_accumulator_is_as_wide_as_asked():
    leaves, options = make_case(torch.bfloat16, shape=(1, 64, 2, 32, 300))
    _, true = gradients(truth, *cast(leaves, options))

    def error(accum_dtype):
        how = {"chunk_bytes": 3000, "grad_accum_dtype": accum_dtype}
        _, found = gradients(fused_linear_weighted_mtp_loss, leaves, options, **how)
        return (found[1].double() - true[1]).norm()

    assert error(None) == error(torch.float32) < 0.9 * error(torch.bfloat16)


def test_a_tied_embedding_gets_both_gradients():
    (_, weight, _), options = make_case(torch.float64)
    embedding = torch.nn.Embedding(61, 16, _weight=weight.detach())
    ids = options["target_ids"].clamp(min=0)

    def step(function, **more):
        embedding.weight.grad = None
        hidden = embedding(ids).tanh()[:, :, None].expand(-1, -1, 3, -1)
        function(hidden, embedding.weight, **options, **more).loss.backward()
        return embedding.weight.grad

    wanted = step(truth)
    torch.testing.assert_close(step(fused_linear_weighted_mtp_loss, chunk_bytes=SOME), wanted)


@pytest.mark.parametrize("weighting", ["uniform", "ref_ce"])
def test_autocast_makes_the_products_narrow(weighting):
    leaves, options = make_case(torch.float32, weighting, True, (1, 128, 4, 64, 1000))
    with torch.autocast("cpu", torch.bfloat16):
        _, found = gradients(fused_linear_weighted_mtp_loss, leaves, options, chunk_bytes=200_000)
        _, eager = gradients(truth, leaves, options)
    _, true = gradients(truth, *cast(leaves, options))
    for ours, theirs, wanted in zip(found, eager, true, strict=True):
        assert ours.dtype == torch.float32
        error = (ours.double() - wanted).norm()
        assert 0 < error <= 1.1 * (theirs.double() - wanted).norm()


def test_autocast_leaves_float64_alone():
    leaves, options = make_case(torch.float64)
    wanted = gradients(fused_linear_weighted_mtp_loss, leaves, options)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            gradients(fused_linear_weighted_mtp_loss, leaves, options), wanted, rtol=0, atol=0
        )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("weighting", ["given", "ref_ce"])
def test_checkpointed(reentrant, weighting):
    leaves, options = make_case(torch.float64, weighting)
    layer = torch.nn.Linear(16, 16, dtype=torch.float64)

    def loss(hidden, weight):
        return fused_linear_weighted_mtp_loss(layer(hidden).tanh(), weight, **options).loss

    of = [*leaves[:2], *layer.parameters()]
    wanted = torch.autograd.grad(loss(*leaves[:2]), of)
    for leaf in of:
        leaf.grad = None
    checkpoint(loss, *leaves[:2], use_reentrant=reentrant).backward()
    torch.testing.assert_close(tuple(leaf.grad for leaf in of), wanted)
