"""What `metrics=True` adds to a loss, and its sums: in every way that a loss is called."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from support.covering import in_pairs
from wmtp import (
    MTPLoss,
    fused_linear_weighted_mtp_loss,
    fused_weighted_mtp_loss,
    loss_denominator,
    summarize,
)
from wmtp.checks import REDUCTIONS
from wmtp.metrics import Metrics

B, S, H, V, D = 2, 6, 2, 17, 5
OPS = ("logits", "list", "linear", "list of hidden states")
INF = float("inf")
HOW = {"softcap": 5.0, "z_loss": 0.01, "label_smoothing": 0.1, "vocab_size": 15}
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:token_mean divides"),
]


def ids_of(batch=B):
    ids = torch.randint(15, (batch, S))
    ids[0, 2] = -100
    return ids


def loss_of(op, ids, device="cpu", **how):
    """A loss with metrics of a leaf, and the leaf."""
    weight, how = torch.randn(V, D, device=device), {"metrics": True, **how}
    leaf = torch.randn(len(ids), S, H, D if "hidden" in op or op == "linear" else V, device=device)

    def loss(leaf):
        states = [leaf[:, :, k] for k in range(H)] if "list" in op else leaf
        if leaf.shape[-1] == V:
            return fused_weighted_mtp_loss(states, ids.to(device), **how)
        return fused_linear_weighted_mtp_loss(states, weight, ids.to(device), **how)

    return loss, leaf.requires_grad_()


def assert_same(found, wanted):
    assert found.metrics is not None
    torch.testing.assert_close(tuple(found), tuple(wanted))
    for ours, theirs in zip(found.metrics, wanted.metrics, strict=True):
        torch.testing.assert_close(ours, theirs)


def gradient(loss, leaf):
    return torch.autograd.grad(loss(leaf).loss, leaf)[0]


@in_pairs(op=OPS, weighting=["uniform", "given", "ref_ce"], numerics=[{}, HOW])
def test_every_op_says_the_same(target, op, weighting, numerics):
    """As eager torch, and without a gradient; the loss is that without metrics."""
    backend, device = target
    how = dict(numerics)
    if weighting != "uniform":
        given = {"head_weights": torch.rand(B, S, H), "ref_ce": torch.rand(B, S - 1)}
        name = "head_weights" if weighting == "given" else "ref_ce"
        how[name] = given[name].to(device)
    results = []
    ids = ids_of()
    plain = {"backend": backend, "metrics": False}
    for more in ({"backend": backend}, {"backend": "eager"}, plain):
        torch.manual_seed(1)
        loss, leaf = loss_of(op, ids, device, **how, **more)
        results.append(loss(leaf))
    found, wanted, without = results
    assert_same(found, wanted)
    assert without.metrics is None
    for ours, theirs in zip(found, without, strict=True):
        assert torch.equal(ours, theirs)
    for value in found.metrics[:5]:
        assert value.shape == (B, S, H)
        assert not value.requires_grad
        assert not value[~found.metrics.valid].any()
    assert [value.dtype for value in found.metrics] == [
        torch.float32, torch.float32, torch.bool, torch.float32, torch.bool, torch.float64,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "numerics"), list(zip(OPS, [HOW, {}, HOW, HOW], strict=True)), ids=str
)
def test_compiled_and_checkpointed(op, numerics):
    loss, leaf = loss_of(op, ids_of(), **numerics)
    wanted, of_loss = loss(leaf), gradient(loss, leaf)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    again = partial(checkpoint, loss, use_reentrant=False)
    for other in (compiled, again):
        assert_same(other(leaf), wanted)
        torch.testing.assert_close(gradient(other, leaf), of_loss)
    summary = torch.compile(lambda x: summarize(loss(x)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(summary(leaf).mean_ce, summarize(wanted).mean_ce)


@pytest.mark.parametrize("op", ["logits", "list"])
@pytest.mark.parametrize("numerics", [{}, HOW], ids=["plain", "all"])
def test_in_place(target, op, numerics):
    """They are of the logits, not of the gradient that is there afterwards."""
    backend, device = target
    ids = ids_of()
    loss, leaf = loss_of(op, ids, device, **numerics, backend=backend)
    wanted, of_loss = loss(leaf), gradient(loss, leaf)
    logits = leaf.detach().clone().requires_grad_()
    states = [(logits[:, :, k] * 1) for k in range(H)] if op == "list" else logits * 1
    how = {"metrics": True, "inplace": True, "backend": backend, **numerics}
    result = fused_weighted_mtp_loss(states, ids.to(device), **how)
    assert_same(result, wanted)
    result.loss.backward()
    torch.testing.assert_close(logits.grad, of_loss)
    assert_same(result, wanted)


def test_without_anything_to_differentiate():
    loss, leaf = loss_of("logits", ids_of())
    with torch.no_grad():
        assert_same(loss(leaf), loss(leaf.detach()))


def test_a_result_unpacks_as_three_and_is_copied_whole():
    loss, leaf = loss_of("logits", ids_of())
    result = loss(leaf.detach())
    value, valid_mask, ce = result
    assert len(result) == 3
    assert value is result.loss
    assert valid_mask is result.valid_mask
    assert ce is result[2]
    assert isinstance(result, MTPLoss)
    assert isinstance(result.metrics, Metrics)
    for copied in (copy.copy(result), copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert_same(copied, result)
    changed = result._replace(loss=2 * value)
    assert changed.loss == 2 * value
    assert changed.metrics is result.metrics
    made = type(result)(
        *result
    )  # as libraries rebuild what has fields: the three are what there is
    assert made.metrics is None


def test_a_pytree_keeps_them():
    """DDP, FSDP and torch.compile take results apart and put them together."""
    loss, leaf = loss_of("linear", ids_of())
    result = loss(leaf.detach())
    leaves, spec = pytree.tree_flatten(result)
    assert len(leaves) == 3 + len(Metrics._fields)
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(result)
    assert_same(again, result)
    moved = pytree.tree_map(lambda value: value.clone(), {"output": [result]})
    assert_same(moved["output"][0], result)
    plain = fused_weighted_mtp_loss(torch.randn(1, 3, 2, 5), torch.zeros(1, 3, dtype=torch.long))
    assert pytree.tree_map(lambda value: value, plain).metrics is None


@in_pairs(reduction=REDUCTIONS, op=["logits", "linear"], masked=[False, True], prior=[False, True])
def test_weights_and_denominator_make_the_loss(target, reduction, op, masked, prior):
    backend, device = target
    ids, weights = ids_of(), torch.rand(B, S, H)
    weights[1, 1] = 0.0
    masks = {"target_mask": torch.rand(B, S) + 0.1, "position_mask": torch.rand(B, S, H) > 0.2}
    how = masks if masked else {}
    how = how | ({"head_prior": torch.tensor([0.3, 2.0])} if prior else {})
    on_device = {name: value.to(device) for name, value in how.items()}
    loss, leaf = loss_of(
        op, ids, device, **on_device, head_weights=weights.to(device), reduction=reduction,
        backend=backend,
    )  # fmt: skip
    result = loss(leaf)
    w, ce, divisor = result.metrics.weights, result.ce_per_head, result.metrics.denominator
    if reduction != "sum":
        told = loss_denominator(ids, H, head_weights=weights, **how, reduction=reduction)
        torch.testing.assert_close(divisor.cpu(), told, rtol=1e-6, atol=0)
    assert divisor.shape == ((H,) if reduction == "head_mean" else ())
    if reduction == "token_mean":
        total = w.sum(-1)
        per_token = torch.where(total > 1e-8, (w * ce).sum(-1) / total, 0.0)
        wanted = per_token.sum() / divisor
    elif reduction == "head_mean":  # the prior is outside the weights
        outside = how.get("head_prior", torch.full((H,), 1 / H)).to(device)
        wanted = (outside * (w * ce).sum((0, 1)) / divisor).sum()
    else:
        wanted = (w * ce).sum() / divisor
    torch.testing.assert_close(result.loss, wanted.float(), rtol=1e-5, atol=1e-6)


def test_a_normalizer_is_the_denominator():
    for reduction, normalizer in (("sum", 7), ("head_mean", torch.tensor([3.0, 0.0]))):
        loss, leaf = loss_of("logits", ids_of(), reduction=reduction, normalizer=normalizer)
        found = loss(leaf).metrics.denominator
        assert found.dtype == torch.float64
        assert found.tolist() == torch.as_tensor(normalizer).tolist()


HITS = {  # a row, its target, and whether it is a hit
    "largest": ([0.0, 2.0, 1.0], 1, True),
    "not the largest": ([0.0, 2.0, 1.0], 2, False),
    "the first of two": ([2.0, 1.0, 2.0], 0, True),
    "the second of two": ([2.0, 1.0, 2.0], 2, False),
    "all alike": ([1.0, 1.0, 1.0], 0, True),
    "all alike, the last": ([1.0, 1.0, 1.0], 2, False),
    "beside -inf": ([-INF, 1.0, -INF], 1, True),
    "-inf": ([-INF, 1.0, -INF], 0, False),
    "zeros of either sign": ([-0.0, 0.0, -1.0], 0, True),
}


@pytest.mark.parametrize("name", HITS)
@pytest.mark.parametrize("numerics", [{}, {"softcap": 0.01}, {"vocab_size": 3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hits(target, name, numerics, dtype):
    """Of equal logits the first is the largest, in short rows and long ones; caps change no order.
    What -inf leaves out has no part in the entropy."""
    backend, device = target
    row, wanted, hit = HITS[name]
    for columns in (3, 203):
        logits = torch.full((1, 2, 1, columns), -INF if columns > 3 else 0.0)
        logits[..., :3] = torch.tensor(row)
        if numerics.get("softcap") and logits.isinf().any():
            logits = logits.clamp(min=-1e4)
        logits, ids = logits.to(device, dtype), torch.tensor([[0, wanted]], device=device)
        metrics = fused_weighted_mtp_loss(
            logits, ids, **numerics, metrics=True, backend=backend
        ).metrics
        assert metrics.correct.flatten().tolist() == [hit, False]
        assert metrics.entropy.isfinite().all()


@pytest.mark.parametrize(
    "largest", [(0,), (4096, 9000), (19_999,), (3, 12_288), (8191, 8192)], ids=str
)
@pytest.mark.parametrize("shared", [False, True])
def test_hits_of_long_rows(largest, shared):
    """Over blocks and the parts of a team, whatever else the targets are."""
    asked = torch.tensor([0, 3, 4096, 8191, 8192, 9000, 12_288, 19_999])
    logits = torch.rand(1, 1, 1 if shared else len(asked), 20_000)
    logits[..., list(largest)] = 2.0
    logits = logits.expand(-1, -1, len(asked), -1)
    for labels in (asked, asked.flip(0)):
        metrics = fused_weighted_mtp_loss(
            logits, labels[None, None], metrics=True, backend="cpu"
        ).metrics
        assert torch.equal(metrics.correct[0, 0], labels == largest[0])


def test_a_row_of_nan_is_no_hit(target):
    backend, device = target
    logits = torch.zeros(1, 3, 1, 40, device=device)
    logits[0, 0, 0, 0], logits[0, 1, 0, 30] = float("nan"), float("nan")
    ids = torch.tensor([[0, 0, 30]], device=device)
    result = fused_weighted_mtp_loss(logits, ids, metrics=True, backend=backend)
    assert not result.metrics.correct.any()
    assert result.metrics.lse.isnan().flatten().tolist() == [True, True, False]
    assert summarize(result).mean_ce.isnan().all()


def test_a_summary_by_hand():
    """Of x = (log 3, 0) p is (3/4, 1/4)."""
    log3, log4 = torch.tensor([3.0, 4.0], dtype=torch.float64).log()
    logits = torch.zeros(1, 4, 2, 2)
    logits[..., 0] = float(log3)
    weights = torch.tensor([1.0, 0.5]).expand(1, 4, 2)
    result = fused_weighted_mtp_loss(
        logits, torch.tensor([[1, 0, 1, -100]]), weights, reduction="sum", metrics=True
    )
    summary = summarize(result)
    assert summary.count.tolist() == [2, 1]
    assert summary.hits.tolist() == [1, 0]
    assert summary.weight.tolist() == [2.0, 0.5]
    assert summary.weight_share.tolist() == [0.8, 0.2]
    assert summary.accuracy.tolist() == [0.5, 0.0]
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    close(summary.ce, torch.stack([2 * log4 - log3, log4]))
    close(summary.mean_ce, torch.stack([log4 - log3 / 2, log4]))
    close(summary.mean_entropy, (log4 - 0.75 * log3).expand(2))
    for value in (summary.count, summary.ce, summary.hits, summary.entropy, summary.weight):
        assert value.dtype == torch.float64
        assert not value.requires_grad


def test_summaries_add_up():
    ids = ids_of(4)
    logits = torch.randn(4, S, H, V)
    how = {"metrics": True, "reduction": "sum"}
    whole = summarize(fused_weighted_mtp_loss(logits, ids, **how))
    parts = [
        summarize(fused_weighted_mtp_loss(rows, labels, **how))
        for rows, labels in zip(logits.split(1), ids.split(1), strict=True)
    ]
    for added in (sum(parts), parts[0] + parts[1] + (parts[2] + parts[3])):
        for name in ("count", "ce", "hits", "entropy", "weight", "mean_ce", "weight_share"):
            torch.testing.assert_close(getattr(added, name), getattr(whole, name))
    one = summarize(fused_weighted_mtp_loss(logits[:, :, :1], ids, **how))
    with pytest.raises(ValueError, match="as many heads to be added, got ones of 2 and of 1"):
        whole + one
    with pytest.raises(TypeError):
        whole + 1


def test_where_nothing_counts_all_is_0():
    logits = torch.full((1, 3, 2, 5), float("nan"))
    result = fused_weighted_mtp_loss(logits, torch.full((1, 3), -100), metrics=True)
    summary = summarize(result)
    names = ("count", "ce", "accuracy", "mean_ce", "mean_entropy", "weight_share")
    for name in names:
        assert getattr(summary, name).tolist() == [0.0, 0.0], name


def test_a_result_without_metrics():
    result = fused_weighted_mtp_loss(torch.randn(1, 3, 2, 5), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="has no metrics: call the loss with metrics=True"):
        summarize(result)
    with pytest.raises(TypeError, match="what a loss returned, got tuple: pass it whole"):
        summarize(tuple(result))


def in_two_processes(folder):
    """Each has its half of the batch; one of them has no pair that counts."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, S, H, V, generator=generator)
    ids = torch.randint(V, (2, S), generator=generator)
    ids[1] = -100
    how = {"metrics": True, "reduction": "sum"}
    rank = dist.get_rank()
    mine = fused_weighted_mtp_loss(logits[rank, None], ids[rank, None], **how)
    whole = summarize(fused_weighted_mtp_loss(logits, ids, **how))
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **more: calls.append(1) or all_reduce(*args, **more)
    own = summarize(mine)
    assert not calls
    assert own.count.tolist() == ([5.0, 4.0] if rank == 0 else [0.0, 0.0])
    found = summarize(mine, dist.group.WORLD)
    assert len(calls) == 1
    for name in ("count", "ce", "hits", "entropy", "weight", "mean_ce", "accuracy"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name))
    (folder / f"{rank}.done").touch()
    dist.barrier()  # gloo aborts a process whose peer has gone
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_over_two_processes(tmp_path):
    from support.tiny_runs import in_processes  # here, for it needs what trains

    assert in_processes(2, in_two_processes, tmp_path) == [0, 0]
    assert {file.name for file in tmp_path.glob("*.done")} == {"0.done", "1.done"}
