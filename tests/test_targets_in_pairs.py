"""Forms of labels beside references, compilation, checkpointing, autocast and opcheck."""

from functools import partial

import numpy
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from wmtp import (
    fused_linear_weighted_mtp_loss,
    fused_weighted_mtp_loss,
    next_token_cross_entropy,
)
from wmtp.arguments import checked_call, loss_inputs
from wmtp.records import Inputs, Settings, flat
from wmtp.reference import compute_weighted_mtp_loss
from wmtp.weightings import Excess

V, D = 17, 5
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:token_mean divides"),
]


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
