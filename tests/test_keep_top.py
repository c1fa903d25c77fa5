"""Selection: which pairs are kept, and that nothing but time and memory follows from how."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from support.agreement import assert_agrees, make_case
from support.covering import in_pairs
from wmtp import backends, fused_linear_weighted_mtp_loss, fused_weighted_mtp_loss, kernels, once
from wmtp.ops.plan import Kind, Segment, runs_of
from wmtp.reference import compute_weighted_mtp_loss
from wmtp.weightings import DFT, Decay, DPace, Excess, Given, KeepTop

SHAPE = B, S, H, V = (2, 5, 3, 33)
NAN, INF = float("nan"), float("inf")


def some(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


REF = 6 * some(B, S - 1)
RULES = {
    "loss": KeepTop(0.6),
    "entropy": KeepTop(0.4, by="entropy"),
    "excess": KeepTop(0.5, by=Excess(REF, excess="signed")),
    "centered": KeepTop(torch.tensor(0.5), by=Excess(REF, center=some(H))),
    "chunks": KeepTop(0.4, scope="chunk", chunk_tokens=3),
    "tokens": KeepTop(0.5, scope="token"),
    "heads": KeepTop(0.3, scope="head"),
    "x decay": KeepTop(0.5) * Decay(0.5),
    "x given": Given(some(B, S, H)) * KeepTop(0.5),
    "x pace": KeepTop(0.5) * DPace(),
}
REDUCTIONS = ("token_mean", "weight_mean", "pair_mean", "head_mean", "sum")


@pytest.fixture(autouse=True)
def _said_before(monkeypatch):
    monkeypatch.setattr(once, "_said", set())


# ---- which are kept ----


def kept_by_hand(rule, score, valid):
    """By plain Python: groups of (b, t, k), each sorted."""
    batch, length, heads = score.shape
    pairs = [(b, t, k) for b in range(batch) for t in range(length) for k in range(heads)]
    group_of = {
        "batch": lambda b, t, k: 0,
        "chunk": lambda b, t, k: (b * length + t) // rule.chunk_tokens,
        "token": lambda b, t, k: (b, t),
        "head": lambda b, t, k: k,
    }[rule.scope]
    groups, found = {}, torch.zeros(score.shape, dtype=torch.bool)
    for pair in pairs:
        if valid[pair]:
            groups.setdefault(group_of(*pair), []).append(pair)
    for members in groups.values():
        count = max(1, int(rule.ratio * len(members) + 0.5))

        def rank(pair):
            value = score[pair].item()
            return (value == value, -value if value == value else 0.0, pair)

        for pair in sorted(members, key=rank)[:count]:
            found[pair] = True
    return found


@pytest.mark.parametrize("scope", ["batch", "chunk", "token", "head"])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.625, 1.0])
def test_kept_by_hand(scope, ratio):
    """With ties, infinities of either sign and NaN."""
    score = (8 * some(3, 7, 4)).round()
    score[0, 1, 2], score[1, 2, 0], score[2, 6, 1], score[0, 0, 0] = NAN, INF, -INF, -INF
    valid = some(7, 4, 3).permute(2, 0, 1) < 0.7
    for rule in (KeepTop(ratio, scope=scope, chunk_tokens=4),):
        found = rule.weights(score, valid)
        assert torch.equal(found > 0, kept_by_hand(rule, score, valid))
        assert rule.count(valid) == found.sum()
        assert set(found.unique().tolist()) <= {0.0, 1.0}


def test_nothing_to_keep():
    rule = KeepTop(0.5)
    assert rule.weights(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2, dtype=torch.bool)).sum() == 0
    logits = torch.randn(SHAPE, requires_grad=True)
    result = fused_weighted_mtp_loss(logits, torch.full((B, S), -100), weighting=rule)
    result.loss.backward()
    assert result.loss == 0
    assert not logits.grad.any()


def test_the_reference_decides_by_signed_excess():
    """Rho-1: what is well above the reference is kept, however small its loss."""
    ce = torch.tensor([[[1.0], [5.0], [3.0]]])
    ref = torch.tensor([[[0.0], [5.0], [2.5]]])
    rule = KeepTop(0.3, by=Excess(torch.zeros(1, 3), excess="signed"))
    kept = rule.weights(ce, torch.ones(1, 3, 1, dtype=torch.bool), ref_ce=ref)
    assert kept.flatten().tolist() == [1, 0, 0]


# ---- the loss ----


@in_pairs(
    name=RULES,
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    reduction=REDUCTIONS,
    backend=["cpu", "triton"],
    where=lambda name, dtype, reduction, backend: backend == "cpu" or name in ("loss", "chunks"),
)
@pytest.mark.filterwarnings("ignore:.*has no twin", "ignore:.*cancel")
def test_selection_is_right_everywhere(name, dtype, reduction, backend):
    if backend == "triton" and not kernels.interpreted():
        pytest.skip("Triton runs on the CPU in its interpreter alone")
    case = make_case(SHAPE, dtype, reduction=reduction, weighting=RULES[name])
    assert_agrees(partial(fused_weighted_mtp_loss, backend=backend), case)


LABELS = {
    "plain": {},
    "documents": {"document_ids": torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, 2, 2]])},
    "float mask": {"target_mask": some(B, S)},
    "left padding": {"position_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0},
}


@in_pairs(name=RULES, labels=LABELS, reduction=REDUCTIONS, chunk_bytes=[None, 3000, 12_000])
@pytest.mark.filterwarnings("ignore:.*cancel")
def test_selection_in_the_linear_loss(name, labels, reduction, chunk_bytes):
    """Whatever the chunks, the same pairs are kept; the gradients of the loss, of the cross
    entropies and of both at once are the truth's."""
    hidden = torch.randn(B, S, H, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(V, (B, S)).index_fill_(1, torch.tensor([3]), -100)
    how = {"weighting": RULES[name], "reduction": reduction, "metrics": True, **LABELS[labels]}
    ours = fused_linear_weighted_mtp_loss(
        hidden, weight, ids, lm_head_bias=bias, **how, chunk_bytes=chunk_bytes
    )
    truth = compute_weighted_mtp_loss(hidden @ weight.T + bias, ids, horizon=H, **how)
    torch.testing.assert_close(ours.loss, truth.loss)
    torch.testing.assert_close(ours.ce_per_head, truth.ce_per_head)
    torch.testing.assert_close(tuple(ours.metrics), tuple(truth.metrics))
    assert torch.equal(ours.valid_mask, truth.valid_mask)
    upstream = torch.randn_like(ours.ce_per_head)
    for of_ce in (0.0, 1.0):
        found, wanted = (
            torch.autograd.grad(
                3 * result.loss + (of_ce * upstream * result.ce_per_head).sum(),
                (hidden, weight, bias),
                retain_graph=True,
            )
            for result in (ours, truth)
        )
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("reduction", ["weight_mean", "pair_mean"])
def test_a_ratio_of_1_is_uniform_bit_by_bit(reduction):
    case, how = make_case(SHAPE), {"reduction": reduction}
    hidden, weight = torch.randn(B, S, H, 8), torch.randn(V, 8)
    for function, inputs in (
        (fused_weighted_mtp_loss, [case.logits]),
        (fused_linear_weighted_mtp_loss, [hidden, weight]),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        ours, uniform = (
            function(*leaves, case.target_ids, weighting=rule, **how).loss
            for rule in (KeepTop(1.0), None)
        )
        assert torch.equal(ours, uniform)
        found, wanted = (torch.autograd.grad(each, leaves) for each in (ours, uniform))
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_nan_surfaces(backend):
    if backend == "triton" and not kernels.interpreted():
        pytest.skip("Triton runs on the CPU in its interpreter alone")
    logits, ids = torch.randn(SHAPE), torch.randint(V, (B, S))
    logits[0, 1, 0, 3] = NAN
    how = {"weighting": KeepTop(0.1), "backend": backend}
    assert fused_weighted_mtp_loss(logits, ids, **how).loss.isnan()
    hidden = torch.randn(B, S, H, 5)
    hidden[0, 1, 0, 3] = NAN
    rule = KeepTop(0.1)
    assert fused_linear_weighted_mtp_loss(
        hidden, torch.randn(V, 5), ids, weighting=rule
    ).loss.isnan()


def test_rows_that_are_left_out_are_neither_read_again_nor_multiplied(monkeypatch):
    """The kernels are given so many rows."""
    given = []
    rows_ce_ = backends.cpu.rows_ce_

    def watched(logits, target_ids, row_scalar, settings):
        given.append((len(logits), row_scalar is not None))
        return rows_ce_(logits, target_ids, row_scalar, settings)

    monkeypatch.setattr(backends.cpu, "rows_ce_", watched)
    hidden = torch.randn(2, 8, 4, 16, requires_grad=True)
    weight, ids = torch.randn(40, 16, requires_grad=True), torch.randint(40, (2, 8))
    rows, row_bytes = 2 * (7 + 6 + 5 + 4), 4 * 40 + 12 * 16
    how = {"weighting": KeepTop(0.5)}
    fused_linear_weighted_mtp_loss(hidden, weight, ids, **how).loss.backward()
    assert given == [(rows, False), (rows // 2, True)]
    given.clear()
    how["chunk_bytes"] = 4 * 8 * row_bytes  # two chunks
    fused_linear_weighted_mtp_loss(hidden, weight, ids, **how).loss.backward()
    assert [count for count, written in given if not written] == [22, 22]
    assert sum(count for count, written in given if written) == rows // 2


def test_two_passes_of_the_logits_are_not_complained_of(recwarn):
    case = make_case(SHAPE, weighting=KeepTop(0.5))
    fused_weighted_mtp_loss(case.logits, case.target_ids, **case.options)
    assert not [each for each in recwarn if "twin" in str(each.message)]


@pytest.mark.parametrize("name", ["chunks"])
def test_checkpointed_in_place_and_compiled(name):
    case = make_case(SHAPE, weighting=RULES[name])

    def loss_of(x, **more):
        return fused_weighted_mtp_loss(x, case.target_ids, **case.options, **more).loss

    def gradient(function):
        leaf = case.logits.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    wanted = gradient(loss_of)
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    checkpoint = partial(torch.utils.checkpoint.checkpoint, loss_of, use_reentrant=False)
    for function in (checkpoint, lambda leaf: loss_of(leaf * 1.0, inplace=True), compiled):
        torch.testing.assert_close(gradient(function), wanted)


def test_a_ratio_that_changes_compiles_nothing():
    case, graphs = make_case(SHAPE), []

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(backend=compiler, fullgraph=True)
    def step(ratio):
        return fused_weighted_mtp_loss(case.logits, case.target_ids, weighting=KeepTop(ratio)).loss

    for ratio in (0.9, 0.7, 0.5):
        step(torch.tensor(ratio))
    assert len(graphs) == 1


def in_a_group(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    ce, valid = torch.load(f"{folder}/pairs.pt")
    mine = slice(0, 1) if rank == 0 else slice(1, 4)  # of different sizes
    for scope in ("batch", "head"):
        whole = KeepTop(0.4, scope=scope).weights(ce, valid)
        rule = KeepTop(0.4, scope=scope, group=dist.group.WORLD)
        assert torch.equal(rule.weights(ce[mine], valid[mine]), whole[mine])
    dist.destroy_process_group()


def test_a_group_ranks_as_one_batch(tmp_path):
    ce, valid = some(4, 5, 3), some(4, 5, 3) < 0.8
    ce[0, 0], ce[3, 1] = 0.5, 0.5  # ties across processes
    torch.save((ce, valid), tmp_path / "pairs.pt")
    mp.spawn(in_a_group, (str(tmp_path),), 2)


BAD = {
    "ratio, 0": (KeepTop(0.0), r"ratio must be in \(0, 1\], got 0.0"),
    "ratio, above": (KeepTop(1.5), r"ratio must be in \(0, 1\]"),
    "ratio, nan": (KeepTop(NAN), "ratio must be"),
    "by": (KeepTop(0.5, by="size"), "by must be"),
    "scope": (KeepTop(0.5, scope="row"), "scope must be"),
    "chunk": (KeepTop(0.5, chunk_tokens=0), "chunk_tokens must be"),
    "group": (KeepTop(0.5, scope="token", group=object()), "group goes with scope='batch'"),
    "no reference": (KeepTop(0.5, by=Excess()), "Excess has nothing to compare with"),
    "two": (KeepTop(0.5) * KeepTop(0.5), "a product may have one KeepTop"),
    "reductions": (KeepTop(0.5) * DFT(), "reductions differ, KeepTop weight_mean, DFT pair_mean"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rules(name):
    rule, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        fused_weighted_mtp_loss(torch.zeros(SHAPE), torch.zeros(B, S).long(), weighting=rule)


def test_runs_are_as_long_as_they_can_be():
    kinds = [Kind(0, True, False), Kind(0, True, True), Kind(0, False, True), Kind(0, False, False)]
    bounds = [slice(0, 2), slice(2, 5), slice(5, 6), slice(6, 9)]
    segments = list(map(Segment, bounds, kinds))
    assert list(runs_of(segments, lambda kind: True)) == [(slice(0, 9), 0)]
    assert list(runs_of(segments, lambda kind: kind.hidden)) == [(slice(0, 5), 0)]
    assert list(runs_of(segments, lambda kind: kind.weight)) == [(slice(2, 6), 0)]
