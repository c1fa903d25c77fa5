"""inplace=True: the gradient takes the logits' storage, and nobody mistakes it for logits."""

import pytest
import torch
import torch.utils.checkpoint

from support.agreement import GRADIENT_TOLERANCE, largest, make_case
from support.in_place import NOT_TWICE, OVERWRITTEN, TAKEN, cpu_loss, new_logits
from wmtp import fused_weighted_mtp_loss
from wmtp.benchmarks.memory import peak_bytes
from wmtp.checks import FLOAT_DTYPES


@pytest.mark.parametrize("shared", [False, True])
def test_inplace_gradient_takes_the_logits_storage(target, shared):
    backend, device = target
    case = make_case((2, 6, 3, 40), weighting="given", device=device)
    leaf = (case.logits[:, :, :1] if shared else case.logits).contiguous().requires_grad_()

    def run(inplace):
        logits = leaf * 1.0
        expanded = logits.expand(-1, -1, 3, -1)
        loss = fused_weighted_mtp_loss(
            expanded, case.target_ids, **case.options, inplace=inplace, backend=backend
        ).loss
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        return logits, loss, gradient

    _, _, expected = run(inplace=False)
    logits, loss, gradient = run(inplace=True)
    torch.testing.assert_close(gradient, expected)
    scale = 3 if shared else 1  # autograd sums three equal parts
    torch.testing.assert_close(logits.detach() * scale, expected)
    with pytest.raises(RuntimeError, match=TAKEN):
        loss.backward()


