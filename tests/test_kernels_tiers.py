"""Loss and gradient in one launch: every tier gives the same numbers, and the right ones."""

import types

import pytest
import torch

pytest.importorskip("triton")


from support.covering import in_pairs
from support.kernel_outputs import (
    DTYPES,
    IGNORED,
    INF,
    NAN,
    PLACEMENTS,
    SHARED,
    VOCABULARIES,
    assert_close,
    assert_loss_and_gradient,
    make,
    placed,
    truth,
    weighted_loss,
)
from wmtp import fused_weighted_mtp_loss
from wmtp.kernels import tiers
from wmtp.labels import has_target

WEIGHTINGS = ["uniform", "given", "abs", "signed"]


def weighted(weighting, shape, device):
    """Arguments of `weighted_loss`."""
    weights = torch.rand(shape[:3])
    weights[0, 1] = 0.0
    ref_ce = (4 * torch.rand(shape[0], shape[1] - 1)).to(device)
    return {
        "uniform": {},
        "given": {"weights": weights.to(device), "normalize": False},
        "abs": {"ref_ce": ref_ce},
        "signed": {"ref_ce": ref_ce, "signed": True, "normalize": False},
    }[weighting]


def serves(tier, storage, weighting, inplace):
    """A row alone does not know excess weights."""
    return tier != "row" or weighting in ("uniform", "given")


@in_pairs(
    tier=tiers.TIERS,
    storage=VOCABULARIES,
    weighting=WEIGHTINGS,
    inplace=[False, True],
    where=serves,
)
def test_every_tier_agrees_with_the_truth(device, tier, storage, weighting, inplace):
    dtype, vocabulary = storage
    shape = (2, 4, 3, vocabulary)
    logits, target_ids = make(shape, dtype, device)
    options = weighted(weighting, shape, device)
    new = assert_loss_and_gradient(logits, target_ids, **options)
    if inplace:
        grad = assert_loss_and_gradient(logits, target_ids, gradient="inplace", **options)
        assert grad.data_ptr() == logits.data_ptr()
        assert torch.equal(grad, new)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_odd_vocabulary(device, tier, dtype):
    """GPT-2's, or what a program's registers hold."""
    vocabulary = {"online": 50257, "row": 32_003, "token": 16_001}[tier]
    logits, target_ids = make((1, 3, 2, vocabulary), dtype, device, ignored=0.0)
    options = {} if tier == "row" else {"ref_ce": torch.rand(1, 2).to(device)}
    assert_loss_and_gradient(logits, target_ids, **options)


@pytest.mark.parametrize("heads", [1, 5, 8])
def test_any_number_of_heads(device, tier, heads):
    logits, target_ids = make((1, 7, heads, 100), torch.float32, device)
    options = {} if tier == "row" and heads > 1 else {"ref_ce": torch.rand(1, 6).to(device)}
    assert_loss_and_gradient(logits, target_ids, **options)


@pytest.mark.parametrize(("dtype", "vocabulary"), SHARED)
def test_shared_heads(device, tier, dtype, vocabulary):
    rows, target_ids = make((2, 4, 1, vocabulary), dtype, device)
    target_ids[0, 1:4] = target_ids[0, 1].clamp(min=0)  # heads that agree on the target
    logits = rows.expand(-1, -1, 4, -1)
    for weighting in ("given", "signed"):
        options = weighted(weighting, (2, 4, 4), device)
        assert_loss_and_gradient(logits, target_ids, shared=True, **options)
    inplace = rows.clone().expand(-1, -1, 4, -1)
    assert_loss_and_gradient(inplace, target_ids, shared=True, gradient="inplace")


@pytest.mark.parametrize(("lead", "gap", "heads_first", "vocabulary"), PLACEMENTS)
def test_any_offset_and_stride(device, tier, vocabulary, lead, gap, heads_first):
    plain, target_ids = make((2, 3, 2, vocabulary), torch.bfloat16, device)
    logits, storage = placed(plain, lead, gap, heads_first)
    assert_loss_and_gradient(logits, target_ids)
    gaps = storage.isnan()
    assert_loss_and_gradient(logits, target_ids, gradient="inplace")
    assert torch.equal(storage.isnan(), gaps)


