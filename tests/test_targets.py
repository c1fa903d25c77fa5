"""Targets, masks, documents and divisors in all their combinations: against plain loops, and the
backends against the fp64 truth."""

import os
from functools import partial

import pytest
import torch

from support.batches import FORMS, draw, features, loss_by_hand, targets_by_hand
from support.covering import covering
from wmtp import (
    backends,
    fused_linear_weighted_mtp_loss,
    fused_weighted_mtp_loss,
    linear_next_token_cross_entropy,
    loss_denominator,
    mtp_cross_entropy,
    next_token_cross_entropy,
)
from wmtp.kinds import INTEGER_DTYPES
from wmtp.label_checks import targets_of
from wmtp.labels import Targets
from wmtp.reference import compute_weighted_mtp_loss
from wmtp.weightings import Critic, Excess

# How many are drawn (`make fuzz`: 500); unsaid, those of 400 that hold all pairs of choices.
CASES = int(os.environ.get("WMTP_TARGET_CASES", "0"))
SEEDS = range(CASES) if CASES else covering([features(draw(seed)) for seed in range(400)])
V, D = 17, 5
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:token_mean divides"),
    pytest.mark.filterwarnings("ignore:logits have fewer positions", "ignore:hidden have fewer"),
]


def asked(ids, heads, **options):
    """Of one row of 6 positions, [S, H]."""
    scores = torch.empty(1, 6, heads, 1)
    return targets_of("logits", scores, heads, ids, **options).of_heads()[0].tolist()


IDS = torch.arange(10, 16)[None]
NONE = -100


def test_unshifted_labels_that_go_on():
    assert asked(IDS, 2)[-2:] == [[15, NONE], [NONE, NONE]]
    assert asked(torch.arange(10, 17)[None], 2)[-2:] == [[15, 16], [16, NONE]]
    assert asked(torch.arange(10, 19)[None], 2)[-2:] == [[15, 16], [16, 17]]


def test_shifted_labels():
    assert asked(IDS, 2, shifted=True)[:2] == [[10, 11], [11, 12]]
    assert asked(IDS, 2, shifted=True)[-1] == [15, NONE]
    assert asked(torch.arange(10, 18)[None], 2, shifted=True)[-1] == [15, 16]


def test_offsets():
    assert asked(IDS, 3, offsets=[3, 1, 1])[:3] == [[13, 11, 11], [14, 12, 12], [15, 13, 13]]
    assert asked(IDS, 3, offsets=[3, 1, 1])[3:] == [[NONE, 14, 14], [NONE, 15, 15], [NONE] * 3]
    assert asked(IDS, 2, offsets=[2, 3], shifted=True)[0] == [11, 12]


def test_documents():
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    wanted = [[11, 12], [12, NONE], [NONE, NONE], [14, 15], [15, NONE], [NONE, NONE]]
    assert asked(IDS, 2, document_ids=documents) == wanted
    # Shifted: whoever shifted them has put -100 at a document's end, if he wanted it.
    wanted = [[10, 11], [11, 12], [12, NONE], [13, 14], [14, 15], [15, NONE]]
    assert asked(IDS, 2, document_ids=documents, shifted=True) == wanted
    cut_from = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])  # ids[t] is token t + 1
    wanted = [[10, 11], [11, NONE], [NONE, NONE], [13, 14], [14, 15], [15, NONE]]
    assert asked(IDS, 2, document_ids=cut_from, shifted=True) == wanted


@pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=str)
def test_integers_of_any_kind(dtype):
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    how = {"document_ids": documents, "target_mask": documents, "offsets": [3, 1]}
    found = {name: each.to(dtype) for name, each in how.items() if name != "offsets"}
    for shifted in (False, True):
        wanted = asked(IDS, 2, **how, shifted=shifted)
        assert asked(IDS, 2, **how | found, shifted=shifted) == wanted
    logits, values = torch.randn(1, 6, 2, V), torch.randn(1, 6)
    rule = {"weighting": Critic(values), "position_mask": documents + 1}
    loss = fused_weighted_mtp_loss(logits, documents, document_ids=documents, **rule).loss
    rule["position_mask"] = rule["position_mask"].to(dtype)
    ids = documents.to(dtype)
    assert fused_weighted_mtp_loss(logits, ids, document_ids=ids, **rule).loss == loss


