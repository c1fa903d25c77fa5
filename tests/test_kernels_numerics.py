"""What logits and losses may have besides - scale, caps, z-loss, smoothing, padding - and what is
measured: the Triton kernels against the fp64 truth, in every tier."""

from dataclasses import replace

import pytest
import torch

from support.agreement import (
    GRADIENT_TOLERANCE,
    correctly_rounded,
    largest,
    make_case,
    relative_error,
)
from support.backends import row_settings
from support.covering import in_pairs
from support.kernel_outputs import DTYPES, IGNORED, INF, NAN, make
from wmtp import fused_weighted_mtp_loss, kernels
from wmtp.kernels import numerics, tiers
from wmtp.labels import Targets
from wmtp.numerics import PLAIN, Numerics, numerics_of
from wmtp.records import RowInputs
from wmtp.reference import compute_weighted_mtp_loss, row_statistics

OPTIONS = {
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 5.0},
    "sigmoid cap": {"sigmoid_cap": (20.0, 1.5, 4.0), "logit_scale": 1.5},
    "z": {"z_loss": 1e-2},
    "smoothed": {"label_smoothing": 0.2},
    "scale, smoothed, z": {"logit_scale": 2.0, "label_smoothing": 0.1, "z_loss": 1e-3},
    "cap, smoothed": {"softcap": 5.0, "label_smoothing": 0.1},
    "cap, z": {"softcap": 30.0, "z_loss": 1e-3},
    "all": {"sigmoid_cap": (23.0, 5.0, 7.5), "z_loss": 1e-2, "label_smoothing": 0.1},
}
STORAGE = [
    *((torch.float32, 130), (torch.float32, 7), (torch.bfloat16, 1001), (torch.bfloat16, 130)),
    *((torch.float16, 33), (torch.float16, 1000)),
]
LAYOUTS = ["new", "in place", "list", "shared"]


def rule_of(options):
    return numerics_of(**options)


def tolerance(dtype, options):
    """Of a gradient, in its largest entry, beyond eager's own error. A tanh, of which 2e-7 is right
    at a card, becomes that many times the cap."""
    return GRADIENT_TOLERANCE[dtype] + 3e-7 * rule_of(options).amplitude


def loss_and_gradient(function, logits, target_ids, layout, upstream, **options):
    """(result, [B, S, H, V] the gradient of upstream loss, summed over shared heads)."""
    leaf = logits.detach().clone().requires_grad_()
    rows = leaf[:, :, :1].expand(leaf.shape) if layout == "shared" else leaf
    if function is compute_weighted_mtp_loss:
        result = function(rows, target_ids, horizon=rows.shape[2], **options)
    else:
        heads = [*(rows * 1).unbind(2)] if layout == "list" else rows
        inplace = layout == "in place"
        heads = rows * 1 if inplace else heads
        result = function(heads, target_ids, inplace=inplace, backend="triton", **options)
    (grad,) = torch.autograd.grad(result.loss, leaf, upstream.to(result.loss))
    return result, grad


def exact(value):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    value = value.cpu() if isinstance(value, torch.Tensor) else value
    return value.double() if floating else value


def assert_metrics(found, wanted, rtol=2e-5, atol=1e-5):
    for name in ("lse", "entropy"):
        ours, theirs = (getattr(result.metrics, name).double().cpu() for result in (found, wanted))
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
    assert torch.equal(found.metrics.correct.cpu(), wanted.metrics.correct)


def random_upstream(logits):
    """In bfloat16 a power of two, by which what was rounded once stays so."""
    if logits.dtype == torch.bfloat16:
        return torch.tensor(-(2.0 ** torch.randint(-3, 4, ()).item()), device=logits.device)
    return torch.randn((), device=logits.device)


