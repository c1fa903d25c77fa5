"""The Triton kernels against the fp64 truth: interpreted here, on the device under `-m gpu`."""

import math
import subprocess
import sys

import pytest
import torch

from support.agreement import (
    GRADIENT_TOLERANCE,
    correctly_rounded,
    kernel_gradient,
    relative_error,
)
from support.backends import row_settings
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
    forward,
    make,
    placed,
    true_gradient,
    truth,
)
from wmtp import fused_weighted_mtp_loss, kernels
from wmtp.labels import shift_to_heads
from wmtp.reference import cross_entropy_per_head


def assert_gradient(logits, target_ids, shared=False):
    """`row_gradient` for a random upstream gradient, no worse than eager torch in that dtype."""
    *_, row_max, log_sum = forward(logits, target_ids)
    row_scalar = torch.randn(logits.shape[:3]).to(logits.device)
    wanted = true_gradient(logits, target_ids, row_scalar)
    eager = true_gradient(logits, target_ids, row_scalar, logits.dtype)
    if shared:
        wanted, eager = wanted.sum(2, keepdim=True), eager.sum(2, keepdim=True)
    grad = kernel_gradient(kernels, logits, target_ids, row_scalar, row_max, log_sum)
    assert grad.is_contiguous()
    assert grad.dtype == logits.dtype
    assert grad.shape == wanted.shape
    allowed = relative_error(eager, wanted) + GRADIENT_TOLERANCE[logits.dtype]
    assert relative_error(grad.cpu(), wanted) <= allowed
    if logits.dtype == torch.bfloat16:
        assert correctly_rounded(grad.cpu(), wanted) >= 0.99
    if not shared:
        valid = shift_to_heads(target_ids, logits.shape[2], IGNORED) != IGNORED
        assert (grad[~valid] == 0).all()


@in_pairs(
    storage=VOCABULARIES,
    weighting=["uniform", "given", "abs", "signed"],
    normalize=[True, False],
)
def test_agrees_with_the_truth(device, storage, weighting, normalize):
    dtype, vocabulary = storage
    logits, target_ids = make((2, 4, 3, vocabulary), dtype, device)
    weights = torch.rand(2, 4, 3).to(device)
    weights[0, 1] = 0.0
    weights[1, 3] = NAN  # nothing follows the last token: its weights are not looked at
    ref_ce = (4 * torch.rand(2, 3)).to(device)
    options = {
        "uniform": {},
        "given": {"weights": weights},
        "abs": {"ref_ce": ref_ce},
        "signed": {"ref_ce": ref_ce, "signed": True},
    }[weighting]
    found = forward(logits, target_ids, normalize=normalize, **options)
    assert_close(found, truth(logits, target_ids, normalize=normalize, **options))


