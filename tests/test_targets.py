"""Targets, masks, documents and divisors in all their combinations: against plain loops, and the
backends against the fp64 truth."""

import os
from dataclasses import replace
from functools import partial

import numpy
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

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
    once,
)
from wmtp.arguments import checked_call, loss_inputs
from wmtp.kinds import INTEGER_DTYPES
from wmtp.label_checks import targets_of
from wmtp.labels import Targets
from wmtp.records import Inputs, Settings, flat
from wmtp.reference import compute_weighted_mtp_loss
from wmtp.weightings import Critic, Excess, Uniform

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


FLOATS, ONES = torch.rand(1, 6), torch.tensor([[1.0, 1, 0, 1, 1, 0]])
SAID = "what a float mask says of a position cancels"


@pytest.mark.parametrize(
    ("heads", "how", "message"),
    [
        (2, {"position_mask": FLOATS}, SAID),
        (2, {"target_mask": FLOATS, "reduction": "token_mean"}, SAID),
        (1, {"target_mask": FLOATS}, SAID),
        (1, {"position_mask": FLOATS[..., None]}, SAID),
        (1, {"head_weights": FLOATS[..., None]}, "with one head Given cancels"),
        (1, {"weighting": Critic(FLOATS)}, "with one head Critic cancels"),
        (2, {"target_mask": FLOATS}, None),
        (2, {"position_mask": FLOATS[..., None].expand(1, 6, 2)}, None),
        (2, {"position_mask": FLOATS, "reduction": "pair_mean"}, None),
        (2, {"position_mask": ONES, "reduction": "token_mean"}, None),
        (1, {"position_mask": ONES > 0, "target_mask": ONES}, None),
        (1, {"head_weights": ONES[..., None]}, None),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_cancels_is_said(monkeypatch, heads, how, message):
    monkeypatch.setattr(once, "_said", set())
    logits, ids = torch.randn(1, 6, heads, V), torch.randint(V, (1, 6))
    if message is None:
        fused_weighted_mtp_loss(logits, ids, **how)
        return
    with pytest.warns(RuntimeWarning, match=message) as said:
        fused_weighted_mtp_loss(logits, ids, **how)
    assert said[0].filename == __file__


@pytest.mark.filterwarnings("error:token_mean divides")
def test_compiled_code_says_nothing_of_it(monkeypatch):
    monkeypatch.setattr(once, "_said", set())
    logits, ids = torch.randn(1, 6, 2, V), torch.randint(V, (1, 6))

    def loss(logits):
        return fused_weighted_mtp_loss(logits, ids, position_mask=FLOATS).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(logits)
    assert not once._said
    plain = fused_weighted_mtp_loss(logits, ids, position_mask=FLOATS > 0).loss
    torch.testing.assert_close(compiled, plain)


def test_negative_weights_where_nothing_divides(target):
    backend, device = target
    case = replace(draw(3), rule=Uniform())
    weights = torch.randn(2, 6, 3)
    logits, ids = torch.randn(2, 6, 3, V), torch.randint(V, (2, 6))
    assert case.rule.known
    for how in (
        {"reduction": "sum"},
        {"reduction": "pair_mean"},
        {"reduction": "head_mean"},
        {"reduction": "weight_mean", "normalizer": 4.0},
    ):
        leaf = logits.to(device).requires_grad_()
        found = fused_weighted_mtp_loss(
            leaf, ids.to(device), weights.to(device), backend=backend, **how
        )
        exact = logits.double().requires_grad_()
        truth = compute_weighted_mtp_loss(exact, ids, weights, 3, **how)
        torch.testing.assert_close(found.loss.double().cpu(), truth.loss, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.valid_mask.cpu(), truth.valid_mask)
        (wanted,) = torch.autograd.grad(truth.loss, exact)
        (gradient,) = torch.autograd.grad(found.loss, leaf)
        torch.testing.assert_close(gradient.double().cpu(), wanted, rtol=1e-5, atol=1e-6)
    for how in ({"reduction": "token_mean"}, {"reduction": "weight_mean"}):
        with pytest.raises(ValueError, match=r"finite and >= 0, for their sum divides the loss"):
            fused_weighted_mtp_loss(logits, ids, weights, backend="eager", **how)


BAD = {
    "shifted with own": (
        dict(target_ids=torch.zeros(2, 6, 3).long(), shifted=True),
        "shifted goes",
    ),
    "too few offsets": (
        dict(offsets=[1, 2]),
        r"offsets must be H = 3 whole numbers >= 1 .*, got \(1, 2",
    ),
    "an offset of 0": (dict(offsets=[0, 1, 2]), "offsets must be H = 3"),
    "a mask's shape": (
        dict(target_mask=torch.ones(2, 5)),
        r"target_mask must be \[B, T\] = \(2, 6\)",
    ),
    "a position's": (dict(position_mask=torch.ones(2, 6, 2)), r"position_mask must be \[B, S, H\]"),
    "a negative mask": (dict(position_mask=-torch.ones(2, 6)), r"position_mask\[0, 0\] is -1.0"),
    "documents": (dict(document_ids=torch.zeros(2, 7).long()), r"document_ids must be \[B, T\]"),
    "normalizer [H]": (
        dict(normalizer=torch.ones(3), reduction="sum"),
        "goes with reduction='head_",
    ),
    "T < S": (dict(target_ids=torch.zeros(2, 5).long()), r"target_ids must be \[B, T >= S\]"),
    "[:, 1:]": (
        dict(target_ids=torch.zeros(2, 5).long()),
        r"labels ids\[:, 1:\] with shifted=True",
    ),
    "a negative integer": (
        dict(position_mask=torch.tensor([1, 1, 1, 1, 1, -1]).expand(2, 6)),
        r"position_mask\[0, 5\] is -1: entries must be finite and >= 0",
    ),
    "a mask that learns": (
        dict(target_mask=torch.ones(2, 6, requires_grad=True)),
        "target_mask must be a constant",
    ),
    "a negative normalizer": (
        dict(normalizer=torch.tensor([1, -1, 1]), reduction="head_mean"),
        r"normalizer must be finite and >= 0, got \[1, -1, 1\]",
    ),
    "no normalizer": (
        dict(normalizer=torch.tensor([1.0, float("nan"), 1]), reduction="head_mean"),
        "normalizer must be finite and >= 0",
    ),
    "far offsets": (dict(offsets=[1, 2, 2**63]), "offsets must be H = 3 whole numbers >= 1"),
    "documents of the inputs": (
        dict(target_ids=torch.zeros(2, 7).long(), document_ids=torch.zeros(2, 6).long()),
        r"append those of the 1 tokens beyond the input, e.g. torch.cat\(\(document_ids",
    ),
    "labels of one row": (dict(target_ids=[torch.zeros(6).long()] * 3), r"3 tensors \[B, S\]"),
    "a prior that learns": (
        dict(head_prior=torch.ones(3, requires_grad=True)),
        "must be a constant",
    ),
    "a negative prior": (dict(head_prior=-torch.ones(3)), "head_prior must be finite and >= 0"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("function", [fused_weighted_mtp_loss, compute_weighted_mtp_loss])
def test_bad_targets(bad, message, function):
    arguments = {"logits": torch.randn(2, 6, 3, V), "target_ids": torch.zeros(2, 6).long(), **bad}
    if function is compute_weighted_mtp_loss:
        arguments["horizon"] = 3
    with pytest.raises(ValueError, match=message):
        function(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_documents_are_integers(dtype):
    logits, ids = torch.randn(1, 6, 2, V), torch.randint(V, (1, 6))
    with pytest.raises(TypeError, match=r"document_ids must hold .*: pass document_ids.long\(\)"):
        fused_weighted_mtp_loss(logits, ids, document_ids=ids.to(dtype))


def test_logits_that_lack_an_axis():
    ids = torch.randint(V, (6,))
    with pytest.raises(ValueError, match=r"if they are \[N, H, V\], with logits\[None\]"):
        fused_weighted_mtp_loss(torch.randn(6, 2, V), ids)
    with pytest.raises(ValueError, match=r"pass logits\[None, :, None\] and target_ids\[None\]"):
        fused_weighted_mtp_loss(torch.randn(6, V), ids)
    with pytest.raises(ValueError, match=r"or logits\[None\], if they are \[T, V\]"):
        next_token_cross_entropy(torch.randn(6, V), ids)


def test_a_references_logits_beside_documents_with_the_usual_backend():
    """They are made cross entropies of before, for the operator knows labels in a row alone."""
    logits, ids, reference = torch.randn(1, 6, 2, V), torch.randint(V, (1, 6)), torch.randn(1, 6, V)
    how = {"document_ids": torch.tensor([[0, 0, 0, 1, 1, 1]])}
    ref_ce = next_token_cross_entropy(reference, ids)
    wanted = fused_weighted_mtp_loss(logits, ids, ref_ce=ref_ce, **how).loss
    for found in (
        fused_weighted_mtp_loss(logits, ids, ref_logits=reference, **how),
        compute_weighted_mtp_loss(logits, ids, horizon=2, ref_logits=reference, **how),
    ):
        torch.testing.assert_close(found.loss, wanted)


@pytest.mark.parametrize("op", ["logits", "linear"])
@pytest.mark.parametrize(
    "how",
    [{"head_prior": torch.tensor([0.3, 2.0])}, {"reduction": "weight_mean"}, {"dtype": "float16"}],
    ids=["prior", "weight_mean", "half"],
)
def test_a_references_logits_where_it_takes_two_passes(how, op):
    """The labels stand in a row, so that one pass would make the reference's cross entropies."""
    how = dict(how)
    dtype = getattr(torch, how.pop("dtype", "float32"))
    if dtype == torch.float16:
        how["position_mask"] = torch.rand(1, 6) + 0.1
    ids, reference = torch.randint(V, (1, 6)), torch.randn(1, 6, V)
    states = torch.randn(1, 6, 2, V if op == "logits" else D).to(dtype)
    weight = torch.randn(V, D).to(dtype)

    def loss(**reference):
        if op == "logits":
            return fused_weighted_mtp_loss(states, ids, **reference, **how).loss
        return fused_linear_weighted_mtp_loss(states, weight, ids, **reference, **how).loss

    ref_ce = next_token_cross_entropy(reference, ids)
    torch.testing.assert_close(loss(ref_logits=reference), loss(ref_ce=ref_ce))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_references_logits_beside_labels_that_are_masked(backend):
    """A token that no pair is about need not be one."""
    logits, ids, reference = torch.randn(1, 6, 2, V), torch.randint(V, (1, 6)), torch.randn(1, 6, V)
    kept = torch.tensor([[True, True, True, False, True, True]])
    how = {"ref_logits": reference, "target_mask": kept, "backend": backend}
    wanted = fused_weighted_mtp_loss(logits, ids, **how).loss
    ids = ids.masked_fill(~kept, 999)
    assert torch.equal(fused_weighted_mtp_loss(logits, ids, **how).loss, wanted)
    hidden, weight = torch.randn(1, 6, 2, D), torch.randn(V, D)
    assert fused_linear_weighted_mtp_loss(hidden, weight, ids, **how).loss.isfinite()


OPTIONS = {
    "documents": {"document_ids": torch.arange(6)[None] // 3},
    "masks": {"target_mask": torch.rand(1, 6) > 0.3, "position_mask": torch.rand(1, 6) + 0.1},
    "shifted": {"shifted": True},
    "offsets": {"offsets": [3, 1]},
    "by head": {"reduction": "head_mean", "head_prior": torch.tensor([0.3, 2.0])},
    "pairs": {"reduction": "pair_mean", "head_prior": torch.tensor([0.3, 2.0])},
}


def losses(name):
    """Of [1, 6, 2, V] and of hidden states, and what they are differentiated by."""
    ids, how = torch.randint(V, (1, 6)), OPTIONS[name]
    logits = torch.randn(1, 6, 2, V, requires_grad=True)
    hidden, weight = torch.randn(1, 6, 2, D), torch.randn(V, D, requires_grad=True)
    how = how | {"ref_ce": torch.rand(1, 6 if "shifted" in how else 5)}
    return {
        "logits": (lambda x: fused_weighted_mtp_loss(x, ids, **how).loss, logits),
        "linear": (lambda w: fused_linear_weighted_mtp_loss(hidden, w, ids, **how).loss, weight),
    }


@pytest.mark.parametrize("op", ["logits", "linear"])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_form_in_pairs(name, op):
    """Compiled whole, checkpointed either way, with saved tensors offloaded."""
    loss, leaf = losses(name)[op]
    wanted = torch.autograd.grad(loss(leaf), leaf)[0]

    def gradient(function):
        return torch.autograd.grad(function(leaf), leaf)[0]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    again = partial(checkpoint, loss, use_reentrant=False)
    for found in (gradient(compiled), gradient(again)):
        torch.testing.assert_close(found, wanted)
    with torch.autograd.graph.save_on_cpu():
        value = loss(leaf)
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], wanted)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_form_under_autocast(name):
    loss, weight = losses(name)["linear"]
    wanted = loss(weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(weight)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_numpys_whole_numbers_in_compiled_code():
    logits, ids = torch.randn(1, 6, 2, V), torch.randint(V, (1, 6))
    ids[0, 3] = 7

    def loss(logits):
        return fused_weighted_mtp_loss(logits, ids, ignore_index=numpy.int64(7)).loss

    compiled = torch.compile(loss, backend="aot_eager")  # numpy's numbers break the graph
    torch.testing.assert_close(compiled(logits), loss(logits))


def test_at_most_two_graphs_of_a_list_of_labels_over_twelve_lengths():
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def loss(logits, first, second):
        return fused_weighted_mtp_loss(logits, [first, second]).loss

    for length in range(4, 16):
        loss(torch.randn(1, length, 2, V), *torch.randint(V, (2, 1, length)))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("refers", [False, True])
def test_at_most_two_graphs_over_twelve_lengths(refers):
    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def loss(logits, ids, documents, mask, reference):
        how = {"document_ids": documents, "position_mask": mask, "reduction": "pair_mean"}
        if refers:
            how |= {"ref_logits": reference, "reduction": "weight_mean"}
        return fused_weighted_mtp_loss(logits, ids, **how).loss

    for length in range(4, 16):
        logits, ids = torch.randn(1, length, 2, V), torch.randint(V, (1, length))
        documents, mask = torch.arange(length)[None] // 5, torch.rand(1, length)
        loss(logits, ids, documents, mask, torch.randn(1, length, V))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["documents", "by head"])
def test_opcheck_of_what_a_form_becomes(name):
    ids, how = torch.randint(V, (1, 6)), OPTIONS[name]
    logits = torch.randn(1, 6, 2, V, requires_grad=True)
    how = {"reduction": None, "head_prior": None, **how}
    rule, acc = Excess(torch.rand(1, 5)), torch.float32
    call = checked_call("logits", logits, ids, rule, acc, normalizer=None, horizon=2, **how)
    settings = Settings(
        rule=rule.key(),
        reduction=call.terms.reduction,
        ignore_index=-100,
        backend="cpu",
        gradient="new",
    )
    inputs = Inputs(logits=[logits], **loss_inputs(call.resolved(), acc))
    torch.library.opcheck(torch.ops.wmtp.weighted_loss.default, tuple(flat(inputs, settings)))