def assert_agrees(logits, target_ids, layout="new", **options):
    upstream = random_upstream(logits)
    arguments = (layout, upstream)
    found, grad = loss_and_gradient(
        fused_weighted_mtp_loss, logits, target_ids, *arguments, **options
    )
    on_cpu = {name: exact(value) for name, value in options.items()}
    truth, true_grad = loss_and_gradient(
        compute_weighted_mtp_loss, exact(logits), target_ids.cpu(), layout, upstream.cpu(), **on_cpu
    )
    _, eager = loss_and_gradient(
        compute_weighted_mtp_loss, logits, target_ids, *arguments, **options
    )
    torch.testing.assert_close(found.loss.double().cpu(), truth.loss, rtol=2e-5, atol=1e-5)
    ours, theirs = found.ce_per_head.double().cpu(), truth.ce_per_head
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5)
    if options.get("metrics"):
        assert_metrics(found, truth)
    numbers = {name: options[name] for name in options.keys() & NUMBERS}
    allowed = relative_error(eager.cpu(), true_grad) + tolerance(logits.dtype, numbers)
    assert relative_error(grad.cpu(), true_grad) <= allowed
    if logits.dtype == torch.bfloat16 and layout != "shared":  # whose parts autograd adds up
        assert correctly_rounded(grad.cpu(), true_grad) >= 0.99
    if (tokens := options.get("vocab_size")) is not None:
        assert (grad[..., tokens:] == 0).all()


NUMBERS = {"logit_scale", "softcap", "sigmoid_cap", "z_loss", "label_smoothing"}
WEIGHTINGS = ["uniform", "given", "abs", "weight_mean", "head_mean"]


def weighted(weighting, shape, device):
    """Arguments that say which pairs count how much."""
    batch, length, heads = shape[:3]
    weights = torch.rand(batch, length, heads)
    weights[0, 1] = 0.0
    return {
        "uniform": {},
        "given": {"head_weights": weights.to(device)},
        "abs": {"ref_ce": (4 * torch.rand(batch, length - 1)).to(device)},
        "weight_mean": {"head_weights": weights.to(device), "reduction": "weight_mean"},
        "head_mean": {"reduction": "head_mean"},
    }[weighting]


def serves(tier, options, storage, weighting, layout, padding, metrics):
    """A row alone does not know excess weights."""
    return tier != "row" or weighting != "abs" or layout == "shared"


@in_pairs(
    tier=tiers.TIERS,
    options=OPTIONS,
    storage=STORAGE,
    weighting=WEIGHTINGS,
    layout=LAYOUTS,
    padding=[0, 3],
    metrics=[False, True],
    where=serves,
)
def test_every_option_agrees_with_the_truth(
    device, tier, options, storage, weighting, layout, padding, metrics
):
    dtype, vocabulary = storage
    shape = (2, 4, 3, vocabulary)
    logits, target_ids = make(shape, dtype, device)
    tokens = vocabulary - padding
    target_ids = torch.where(target_ids >= tokens, 0, target_ids)
    logits[..., tokens:] = NAN
    assert_agrees(
        logits,
        target_ids,
        layout,
        metrics=metrics,
        vocab_size=tokens if padding else None,
        **weighted(weighting, shape, device),
        **OPTIONS[options],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_metrics_of_plain_logits(device, tier, dtype):
    logits, target_ids = make((2, 5, 2, 517), dtype, device)
    assert_agrees(logits, target_ids, metrics=True)
    rows = logits[:, :, :1].expand(-1, -1, 2, -1)
    assert_agrees(rows, target_ids, "shared", metrics=True)


@in_pairs(
    options=["scale, smoothed, z", "cap, smoothed", "all"],
    storage=[(torch.float32, 32_768), (torch.bfloat16, 33_333)],
    layout=["in place", "shared"],
)
def test_few_rows_are_split(device, monkeypatch, options, storage, layout):
    monkeypatch.setenv("WMTP_TRITON_TIER", "online")
    monkeypatch.setattr(tiers, "machine", lambda _: tiers.Machine(32, 64))
    dtype, vocabulary = storage
    logits, target_ids = make((1, 3, 2, vocabulary), dtype, device, ignored=0.0)
    target_ids[0, 1] = vocabulary - 1
    logits[0, 0, 0, -1] = 20.0  # of the last part
    assert_agrees(logits, target_ids, layout, metrics=True, **OPTIONS[options])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["", "sigmoid cap", "scale"])
def test_of_equal_logits_the_first_is_the_largest(device, tier, dtype, options):
    """They lie in edges and between, where a scale or a cap makes others equal to them too."""
    length, vocabulary = 24, 301
    logits = torch.randint(3, (1, length, 1, vocabulary)).to(dtype) + 100
    logits[0, :8, 0, :290] = 0.0
    logits[0, 8:10] = 7.0
    logits = logits.to(device)
    first = logits[0, :, 0].double().cpu().argmax(-1)
    later = (logits[0, :, 0] == logits[0, :, 0].amax(-1, keepdim=True)).double().cpu()
    last = vocabulary - 1 - later.flip(-1).argmax(-1)
    for wanted, target in ((True, first), (False, torch.where(last > first, last, 5))):
        labels = target[None, :, None].to(device)
        how = OPTIONS.get(options, {})
        found = fused_weighted_mtp_loss(logits, labels, metrics=True, backend="triton", **how)
        assert (found.metrics.correct == wanted).all()