def test_rows_without_a_target_are_not_read(device, tier):
    logits, target_ids = make((2, 6, 3, 100), torch.float32, device, ignored=0.4)
    target_ids[1] = IGNORED
    valid = has_target(target_ids, 3, IGNORED)
    spoiled = torch.where(valid[..., None], logits, NAN)
    *found, (grad, _) = weighted_loss(spoiled, target_ids)
    *wanted, (clean, _) = weighted_loss(logits, target_ids)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(grad, clean)
    assert (grad[~valid] == 0).all()


def test_offsets_pass_two_to_the_31(device, tier, tmp_path, monkeypatch):
    """Heads 2^30 elements apart: the third begins at 2^31. The gradient is written there too."""
    apart, shape = 2**30, (1, 4, 3, 100)
    plain, target_ids = make(shape, torch.bfloat16, device)
    size = 2 * apart + 4 * 100
    if device == "cuda":
        storage = torch.empty(size, dtype=torch.bfloat16, device=device)
    else:  # a sparse file, which the interpreter would otherwise copy onto itself
        executor = pytest.importorskip("triton.runtime.interpreter").GridExecutor
        monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)
        path = str(tmp_path / "logits")
        storage = torch.from_file(path, shared=True, size=size, dtype=torch.bfloat16)
    logits = storage.as_strided(shape, (400, 100, apart, 1))
    logits.copy_(plain)
    grad = assert_loss_and_gradient(logits, target_ids, gradient="inplace")
    assert grad.data_ptr() == logits.data_ptr()


def test_all_tiers_give_the_same_loss_and_gradient(device, monkeypatch):
    logits, target_ids = make((2, 4, 4, 517), torch.float32, device)
    outputs = []
    for tier in tiers.TIERS:
        monkeypatch.setenv("WMTP_TRITON_TIER", tier)
        leaf = logits.clone().requires_grad_()
        loss = fused_weighted_mtp_loss(leaf, target_ids, backend="triton").loss
        (2 * loss).backward()
        outputs.append((loss.detach(), leaf.grad))
    for loss, grad in outputs[1:]:
        torch.testing.assert_close(loss, outputs[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, outputs[0][1], rtol=1e-5, atol=1e-8)


def test_two_runs_give_the_same_bits(device, tier):
    logits, target_ids = make((2, 4, 4, 517), torch.bfloat16, device)
    first, second = (weighted_loss(logits, target_ids) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:-1], second[:-1], strict=True))
    assert torch.equal(first[-1][0], second[-1][0])


def test_a_forced_tier_that_cannot_serve_raises(monkeypatch, device):
    logits, target_ids = make((1, 4, 2, 33), torch.float32, device)
    monkeypatch.setenv("WMTP_TRITON_TIER", "row")
    with pytest.raises(ValueError, match="need all rows of a token"):
        weighted_loss(logits, target_ids, ref_ce=torch.zeros(1, 3, device=device))
    monkeypatch.setenv("WMTP_TRITON_TIER", "fastest")
    with pytest.raises(ValueError, match="must be one of token, row, online, got 'fastest'"):
        weighted_loss(logits, target_ids)