@pytest.mark.parametrize(("dtype", "vocabulary"), VOCABULARIES)
def test_gradient_agrees_with_the_truth(device, dtype, vocabulary):
    assert_gradient(*make((2, 4, 3, vocabulary), dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gpt2_vocabulary(device, dtype):
    logits, target_ids = make((1, 3, 2, 50257), dtype, device, ignored=0.0)
    assert_close(forward(logits, target_ids), truth(logits, target_ids))
    assert_gradient(logits, target_ids)


@pytest.mark.parametrize(("lead", "gap", "heads_first", "vocabulary"), PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_offset_and_stride(device, dtype, vocabulary, lead, gap, heads_first):
    plain, target_ids = make((2, 3, 2, vocabulary), dtype, device)
    logits, _ = placed(plain, lead, gap, heads_first)
    assert_close(forward(logits, target_ids), truth(plain, target_ids))
    reference = logits[:, :, 0]
    found = kernels.next_token_ce(reference, target_ids[:, 1:], row_settings())[:, :-1]
    wanted = cross_entropy_per_head(reference.double().cpu()[:, :, None], target_ids.cpu())
    assert_close([found], [wanted[:, :-1, 0]])
    assert_gradient(logits, target_ids)


@pytest.mark.skipif(not kernels.interpreted(), reason="a device's allocator aligns all storages")
def test_storage_that_is_itself_unaligned():
    plain, target_ids = make((1, 3, 2, 131), torch.float32, "cpu")
    storage = torch.zeros(plain.numel() * 4 + 64, dtype=torch.uint8)
    start = 4 - storage.data_ptr() % 4 + 4
    logits = torch.frombuffer(storage.numpy(), dtype=torch.float32, offset=start)[: plain.numel()]
    logits = logits.view(plain.shape).copy_(plain)
    assert logits.storage_offset() == 0
    assert logits.data_ptr() % 16
    assert_close(forward(logits, target_ids), truth(plain, target_ids))
    assert_gradient(logits, target_ids)


@pytest.mark.parametrize(("dtype", "vocabulary"), SHARED)
def test_shared_heads(device, dtype, vocabulary):
    rows, target_ids = make((2, 5, 1, vocabulary), dtype, device)
    target_ids[0, 1:4] = target_ids[0, 1].clamp(min=0)  # heads that agree on the target
    ref_ce = torch.rand(2, 4).to(device)
    logits = rows.expand(-1, -1, 4, -1)
    found = forward(logits, target_ids, ref_ce=ref_ce)
    assert_close(found, truth(logits, target_ids, ref_ce=ref_ce))
    assert_gradient(logits, target_ids, shared=True)


@pytest.mark.parametrize(("dtype", "vocabulary"), [(torch.float32, 33), (torch.bfloat16, 5000)])
def test_nonfinite_logits_behave_as_in_eager(device, dtype, vocabulary):
    logits, target_ids = make((1, 9, 1, vocabulary), dtype, device, ignored=0.0)
    target_ids[:] = 5
    logits[0, 0, 0, -1] = NAN
    logits[0, 1, 0, 0] = NAN
    logits[0, 2, 0, : vocabulary - 3] = -INF  # whole first blocks
    logits[0, 2, 0, 5] = 1.0
    logits[0, 3] = -INF
    logits[0, 4, 0, 5] = -INF
    logits[0, 5, 0, vocabulary // 2] = INF
    logits[0, 6, 0, 5] = INF
    logits[0, 7, 0, :] = NAN
    *found, ce, row_max, log_sum = forward(logits, target_ids)
    assert_close((*found, ce), truth(logits, target_ids)[:4])
    lse = row_max + log_sum
    assert_close([lse[:, :8]], [logits[:, :8].double().cpu().logsumexp(-1)])
    assert ce[0, :8, 0].isnan().tolist() == [True, True, False, True, False, False, True, True]
    assert ce[0, 4, 0] == ce[0, 5, 0] == lse[0, 5, 0] == INF

    ones = torch.ones_like(lse)
    grad = kernel_gradient(kernels, logits, target_ids, ones, row_max, log_sum)
    grad = grad.cpu().double()
    assert grad[0, [0, 1, 3, 7]].isnan().all()
    finite = true_gradient(logits, target_ids, ones)[0, [2, 4, 5]]
    torch.testing.assert_close(grad[0, [2, 4, 5]], finite, rtol=1e-2, atol=1e-6, equal_nan=True)


def test_nan_in_one_head_makes_the_excess_weights_of_its_token_nan(device):
    logits, target_ids = make((1, 5, 2, 33), torch.float32, device, ignored=0.0)
    logits[0, 1, 1, 7] = NAN
    token_loss, row_scalar, weight_sum, *_ = forward(
        logits, target_ids, ref_ce=torch.zeros(1, 4, device=device)
    )
    for output in (token_loss, row_scalar, weight_sum):
        assert output[0, 1].isnan().all()
        assert output[0, [0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize(("bad", "heads"), [(33, 2), (-1, 2), (2**40, 2), (33, -2)])  # -2: shared
def test_target_out_of_range_gives_nan_and_only_there(device, bad, heads):
    logits, target_ids = make((1, 6, 1 if heads < 0 else heads, 33), torch.float32, device, 0.0)
    logits = logits.expand(-1, -1, abs(heads), -1)
    good = truth(logits, target_ids)
    target_ids[0, 3] = bad
    found = forward(logits, target_ids)
    hit = torch.zeros(1, 6, 2, dtype=torch.bool)
    hit[0, 2, 0] = hit[0, 1, 1] = True  # the two that predict position 3
    for i in (3, 5):  # ce, log_sum
        assert torch.equal(found[i].isnan().cpu(), hit)
        assert_close([found[i].cpu()[~hit]], [good[i][~hit]])
    assert torch.equal(found[0].isnan().cpu(), hit.any(-1))
    grad = kernel_gradient(kernels, logits, target_ids, found[1], *found[4:])
    rows = hit.any(-1, keepdim=True) if heads < 0 else hit
    assert torch.equal(grad.isnan().all(-1).cpu(), rows)
    assert torch.equal(grad.isnan().any(-1).cpu(), rows)


def test_rows_without_a_target_are_not_read(device):
    logits, target_ids = make((2, 6, 3, 100), torch.float32, device, ignored=0.4)
    target_ids[1] = IGNORED
    valid = shift_to_heads(target_ids, 3, IGNORED) != IGNORED
    spoiled = torch.where(valid[..., None], logits, NAN)
    found, wanted = forward(spoiled, target_ids), forward(logits, target_ids)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    scalar = torch.where(valid, 1.0, NAN)
    grad = kernel_gradient(kernels, spoiled, target_ids, scalar, *found[4:])
    assert (grad[~valid] == 0).all()
    assert grad.isfinite().all()
    ref_ce = kernels.next_token_ce(spoiled[:, :, 0], target_ids[:, 1:], row_settings())[:, :-1]
    assert ref_ce.isfinite().all()
    assert (ref_ce[1] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 2, 9), (2, 0, 2, 9), (2, 1, 3, 9), (1, 3, 8, 9)])
def test_short_and_empty_batches(device, shape):
    logits, target_ids = make(shape, torch.float32, device, ignored=0.0)
    found = forward(logits, target_ids)
    assert_close(found, truth(logits, target_ids))
    grad = kernel_gradient(kernels, logits, target_ids, found[1], *found[4:])
    assert grad.shape == shape
    assert grad.isfinite().all()
    ref_ce = kernels.next_token_ce(logits[:, :, 0], target_ids[:, 1:], row_settings())[:, :-1]
    assert ref_ce.shape == (shape[0], max(shape[1] - 1, 0))
    assert ref_ce.isfinite().all()


def test_confident_tokens_keep_their_digits(device):
    """lse - x_target at logits of 3000 would round to multiples of 2e-4."""
    logits = torch.full((1, 3, 1, 100), 3000.0, device=device)
    logits[..., 5] += 12.0
    target_ids = torch.full((1, 3), 5, device=device)
    ce = forward(logits, target_ids)[3][0, :2, 0].cpu().double()
    wanted = math.log1p(99 * math.exp(-12.0))  # 6.1e-4
    assert (ce - wanted).abs().max() < 5e-7


def test_offsets_pass_two_to_the_31(device, tmp_path, monkeypatch):
    """Heads 2^30 elements apart: the third begins at 2^31."""
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
    assert_close(forward(logits, target_ids), truth(plain, target_ids))
    assert_gradient(logits, target_ids)


@pytest.mark.gpu
def test_no_kernel_waits_for_the_device():
    logits, target_ids = make((2, 5, 3, 1000), torch.bfloat16, "cuda")
    heads = [head.clone().requires_grad_() for head in logits.unbind(2)]

    def everything():
        ref_ce = kernels.next_token_ce(logits[:, :, 0], target_ids[:, 1:], row_settings())[:, :-1]
        leaf = logits.detach().requires_grad_()
        found = fused_weighted_mtp_loss(leaf, target_ids, ref_ce=ref_ce)
        (3 * found.loss + found.ce_per_head.mean()).backward()
        (3 * fused_weighted_mtp_loss(leaf * 1, target_ids, inplace=True).loss).backward()
        fused_weighted_mtp_loss(heads, target_ids, normalizer=7).loss.backward()

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_unavailable_names_the_remedy(monkeypatch):
    assert kernels.unavailable() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    assert "TRITON_INTERPRET=1" in kernels.unavailable()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton" in kernels.unavailable()


def test_the_package_imports_without_triton():
    hide = "import sys; sys.modules['triton'] = None; "
    ask = "from wmtp import kernels; assert not hasattr(kernels, 'rows')"
    subprocess.run([sys.executable, "-c", hide + ask], check=True)