def test_the_first_of_a_split_row(device, monkeypatch):
    monkeypatch.setenv("WMTP_TRITON_TIER", "online")
    monkeypatch.setattr(tiers, "machine", lambda _: tiers.Machine(32, 64))
    logits = torch.zeros(1, 6, 1, 33_333, device=device)
    places = torch.tensor([0, 3, 16_700, 17_000, 33_331, 33_332])
    for t, place in enumerate(places):
        logits[0, t, 0, place:] = 1.0
    labels = places[None, :, None].to(device)
    how = {"metrics": True, "backend": "triton"}
    assert fused_weighted_mtp_loss(logits, labels, **how).metrics.correct.all()
    assert not fused_weighted_mtp_loss(logits, (labels + 1) % 33_333, **how).metrics.correct.any()


ROWS_NOT_FINITE = 9


def spoiled(vocabulary, dtype, device):
    """Logits [1, 9, 1, V] of which each position has its own fault, and targets, all of them 5."""
    logits, _ = make((1, ROWS_NOT_FINITE, 1, vocabulary), dtype, device)
    logits[0, 0, 0, -1] = NAN
    logits[0, 1, 0, 0] = NAN
    logits[0, 2, 0, : vocabulary - 3] = -INF  # whole first blocks
    logits[0, 2, 0, 5] = 1.0
    logits[0, 3] = -INF
    logits[0, 4, 0, 5] = -INF
    logits[0, 5, 0, vocabulary // 2] = INF
    logits[0, 6, 0, 5] = INF
    logits[0, 7, 0, :] = NAN
    return logits, torch.full((1, ROWS_NOT_FINITE, 1), 5, device=device)


@pytest.mark.parametrize("options", ["", *OPTIONS])
@pytest.mark.parametrize(("dtype", "vocabulary"), [(torch.float32, 33), (torch.bfloat16, 1300)])
def test_nonfinite_logits_behave_as_in_eager(device, tier, options, dtype, vocabulary):
    logits, labels = spoiled(vocabulary, dtype, device)
    how = OPTIONS.get(options, {}) | {"metrics": True, "reduction": "sum"}
    leaf = logits.clone().requires_grad_()
    found = fused_weighted_mtp_loss(leaf, labels, backend="triton", **how)
    found.loss.backward()
    truth = compute_weighted_mtp_loss(exact(logits), labels.cpu(), horizon=1, **how)
    ours, theirs = found.ce_per_head.double().cpu(), truth.ce_per_head
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5, equal_nan=True)
    assert_metrics(found, truth)
    for t in range(ROWS_NOT_FINITE):  # a NaN of one row would be a NaN of the loss of all
        row = exact(logits[:, t : t + 1]).requires_grad_()
        alone = compute_weighted_mtp_loss(row, labels[:, t : t + 1].cpu(), horizon=1, **how)
        (wanted,) = torch.autograd.grad(alone.loss, row)
        grad = leaf.grad[:, t : t + 1].double().cpu()
        torch.testing.assert_close(grad, wanted, rtol=1e-2, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("options", ["", *OPTIONS])
def test_what_has_no_weight_spoils_nothing(device, tier, options):
    logits, labels = spoiled(100, torch.float32, device)
    weights = torch.zeros(1, ROWS_NOT_FINITE, 1, device=device)
    weights[0, -1] = 1.0
    leaf = logits.requires_grad_()
    how = OPTIONS.get(options, {}) | {"metrics": True, "backend": "triton"}
    for reduction in ("token_mean", "sum"):
        found = fused_weighted_mtp_loss(leaf, labels, weights, reduction=reduction, **how)
        (grad,) = torch.autograd.grad(found.loss, leaf)
        assert found.loss.isfinite()
        assert (grad[0, :-1] == 0).all()
        assert grad[0, -1].isfinite().all()


@pytest.mark.parametrize("options", ["all", "scale, smoothed, z"])
def test_a_target_out_of_range_gives_nan_and_only_there(device, tier, options):
    """Of padding, too."""
    logits, _ = make((1, 4, 1, 40), torch.float32, device)
    labels = torch.tensor([3, 33, 5, 39], device=device)[None, :, None]
    settings = row_settings(numerics=rule_of(OPTIONS[options]), vocab_size=33, metrics=True)
    settings = replace(settings, ignore_index=IGNORED)
    rows, scalars = logits[0, :, 0], torch.ones(4, device=device)
    found = kernels.rows_ce_(
        rows[:, :33], labels[0, :, 0], scalars, replace(settings, vocab_size=None)
    )
    hit = torch.tensor([False, True, False, True])
    for value in (found.ce, found.row_loss, found.log_sum, found.entropy):
        assert torch.equal(value.isnan().cpu(), hit)
    assert not found.correct.cpu()[hit].any()
    assert torch.equal(rows[:, :33].isnan().all(-1).cpu(), hit)
    assert torch.equal(rows[:, :33].isnan().any(-1).cpu(), hit)


@in_pairs(options=OPTIONS, storage=STORAGE, shared=[False, True], padding=[0, 2])
def test_gradient_of_the_rows_losses(device, options, storage, shared, padding):
    """`row_gradient`, of scalars of any sign."""
    dtype, vocabulary = storage
    logits, target_ids = make((2, 4, 3, vocabulary), dtype, device)
    tokens = vocabulary - padding
    target_ids = torch.where(target_ids >= tokens, 0, target_ids)
    if shared:
        logits = logits[:, :, :1].expand(-1, -1, 3, -1)
    rule, scalars = rule_of(OPTIONS[options]), torch.randn(2, 4, 3)
    targets = Targets(target_ids.cpu(), 4, 3, IGNORED)

    def truth(dtype):
        leaf = logits.detach().cpu().to(dtype).requires_grad_()
        rows = row_statistics(leaf, targets, rule, tokens)
        (grad,) = torch.autograd.grad((scalars.to(rows.row_loss) * rows.row_loss).sum(), leaf)
        grad = grad.double()
        return grad.sum(2, keepdim=True) if shared else grad

    wanted, eager = truth(torch.float64), truth(dtype)
    x = rule.x_of(logits[..., :tokens].double().cpu())
    valid = targets.valid()
    row_max = torch.where(valid, x.amax(-1), 0.0).float().to(device)
    log_sum = torch.where(valid, (x - x.amax(-1, keepdim=True)).logsumexp(-1), 0.0)
    log_sum = log_sum.float().to(device)
    rows = RowInputs(logits, target_ids[:, 1:], row_max, log_sum, scalars.to(device))
    how = row_settings(numerics=rule, vocab_size=tokens if padding else None)
    grad = kernels.row_gradient(rows, how)[..., :tokens].cpu()
    allowed = relative_error(eager, wanted) + tolerance(dtype, OPTIONS[options])
    assert relative_error(grad, wanted[..., :tokens]) <= allowed


@in_pairs(options=["scale", "cap, z", "all"], dtype=DTYPES, metrics=[False, True])
def test_rows_of_a_chunk(device, options, dtype, metrics):
    """`rows_ce_`: all that rows leave, and their gradient where they were."""
    logits = (3 * torch.randn(5, 136)).to(device, dtype)[:, 2:-1]
    target_ids, scalars = torch.randint(133, (5,)), torch.randn(5)
    rule = rule_of(OPTIONS[options])
    leaf = exact(logits).detach()[None, :, None].requires_grad_()
    targets = Targets(target_ids[None, :, None], 5, 1, -1)
    wanted = row_statistics(leaf, targets, rule, None, metrics)
    (grad,) = torch.autograd.grad((scalars[None, :, None] * wanted.row_loss).sum(), leaf)
    how = row_settings(numerics=rule, metrics=metrics)
    found = kernels.rows_ce_(logits, target_ids.to(device), scalars.to(device), how)
    pairs = [(found.ce, wanted.ce)]
    assert found.row_loss.numel() == (5 if rule.adds_terms else 0)
    if rule.adds_terms:
        pairs.append((found.row_loss, wanted.row_loss))
    if metrics:
        pairs.append((found.entropy, wanted.entropy))
        pairs.append((found.row_max + found.log_sum, wanted.lse))
        assert torch.equal(found.correct.cpu(), wanted.correct.flatten())
    for ours, theirs in pairs:
        ours, theirs = ours.double().cpu(), theirs.detach().flatten()
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5)
    error = relative_error(logits.cpu(), grad[0, :, 0])
    assert error <= 2 * tolerance(dtype, OPTIONS[options])


