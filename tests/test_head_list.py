"""A list of H logits [B, S, V] in place of [B, S, H, V]: the same numbers, and no stacked copy."""

import pytest
import torch

from support.agreement import make_case
from wmtp import fused_weighted_mtp_loss
from wmtp.benchmarks.memory import peak_bytes

SHAPE = (2, 5, 3, 37)


def stacked_and_listed(weighting="given", dtype=torch.float32, device="cpu", shape=SHAPE):
    case = make_case(shape, dtype, weighting, device=device)
    heads = [head.detach().clone().requires_grad_() for head in case.logits.unbind(2)]
    return case, case.logits.detach().clone().requires_grad_(), heads


@pytest.mark.parametrize(
    ("weighting", "dtype"),
    [("uniform", torch.float16), ("given", torch.float32), ("ref_ce", torch.bfloat16)],
)
def test_a_list_gives_what_the_stacked_heads_give(target, weighting, dtype):
    backend, device = target
    case, logits, heads = stacked_and_listed(weighting, dtype, device)
    wanted = fused_weighted_mtp_loss(logits, case.target_ids, **case.options, backend=backend)
    (3 * wanted.loss).backward()
    found = fused_weighted_mtp_loss(heads, case.target_ids, **case.options, backend=backend)
    (3 * found.loss).backward()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for k, head in enumerate(heads):
        torch.testing.assert_close(head.grad, logits.grad[:, :, k])


