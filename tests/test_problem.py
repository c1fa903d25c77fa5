"""The contestants agree: given logits, given hidden states, and those of other people."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from wmtp.benchmarks import providers
from wmtp.benchmarks.problem import LOSS_TOLERANCE, WEIGHTINGS, Problem
from wmtp.benchmarks.providers import FLOORS, LINEAR, Provider, absent

BOTH, FROZEN = FLOORS
DIM = 16
SHAPE = (1, 64, 2, 1000)
COMPILED = [name for name, provider in providers.LOGITS.items() if provider.compiles]
# Those that compile take long, and are compared whenever they are timed.
CONTESTS = [
    (direction, provider)
    for direction, contestants in providers.DIRECTIONS.items()
    for provider in (*contestants, "copy")
    if provider not in COMPILED
] + [("forward+backward", "product")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("direction", "provider"), CONTESTS)
def test_providers_agree(provider, direction, weighting, dtype):
    Problem(SHAPE, dtype).check(provider, direction, weighting)


def test_in_place_rounds_start_from_the_same_logits():
    inputs = Problem(SHAPE, torch.float32)
    call = inputs.call("fused_inplace", "inplace")
    first, gradient = call()
    assert gradient.data_ptr() == inputs.inputs[0].data_ptr()
    inputs.restore()
    torch.testing.assert_close(call()[0], first, rtol=0, atol=0)


def test_cce_is_given_factors_of_logits(monkeypatch):
    def linear_cross_entropy(hidden, classifier, targets, reduction, impl):
        assert (reduction, impl) == ("none", "torch_compile")
        logits = (hidden @ classifier.T).float()
        return F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(
            targets.shape
        )

    module = types.SimpleNamespace(linear_cross_entropy=linear_cross_entropy)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    inputs = Problem(SHAPE, torch.float32)
    inputs.check("cce", "forward")
    _, hidden_gradient, classifier_gradient = inputs.call("cce", "forward+backward")()
    assert (hidden_gradient.shape, classifier_gradient.shape) == ((*SHAPE[:3], 1), (1000, 1))


@pytest.mark.parametrize("provider", providers.UNCOMPILED)
def test_ours_is_one_graph_of_torch_compile_and_agrees(monkeypatch, provider):
    graphs = []

    def compile_counting(loss, **options):
        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        assert options.pop("fullgraph")
        return whole_compile(loss, backend=backend, fullgraph=True, **options)

    whole_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_counting)
    monkeypatch.setattr(providers, "_compiled", providers._compiled.__wrapped__)
    torch._dynamo.reset()
    Problem(SHAPE, torch.float32).check(provider, "forward+backward")
    assert len(graphs) == 1
    operators = [str(node.target) for node in graphs[0].graph.nodes]
    assert any(name.startswith("wmtp.") for name in operators)
    assert any("matmul" in name for name in operators) == (provider == "product_compiled")


def test_a_wrong_gradient_of_a_factor_is_found(monkeypatch):
    def wrong(hidden, classifier, *arguments):
        return providers.product(hidden, 1.1 * classifier.detach() - 0.1 * classifier, *arguments)

    monkeypatch.setitem(providers.LOGITS, "product", Provider(wrong, 16))
    with pytest.raises(AssertionError, match="of the gradient of the classifier"):
        Problem(SHAPE, torch.float32).check("product", "forward+backward")


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_provider_that_disagrees_is_found(monkeypatch, part):
    def wrong(logits, *arguments):
        if part == "loss":
            return providers.eager(logits, *arguments) + 0.01
        return providers.eager(
            torch.cat([logits[..., :-1], logits[..., -1:].detach()], -1), *arguments
        )

    monkeypatch.setitem(providers.LOGITS, "fused", Provider(wrong))
    with pytest.raises(AssertionError, match=f"fused disagrees .* of the {part}"):
        Problem(SHAPE, torch.float32).check("fused", "forward+backward")


# --- hidden states and unembedding ----------------------------------------------------------------


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def linear(dtype=torch.float32):
    return Problem(SHAPE, dtype, dim=DIM)


@DTYPES
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("direction", FLOORS)
@pytest.mark.parametrize("provider", ["eager", "eager_float", "fused"])
def test_linear_providers_agree(provider, direction, weighting, dtype):
    linear(dtype).check(provider, direction, weighting)


@DTYPES
def test_torch_in_chunks_agrees(dtype):
    if why := absent(LINEAR).get("linear_cross_entropy"):
        pytest.skip(why)
    linear(dtype).check("linear_cross_entropy", BOTH, "uniform")


def cut_cross_entropy(hidden, weight, targets, reduction, impl):
    assert (reduction, impl) == ("none", "torch_compile")
    ce = F.cross_entropy((hidden @ weight.T).flatten(0, 2), targets.flatten(), reduction="none")
    return ce.view(targets.shape)


def liger_fused_linear_cross_entropy(x, weight, targets, ignore_index, reduction):
    assert (x.shape, reduction) == ((64 * 2, DIM), "mean")
    return F.cross_entropy(x @ weight.T, targets, ignore_index=ignore_index)


@pytest.mark.parametrize(
    ("provider", "module", "function"),
    [
        ("cce", "cut_cross_entropy", {"linear_cross_entropy": cut_cross_entropy}),
        (
            "liger",
            "liger_kernel.transformers.functional",
            {"liger_fused_linear_cross_entropy": liger_fused_linear_cross_entropy},
        ),
    ],
)
def test_peers_are_called_as_they_take_it(monkeypatch, provider, module, function):
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**function))
    linear().check(provider, BOTH, "uniform")


@pytest.mark.parametrize(
    "part", ["loss", "gradient of the hidden states", "gradient of the weight"]
)
def test_a_linear_provider_that_disagrees_is_found(monkeypatch, part):
    def wrong(hidden, weight, *arguments):
        if part.endswith("states"):
            hidden = torch.cat([hidden[:, :1].detach(), hidden[:, 1:]], 1)
        if part.endswith("weight"):
            weight = torch.cat([weight[:10].detach(), weight[10:]])
        return providers.eager_linear(hidden, weight, *arguments) + 0.01 * (part == "loss")

    monkeypatch.setitem(LINEAR, "fused", Provider(wrong))
    with pytest.raises(AssertionError, match=f"fused disagrees .* of the {part}"):
        linear().check("fused", BOTH, "uniform")


def test_only_torchs_bf16_loss_is_given_more_room():
    assert list(LOSS_TOLERANCE) == [("linear_cross_entropy", torch.bfloat16)]


def test_floors_are_the_products_of_the_rows_with_a_target():
    inputs = linear()
    x, weight = inputs.inputs[0].detach().flatten(0, 2), inputs.inputs[1].detach()
    x = x[torch.arange(len(x)) < 2 * 62 + 1]  # 63 targets of head 0, 62 of head 1
    three = inputs.call("three_products", BOTH)()
    logits = x @ weight.T
    torch.testing.assert_close(three, (logits @ weight, logits.T @ x))
    torch.testing.assert_close(inputs.call("two_products", FROZEN)(), three[:1])
    inputs.check("three_products", BOTH)


def test_frozen_asks_for_one_gradient():
    _, gradient = linear().call("fused", FROZEN)()
    assert gradient.shape == (*SHAPE[:3], DIM)


# --- peers ----------------------------------------------------------------------------------------


def liger_module(factor):
    def liger_cross_entropy(logits, targets, ignore_index):
        return factor * F.cross_entropy(logits, targets, ignore_index=ignore_index)

    return types.SimpleNamespace(liger_cross_entropy=liger_cross_entropy)


def test_peers_are_compared_with_a_mean_cross_entropy(monkeypatch):
    name = "liger_kernel.transformers.functional"
    monkeypatch.setitem(sys.modules, name, liger_module(1.0))
    peer = Problem((1, 8, 2, 50), torch.float32)
    peer.check("liger", "forward", "none")
    peer.check("liger", BOTH, "none")
    peer.call("liger", BOTH, "none")()  # a second round
    _, gradient = peer.call("liger", BOTH, "none")()
    assert gradient.shape == (1, 8, 2, 50)
    # Heads 0 and 1 of 8 tokens: 7 + 6 rows have a target.
    assert (gradient.abs().sum(-1) > 0).sum() == 13
    monkeypatch.setitem(sys.modules, name, liger_module(1.1))
    with pytest.raises(AssertionError, match=r"liger disagrees .* of the loss"):
        peer.check("liger", "forward", "none")


def test_who_cannot_run_here_is_left_out_and_told_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    quick = absent(LINEAR, compiling=False)
    assert set(quick) == {"compiled", "cce", "linear_cross_entropy", "liger"}
    assert absent(LINEAR)["liger"] == "its kernels need a GPU"
    missing = {"somebody": Provider(providers.eager, needs=("no_such_module", "no-such-package"))}
    assert absent(missing) == {"somebody": "no-such-package is not installed"}
    older = {"somebody": Provider(providers.eager, needs=("torch.nn", "torch", "Later"))}
    assert absent(older) == {"somebody": f"torch {torch.__version__} does not have Later"}