# In four parts; in two, the last of them of odd length.
@pytest.mark.parametrize(
    ("dtype", "vocabulary"), [(torch.float32, 32_768), (torch.bfloat16, 33_333)]
)
def test_few_rows_are_split(device, monkeypatch, dtype, vocabulary):
    monkeypatch.setenv("WMTP_TRITON_TIER", "online")
    monkeypatch.setattr(tiers, "machine", lambda _: tiers.Machine(32, 64))
    logits, target_ids = make((1, 3, 2, vocabulary), dtype, device, ignored=0.0)
    target_ids[0, 1] = vocabulary - 1
    logits[0, 0, 0, :20_000] = -INF  # whole parts, and some of the next
    for options in ({}, {"ref_ce": torch.rand(1, 2).to(device)}):
        new = assert_loss_and_gradient(logits, target_ids, **options)
    inplace = logits.clone()
    grad = assert_loss_and_gradient(inplace, target_ids, gradient="inplace", **options)
    assert torch.equal(grad, new)
    rows = logits[:, :, :1]
    assert_loss_and_gradient(rows.expand(-1, -1, 3, -1), target_ids, shared=True)
    masked = target_ids.clone()
    masked[0, 1] = IGNORED  # the first head's, while a later one has a target
    assert_loss_and_gradient(rows.expand(-1, -1, 3, -1), masked, shared=True)
    logits[0, 0, 0, -1] = NAN
    *found, _, _, _ = weighted_loss(logits, target_ids, gradient="none")
    assert_close(found, truth(logits, target_ids)[:4])


@pytest.mark.parametrize(
    ("programs", "vocabulary", "wanted"),
    [(1, 256_000, 8), (1, 32_000, 1), (16, 256_000, 8), (40, 256_000, 2), (132, 256_000, 1)],
)
def test_into_how_many_parts(programs, vocabulary, wanted):
    assert tiers.splits(vocabulary, 2, programs, tiers.Machine(32, 132)) == wanted


# (itemsize, rows of a token, excess): V -> tier and warps, by hand, of an H100 and H = 4.
CHOSEN = {
    (4, 4, False): {1000: "row 1", 8000: "row 4", 32000: "row 16", 50257: "online 32"},
    (2, 4, False): {
        **{1000: "row 1", 8000: "row 4", 16000: "online 8", 32000: "online 16"},
        **{50257: "online 16", 128256: "online 32", 256000: "online 32"},
    },
    (2, 1, True): {1000: "row 1", 16000: "online 8", 128256: "online 32"},  # shared
    (4, 4, True): {1000: "token 4", 8000: "token 8", 16000: "online 32"},
    (2, 4, True): {1000: "online 2", 16000: "online 8", 32000: "online 32"},
}


@pytest.mark.parametrize("case", CHOSEN)
def test_what_is_chosen(case):
    (itemsize, rows, excess), machine = case, tiers.Machine(32, 132)
    for vocabulary, wanted in CHOSEN[case].items():
        found = tiers.choose(vocabulary, 4, rows, itemsize, excess, True, machine)
        assert f"{found.tier} {found.num_warps}" == wanted, vocabulary
        once = tiers.choose(vocabulary, 4, rows, itemsize, excess, False, machine)
        assert (once.tier, once.num_warps) <= ("online", 8)


def test_a_larger_l2_lets_two_programs_share_an_sm():
    for l2_bytes, warps in ((50 << 20, 32), (126 << 20, 16)):
        machine = tiers.Machine(32, 148, l2_bytes)
        assert tiers.choose(128256, 4, 4, 2, False, True, machine).num_warps == warps


@pytest.mark.parametrize("hip", [None, "7.0"])
def test_what_a_machine_is(monkeypatch, hip):
    properties = types.SimpleNamespace(
        multi_processor_count=84, warp_size=64 if hip else 32, L2_cache_size=6 << 20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    wanted = tiers.Machine(64 if hip else 32, 84, 6 << 20, hip is None)
    assert tiers.machine(torch.device("cuda:1")) == wanted


@pytest.mark.gpu
def test_a_graph_captures_loss_and_gradient(tier):
    logits, target_ids = make((2, 9, 4, 517), torch.bfloat16, "cuda")
    leaf = logits.clone().requires_grad_()

    def step():
        loss = fused_weighted_mtp_loss(leaf, target_ids).loss
        return loss, *torch.autograd.grad(2 * loss, leaf)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(logits.flip(1))
    graph.replay()
    for found, wanted in zip(captured, step(), strict=True):
        assert torch.equal(found, wanted)