@pytest.mark.parametrize("upstream", [1.0, -2.5, 0.0, 1e-3, 65536.0])
@pytest.mark.parametrize("weighting", ["given", "ref_ce"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_any_upstream_gradient(dtype, weighting, upstream):
    case = make_case((2, 6, 3, 40), dtype, weighting)
    leaf = case.logits.requires_grad_()
    gradients = []
    for inplace in (False, True):
        logits = leaf * 1
        loss = cpu_loss(logits, case.target_ids, **case.options, inplace=inplace).loss
        gradients.append(torch.autograd.grad(loss * upstream, logits)[0])
    expected, found = gradients
    assert found.data_ptr() == logits.data_ptr()
    assert torch.count_nonzero(found) or not upstream
    assert largest(found - expected) <= GRADIENT_TOLERANCE[dtype] * largest(expected)


def test_it_takes_no_memory():
    case = make_case((1, 256, 4, 4000), weighting="given")
    leaf = case.logits.requires_grad_()
    for upstream in (1.0, 0.5):
        logits = leaf * 1

        def step(logits=logits, upstream=upstream):
            loss = cpu_loss(logits, case.target_ids, **case.options, inplace=True).loss
            return torch.autograd.grad(loss * upstream, logits)

        assert peak_bytes(step) < 0.01 * leaf.nbytes


@pytest.mark.parametrize("heads_differ", [True, False])
def test_a_view_of_a_layers_output(heads_differ):
    """What a model has: [B, S, H V] seen as [B, S, H, V], or [B, S, V] for all heads."""
    B, S, H, D, V = 2, 6, 3, 8, 40
    hidden = torch.randn(B, S, D, requires_grad=True)
    weight = torch.randn(H * V if heads_differ else V, D, requires_grad=True)
    target_ids = torch.randint(V, (B, S))
    gradients = []
    for inplace in (False, True):
        output = hidden @ weight.T
        view = output.view(B, S, H, V) if heads_differ else output[:, :, None].expand(-1, -1, H, -1)
        loss = cpu_loss(view, target_ids, inplace=inplace).loss
        gradients.append(torch.autograd.grad(loss, (hidden, weight), retain_graph=inplace))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
    for again in (view, output.view(B, S, -1, V), output[..., :V][:, :, None]):
        with pytest.raises(ValueError, match=OVERWRITTEN):
            cpu_loss(again, target_ids)
    with pytest.raises(RuntimeError, match=TAKEN):
        loss.backward()


@pytest.mark.parametrize("hooks", ["identity", "copy", "save_on_cpu"])
def test_under_saved_tensor_hooks(hooks):
    leaf, ids = torch.randn(1, 6, 2, 40, requires_grad=True), torch.randint(40, (1, 6))
    (expected,) = torch.autograd.grad(3 * cpu_loss(leaf, ids).loss, leaf)
    saved = {
        "identity": torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        "copy": torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone),
        "save_on_cpu": torch.autograd.graph.save_on_cpu(),
    }
    with saved[hooks]:
        loss = 3 * cpu_loss(leaf * 1, ids, inplace=True).loss
    (found,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match=TAKEN):
        loss.backward()


@pytest.mark.parametrize("view", [lambda p: p, lambda p: p[:, :], lambda p: p.view(p.shape)])
def test_a_parameter_is_not_overwritten(view):
    logits, ids = torch.nn.Parameter(torch.randn(1, 6, 2, 40)), torch.randint(40, (1, 6))
    values = logits.detach().clone()
    with pytest.raises(ValueError, match="would overwrite a Parameter"):
        cpu_loss(view(logits), ids, inplace=True)
    assert torch.equal(logits, values)


@pytest.mark.parametrize("keep_graph", [False, True])
def test_a_second_backward_is_an_error(keep_graph):
    logits, ids = new_logits(1, 6, 2, 40), torch.randint(40, (1, 6))
    loss = cpu_loss(logits, ids, inplace=True).loss
    loss.backward(retain_graph=keep_graph)
    with pytest.raises(RuntimeError, match=TAKEN):
        loss.backward()


def test_cross_entropies_cannot_be_differentiated_then():
    for of_both in (False, True):
        result = cpu_loss(new_logits(1, 6, 2, 40), torch.randint(40, (1, 6)), inplace=True)
        total = result.ce_per_head.sum() + (result.loss if of_both else 0)
        with pytest.raises(RuntimeError, match=NOT_TWICE):
            total.backward()


def test_nor_can_the_gradient():
    logits = new_logits(1, 6, 2, 40)
    loss = cpu_loss(logits, torch.randint(40, (1, 6)), inplace=True).loss
    with pytest.raises(RuntimeError, match=NOT_TWICE):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("shape", [(0, 6, 2, 40), (2, 1, 2, 40), (2, 0, 2, 40)])
def test_no_token_at_all(target, shape):
    backend, device = target
    leaf = torch.randn(shape, device=device, requires_grad=True)
    ids = torch.zeros(shape[:2], dtype=torch.int64, device=device)
    for logits in (leaf * 1, (leaf.transpose(1, 2).contiguous() * 1).transpose(1, 2)):
        leaf.grad = None
        result = fused_weighted_mtp_loss(logits, ids, inplace=True, backend=backend)
        result.loss.backward()
        assert result.loss == 0
        assert leaf.grad.shape == shape
        assert torch.count_nonzero(leaf.grad) == 0


def test_gradients_of_weights_and_logits_together():
    case = make_case((2, 6, 3, 40), weighting="given")
    weights = case.options["head_weights"].requires_grad_()
    gradients = []
    for inplace in (False, True):
        logits = case.logits.clone().requires_grad_() * 1
        loss = cpu_loss(logits, case.target_ids, weights, inplace=inplace).loss
        gradients.append(torch.autograd.grad(2 * loss, (logits, weights)))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("why", ["no_grad", "detached", "only weights"])
def test_without_a_gradient_nothing_is_overwritten(target, why):
    backend, device = target
    case = make_case((2, 6, 3, 40), weighting="given", device=device)
    weights = case.options["head_weights"].requires_grad_(why == "only weights")
    logits = case.logits.requires_grad_(why == "no_grad")
    before, version = logits.detach().clone(), logits._version
    with torch.set_grad_enabled(why != "no_grad"):
        for _ in range(2):
            loss = fused_weighted_mtp_loss(
                logits, case.target_ids, weights, inplace=True, backend=backend
            ).loss
    if why == "only weights":
        loss.backward()
        assert torch.count_nonzero(weights.grad)
    assert torch.equal(logits, before)
    assert logits._version == version


def test_inside_a_checkpoint():
    """The recomputed logits are new ones."""
    hidden = torch.randn(1, 6, 2, 8, requires_grad=True)
    weight, ids = torch.randn(40, 8, requires_grad=True), torch.randint(40, (1, 6))

    def head(hidden, inplace):
        return cpu_loss(hidden @ weight.T, ids, inplace=inplace).loss

    expected = torch.autograd.grad(head(hidden, False), (hidden, weight))
    loss = torch.utils.checkpoint.checkpoint(head, hidden, True, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("views", [lambda x: x.chunk(2)[0], lambda x: x.unbind(0)[1][None]])
def test_views_that_autograd_will_not_overwrite_are_refused(target, views):
    """Before anything is overwritten; a slice of one's own is fine."""
    backend, device = target
    logits = torch.randn(2, 5, 2, 9, device=device, requires_grad=True) * 1
    before = logits.detach().clone()
    target_ids = torch.randint(9, (1, 5), device=device)
    with pytest.raises(ValueError, match=r"one of several views .* logits\[begin:end\]"):
        fused_weighted_mtp_loss(views(logits), target_ids, inplace=True, backend=backend)
    assert torch.equal(logits, before)
    fused_weighted_mtp_loss(logits[:1], target_ids, inplace=True, backend=backend).loss.backward()