def test_a_reference_may_be_capped_and_padded(device):
    case = make_case((2, 5, 1, 70), device=device)
    rule = numerics_of(softcap=4.0)
    how = row_settings(numerics=rule, vocab_size=61)
    ids = case.target_ids.where(case.target_ids < 61, 0)
    found = kernels.next_token_ce(case.logits[:, :, 0], ids[:, 1:], how)[:, :-1]
    targets = Targets(ids.cpu(), 5, 1, IGNORED)
    wanted = row_statistics(exact(case.logits), targets, rule, 61).ce[:, :-1, 0]
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"softcap": 500.0}, {"logit_scale": 0.7}])
def test_where_the_target_is_certain_its_gradient_is_exactly_0(device, tier, options):
    logits = torch.zeros(1, 4, 2, 100, device=device)
    logits[..., 5] = 300.0
    leaf, target_ids = logits.requires_grad_(), torch.full((1, 4), 5, device=device)
    loss = fused_weighted_mtp_loss(leaf, target_ids, backend="triton", **options).loss
    loss.backward()
    assert loss == 0
    assert (leaf.grad == 0).all()


def test_beyond_the_cap_the_slope_keeps_its_digits(device, tier):
    """1 - tanh^2 of 8 is 4.5e-7, of which eager's float32 has no digit."""
    logits = torch.randn(1, 3, 1, 100, device=device) + 16
    target_ids = torch.randint(100, (1, 3), device=device)
    how = {"softcap": 2.0}
    upstream = torch.ones((), device=device)
    arguments = (logits, target_ids, "new", upstream)
    _, grad = loss_and_gradient(fused_weighted_mtp_loss, *arguments, **how)
    arguments = (exact(logits), target_ids.cpu(), "new", upstream.cpu())
    _, wanted = loss_and_gradient(compute_weighted_mtp_loss, *arguments, **how)
    assert 0 < largest(wanted) < 1e-6
    torch.testing.assert_close(grad.double().cpu(), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("options", [{"logit_scale": 1000.0}, {"z_loss": 1.0}])
def test_steep_float16_gradients_do_not_overflow(device, tier, options):
    logits, target_ids = make((2, 4, 2, 130), torch.float16, device, ignored=0.0)
    logits *= 100
    leaf = logits.requires_grad_()
    how = {"head_weights": torch.full((2, 4, 2), 50.0, device=device), "reduction": "sum"}
    loss = fused_weighted_mtp_loss(leaf, target_ids, backend="triton", **how, **options).loss
    (grad,) = torch.autograd.grad(loss, leaf, 1e-4 * torch.ones_like(loss))
    row = exact(logits).requires_grad_()
    how["head_weights"] = exact(how["head_weights"])
    truth = compute_weighted_mtp_loss(row, target_ids.cpu(), horizon=2, **how, **options).loss
    (wanted,) = torch.autograd.grad(1e-4 * truth, row)
    assert relative_error(grad.cpu(), wanted) <= 2e-3


def test_rows_without_a_target_are_not_read(device, tier):
    logits, target_ids = make((2, 6, 3, 100), torch.float32, device, ignored=0.4)
    target_ids[1] = IGNORED
    valid = Targets(target_ids, 6, 3, IGNORED).valid()
    leaf = torch.where(valid[..., None], logits, NAN).requires_grad_()
    how = OPTIONS["all"] | {"metrics": True, "backend": "triton"}
    found = fused_weighted_mtp_loss(leaf, target_ids, **how)
    (grad,) = torch.autograd.grad(found.loss, leaf)
    assert (grad[~valid] == 0).all()
    for value in (*found[2:], found.metrics.lse, found.metrics.entropy, found.metrics.correct):
        assert (value[~valid] == 0).all()
        assert value.isfinite().all()


def test_the_form_says_what_a_binary_has():
    assert numerics.form_of(PLAIN) == 0
    assert numerics.is_plain(numerics.form_of(numerics_of(logit_scale=2.0)))
    assert not numerics.is_plain(numerics.form_of(PLAIN, metrics=True))
    everything = Numerics(1.0, 0.0, 2.0, 0.0, 0.1, 0.1)
    assert numerics.form_of(everything, metrics=True) == 2 + 4 + 8 + 16
    assert [numerics.tiles_of(form) for form in (0, 4 + 16, 2, 2 + 4, 2 + 4 + 16)] == [
        1,
        1,
        2,
        2,
        4,
    ]