@pytest.mark.parametrize("length", [0, 1, 2])
def test_as_many_tokens_a_row_as_heads(length, target):
    backend, device = target
    logits = torch.randn(2, length, 4, V)
    for tokens in (4, 5):
        ids = torch.randint(V, (2, tokens))
        found = fused_weighted_mtp_loss(logits.to(device), ids.to(device), backend=backend)
        truth = compute_weighted_mtp_loss(logits.double(), ids)
        torch.testing.assert_close(found.loss.double().cpu(), truth.loss, rtol=1e-5, atol=1e-6)
        assert loss_denominator(ids, 4, length=length).item() == found.valid_mask.sum()


def test_equal_ids_are_one_document_whatever_lies_between():
    documents = torch.tensor([[4, 4, 7, 4, 4, 4]])
    assert asked(IDS, 2, document_ids=documents)[1] == [NONE, 13]


def test_masks():
    moves = torch.tensor([[1, 1, 0, 1, 1, 1]])  # with the heads
    assert asked(IDS, 2, target_mask=moves)[:3] == [[11, NONE], [NONE, 13], [13, 14]]
    stays = torch.tensor([[0.0, 0.5, 1, 1, 1, 1]])
    assert asked(IDS, 2, position_mask=stays)[:2] == [[NONE, NONE], [12, 13]]
    by_head = torch.ones(1, 6, 2, dtype=torch.bool)
    by_head[0, 0, 1] = False
    assert asked(IDS, 2, position_mask=by_head)[0] == [11, NONE]


def test_each_heads_own_labels():
    labels = torch.arange(12).view(1, 6, 2)
    assert asked(labels, 2) == labels[0].tolist()
    assert asked(list(labels.unbind(2)), 2) == labels[0].tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_drawn_batch_is_what_the_definition_says(seed):
    case = draw(seed)
    heads = case.shape[2]
    scores = torch.empty(*case.shape, V)
    targets = targets_of("logits", scores, heads, case.target_ids, **case.options)
    found = case.rule.narrowed(targets).of_heads().tolist()
    wanted = targets_by_hand(case)
    assert found == [[[NONE if id is None else id for id in t] for t in b] for b in wanted]
    logits = torch.randn(scores.shape, dtype=torch.float64)
    loss = compute_weighted_mtp_loss(
        logits, case.target_ids, None, heads, weighting=case.rule, **case.options, **case.how
    ).loss
    assert loss.item() == pytest.approx(loss_by_hand(case, logits), rel=1e-6, abs=1e-9)


def ops(backend):
    """Losses of logits [B, S, H, V]: of the tensor, of a list, in place."""
    fused = partial(fused_weighted_mtp_loss, backend=backend)

    def of_list(logits, *arguments, **options):
        return fused(list(logits.unbind(2)), *arguments, **options)

    def in_place(logits, *arguments, **options):
        return fused(logits * 1, *arguments, inplace=True, **options)

    return fused, of_list, in_place