@pytest.mark.usefixtures("tier")
def test_every_tier_takes_a_list(device):
    case, logits, heads = stacked_and_listed("given", device=device, shape=(1, 5, 3, 131))
    for inplace in (False, True):
        used = [head * 1 for head in heads]
        loss = fused_weighted_mtp_loss(
            used, case.target_ids, **case.options, inplace=inplace, backend="triton"
        ).loss
        grads = torch.autograd.grad(loss, heads)
        wanted = fused_weighted_mtp_loss(
            logits, case.target_ids, **case.options, backend="triton"
        ).loss
        (stacked,) = torch.autograd.grad(wanted, logits)
        # Rows of other alignment are summed in another order.
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
        for k, grad in enumerate(grads):
            torch.testing.assert_close(grad, stacked[:, :, k], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dims", [(1,), (0,), (0, 1)])
@pytest.mark.parametrize("weighting", ["given", "ref_ce"])
def test_heads_that_are_expanded_themselves(target, weighting, dims):
    """Strides of 0 within a head are not the one stride of 0 that shared heads have."""
    backend, device = target
    shape = [1 if dim in dims else size for dim, size in enumerate(SHAPE)]
    rows = torch.randn(shape, device=device)
    case, logits, _ = stacked_and_listed(weighting, device=device)
    logits = rows.expand(SHAPE).contiguous().requires_grad_()
    heads = [head.expand(*SHAPE[:2], -1).requires_grad_() for head in rows.unbind(2)]
    wanted = fused_weighted_mtp_loss(logits, case.target_ids, **case.options, backend=backend)
    found = fused_weighted_mtp_loss(heads, case.target_ids, **case.options, backend=backend)
    torch.testing.assert_close(found.ce_per_head, wanted.ce_per_head)
    (stacked,) = torch.autograd.grad(wanted.loss, logits)
    grads = torch.autograd.grad(found.loss, heads)
    torch.testing.assert_close(torch.stack(grads, 2), stacked)


def test_in_place_each_head_holds_its_gradient(target):
    backend, device = target
    case, logits, leaves = stacked_and_listed(device=device)
    options = {**case.options, "backend": backend}
    fused_weighted_mtp_loss(logits, case.target_ids, **options).loss.backward()
    heads = [leaf * 1 for leaf in leaves]
    loss = fused_weighted_mtp_loss(heads, case.target_ids, **options, inplace=True).loss
    (2 * loss).backward()
    for k, (head, leaf) in enumerate(zip(heads, leaves, strict=True)):
        torch.testing.assert_close(leaf.grad, 2 * logits.grad[:, :, k])
        assert torch.equal(head, leaf.grad)
    with pytest.raises(ValueError, match="overwritten by their gradient"):
        fused_weighted_mtp_loss(heads, case.target_ids, **options)


def test_gradients_of_weights_and_cross_entropies(target):
    backend, device = target
    case, logits, heads = stacked_and_listed(device=device)
    found = []
    for given in (logits, heads):
        weights = case.options["head_weights"].clone().requires_grad_()
        out = fused_weighted_mtp_loss(given, case.target_ids, weights, backend=backend)
        (out.loss + out.ce_per_head.square().mean()).backward()
        found.append((out.ce_per_head.detach(), weights.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    for k, head in enumerate(heads):
        torch.testing.assert_close(head.grad, logits.grad[:, :, k])


def test_strides_may_differ_from_head_to_head(target):
    backend, device = target
    case, logits, heads = stacked_and_listed(device=device)
    heads = [heads[0], heads[1].transpose(0, 1).contiguous().transpose(0, 1), heads[2]]
    found = fused_weighted_mtp_loss(heads, case.target_ids, **case.options, backend=backend)
    wanted = fused_weighted_mtp_loss(logits, case.target_ids, **case.options, backend=backend)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_no_token_at_all(target, inplace):
    backend, device = target
    leaf = torch.zeros(2, 0, 3, 9, device=device, requires_grad=True)
    ids = torch.zeros(2, 0, dtype=torch.int64, device=device)
    rows = leaf * 1
    for heads in ([rows[:, :, k] * 1 for k in range(3)], [rows[:, :, k] for k in range(3)]):
        loss = fused_weighted_mtp_loss(heads, ids, inplace=inplace, backend=backend).loss
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert loss == 0
        assert gradient.shape == leaf.shape


def test_a_frozen_head_gets_no_gradient():
    case, _, heads = stacked_and_listed()
    heads[1] = heads[1].detach()
    fused_weighted_mtp_loss(heads, case.target_ids, **case.options).loss.backward()
    assert heads[0].grad is not None
    assert heads[1].grad is None


def test_eager_and_compiled_take_a_list():
    case, logits, heads = stacked_and_listed("uniform")
    wanted = fused_weighted_mtp_loss(logits, case.target_ids).loss
    eager = fused_weighted_mtp_loss(heads, case.target_ids, backend="eager").loss
    torch.testing.assert_close(eager, wanted)

    @torch.compile(backend="eager", fullgraph=True)
    def loss(*heads):
        return fused_weighted_mtp_loss(heads, case.target_ids).loss

    torch.testing.assert_close(loss(*heads), wanted)


def test_no_stacked_copy_is_made():
    case, _, heads = stacked_and_listed(shape=(1, 64, 4, 8000))
    total = sum(head.nbytes for head in heads)

    def call(inplace):
        used = [head.detach().requires_grad_() for head in heads]
        loss = fused_weighted_mtp_loss(
            used, case.target_ids, **case.options, inplace=inplace, backend="cpu"
        ).loss
        return torch.autograd.grad(loss, used)

    assert peak_bytes(lambda: call(False)) <= 1.02 * total
    assert peak_bytes(lambda: call(True)) <= 0.02 * total


def test_errors():
    ids = torch.zeros(1, 4, dtype=torch.int64)
    head = torch.zeros(1, 4, 9)
    for heads, message in (
        ([], "at least one head, got an empty list"),
        ([head, head.double()], "one dtype, got float32 and float64"),
        ([head, torch.zeros(1, 4, 8)], "one shape"),
        ([head[0]], r"each head's logits must be \[B, S, V\]"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_weighted_mtp_loss(heads, ids)
    with pytest.raises(TypeError, match="each head's logits must be a tensor"):
        fused_weighted_mtp_loss([head, None], ids)
    with pytest.raises(ValueError, match="lie across each other"):
        fused_weighted_mtp_loss([head, head], ids, inplace=True)
    with pytest.raises(ValueError, match="horizon must equal the number of heads H = 2"):
        fused_weighted_mtp_loss([head, head], ids, horizon=3)