@pytest.mark.parametrize("seed", SEEDS)
def test_backends_agree_with_the_truth(seed, target):
    backend, device = target
    case = draw(seed)
    heads = case.shape[2]
    loss = ops(backend)[seed % 3]
    logits = torch.randn(*case.shape, V)
    options = move({"weighting": case.rule, **case.options, **case.how}, device)
    ids = move({"ids": case.target_ids}, device)["ids"]
    leaf = logits.to(device).requires_grad_()
    found = loss(leaf, ids, **options)
    (gradient,) = torch.autograd.grad(2.5 * found.loss, leaf)
    exact = logits.double().requires_grad_()
    how = {"weighting": case.rule, **case.options, **case.how}
    truth = compute_weighted_mtp_loss(exact, case.target_ids, None, heads, **how)
    (wanted,) = torch.autograd.grad(2.5 * truth.loss, exact)
    torch.testing.assert_close(found.loss.double().cpu(), truth.loss, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(
        found.ce_per_head.double().cpu(), truth.ce_per_head, rtol=2e-5, atol=2e-6
    )
    torch.testing.assert_close(gradient.double().cpu(), wanted, rtol=2e-5, atol=3e-6)
    assert torch.equal(found.valid_mask.cpu(), truth.valid_mask)


def move(options, device):
    """Tensors, and those of the rule."""
    moved = {}
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            value = value.to(device)
        elif isinstance(value, list) and isinstance(value[0], torch.Tensor):
            value = [each.to(device) for each in value]
        elif name == "weighting":
            fields = {
                key: each for key, each in vars(value).items() if isinstance(each, torch.Tensor)
            }
            value = value.with_fields(**move(fields, device))
        moved[name] = value
    return moved


@pytest.mark.parametrize("seed", SEEDS)
def test_the_linear_loss_agrees_with_the_truth(seed):
    case = draw(seed)
    hidden = torch.randn(*case.shape[:3], D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    rule = case.rule
    if isinstance(rule, Excess) and rule.ref_logits is not None:  # whose float32 rounds either way
        rule = rule.with_fields(ref_logits=rule.ref_logits.double())
    how = {"weighting": rule, **case.options, **case.how}
    chunk_bytes = (None, 1, 2000)[seed % 3]
    ours = fused_linear_weighted_mtp_loss(
        hidden, weight, case.target_ids, chunk_bytes=chunk_bytes, **how
    )
    truth = compute_weighted_mtp_loss(
        hidden @ weight.T, case.target_ids, None, case.shape[2], **how
    )
    torch.testing.assert_close(ours, truth)
    for found, wanted in zip(
        torch.autograd.grad(ours.loss, (hidden, weight)),
        torch.autograd.grad(truth.loss, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("seed", SEEDS[::3])
def test_cross_entropies_alone(seed, target):
    backend, device = target
    case = draw(seed)
    options = {
        name: value != 0 if "mask" in name else value for name, value in case.options.items()
    }
    logits = torch.randn(*case.shape, V)
    ids = move({"ids": case.target_ids}, device)["ids"]
    found = mtp_cross_entropy(logits.to(device), ids, **move(options, device), backend=backend)
    wanted = mtp_cross_entropy(logits.double(), case.target_ids, **options, backend="eager")
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("tokens", [6, 7])
def test_a_reference_is_indexed_by_the_token_it_is_about(tokens, target):
    backend, device = target
    ids, logits = torch.randint(V, (2, tokens)), torch.randn(2, 6, V)
    logits_there, ids_there = logits.to(device), ids.to(device)
    wanted = torch.nn.functional.cross_entropy(
        logits[:, : tokens - 1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(2, -1)
    found = next_token_cross_entropy(logits_there, ids_there, backend=backend)
    torch.testing.assert_close(found.cpu(), wanted)
    shifted = next_token_cross_entropy(
        logits_there[:, : tokens - 1], ids_there[:, 1:], shifted=True, backend=backend
    )
    torch.testing.assert_close(shifted.cpu(), wanted)
    hidden, weight = torch.randn(2, 6, D), torch.randn(V, D)
    linear = linear_next_token_cross_entropy(hidden, weight, ids)
    of_logits = next_token_cross_entropy(hidden @ weight.T, ids)
    torch.testing.assert_close(linear, of_logits)
    mask = torch.rand(2, 6) > 0.5
    masked = next_token_cross_entropy(
        logits_there, ids_there, position_mask=mask.to(device), backend=backend
    )
    torch.testing.assert_close(masked.cpu(), wanted * mask[:, : tokens - 1])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_exact(form):
    case = next(case for seed in range(1000) if (case := draw(seed)).form == form and case.options)
    logits = torch.randn(*case.shape, 5, dtype=torch.float64, requires_grad=True)
    ids = case.target_ids
    ids = [each.clamp(max=4) for each in ids] if form == "list" else ids.clamp(max=4)

    def loss(logits):
        return fused_weighted_mtp_loss(logits, ids, **case.options).loss

    assert torch.autograd.gradcheck(loss, logits)


def test_reference_values_of_pairs_that_do_not_count_are_not_read(target):
    backend, device = target
    ids = torch.randint(V, (1, 6), device=device)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]], device=device)
    logits, ref_ce = torch.randn(1, 6, 2, V, device=device), torch.rand(1, 5, device=device)
    how = {"document_ids": documents, "backend": backend}
    clean = fused_weighted_mtp_loss(logits, ids, ref_ce=ref_ce, **how)
    ref_ce = ref_ce.clone()
    ref_ce[0, 2] = float("nan")  # about token 3, the second document's first
    assert torch.equal(fused_weighted_mtp_loss(logits, ids, ref_ce=ref_ce, **how).loss, clean.loss)


def test_stride_0_heads_with_labels_of_their_own(target):
    """One row of logits for all heads, asked for a word's prefix and the word."""
    backend, device = target
    row = torch.randn(2, 5, 1, V, device=device, requires_grad=True)
    labels = torch.randint(V, (2, 5, 3), device=device)
    loss = fused_weighted_mtp_loss(row.expand(-1, -1, 3, -1), labels, backend=backend).loss
    (found,) = torch.autograd.grad(loss, row)
    exact = row.detach().double().cpu().requires_grad_()
    truth = compute_weighted_mtp_loss(exact.expand(-1, -1, 3, -1), labels.cpu(), horizon=3).loss
    (wanted,) = torch.autograd.grad(truth, exact)
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-5, atol=1e-7)


def test_how_often_the_logits_are_read(monkeypatch, target):
    """One pass where the effective scope is a token's, two where weights divide the whole."""
    backend, device = target
    module, passes = backends.BACKENDS[backend], []
    original = module.weighted_loss
    watched = lambda *arguments: passes.append(1) or original(*arguments)  # noqa: E731
    monkeypatch.setattr(module, "weighted_loss", watched)
    logits, ids = torch.randn(1, 6, 2, V, device=device), torch.randint(V, (1, 6), device=device)
    rule = Excess(torch.rand(1, 5, device=device))
    prior, mask = torch.rand(2, device=device), torch.rand(1, 6, device=device) + 0.1

    def count(**how):
        passes.clear()
        fused_weighted_mtp_loss(logits, ids, weighting=rule, backend=backend, **how)
        return len(passes)

    assert count() == count(reduction="sum") == count(reduction="head_mean") == 1
    assert count(head_prior=prior, reduction="pair_mean") == 1
    assert count(position_mask=mask, reduction="sum") == 1
    assert count(position_mask=mask, reduction="weight_mean", normalizer=3.0) == 1
    assert count(position_mask=mask, reduction="weight_mean") == 2
    assert count(head_prior=prior, reduction="token_mean") == 2


def test_no_copy_of_the_ids_where_they_stand_in_a_row():
    ids = torch.randint(V, (2, 7))
    for shifted in (False, True):
        operand = Targets(ids, 6, 2, shifted=shifted).for_operators()
        assert operand.untyped_storage().data_ptr() == ids.untyped_storage().data_ptr()


def test_a_critic_weighs_no_pair_without_a_value():
    logits, ids = torch.randn(1, 6, 2, V), torch.randint(V, (1, 9))
    result = fused_weighted_mtp_loss(logits, ids, weighting=Critic(torch.randn(1, 6)))
    assert result.ce_per_head[0, -1].tolist() == [0, 0]
    assert not result.valid_mask[0, -1]
