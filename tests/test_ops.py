"""The registered operators: torch's own checks, and whole graphs through torch.compile."""

import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from support.agreement import make_case, operator_call
from support.backends import FUSED_ON_CPU, row_settings
from support.covering import in_pairs
from wmtp import fused_weighted_mtp_loss, mtp_cross_entropy, next_token_cross_entropy
from wmtp.arguments import loss_inputs
from wmtp.backends import cpu
from wmtp.records import Inputs, Settings, flat
from wmtp.reference import max_and_log_sum
from wmtp.weightings import Excess, Given, Uniform


def loss_arguments(weighting, backend, shape=(2, 4, 2, 9), reduction="token_mean", normalizer=None):
    """`weighted_loss`'s, but for shared_heads, ahead and inplace."""
    case = make_case(shape, weighting=weighting)
    weights, ref_ce = map(case.options.get, ("head_weights", "ref_ce"))
    rule = Uniform() if weights is None else Given(weights)
    if ref_ce is not None:
        rule = Excess(ref_ce)
    call = operator_call(case.logits, case.target_ids, rule, reduction, normalizer)
    inputs = loss_inputs(call, torch.float32)
    settings = {"reduction": call.terms.reduction, "ignore_index": -100, "backend": backend}
    return Inputs(logits=[case.logits], **inputs), Settings(rule=rule.key(), **settings)


@pytest.mark.parametrize(
    ("backend", "ahead"),
    [("cpu", True), *((backend, False) for backend in FUSED_ON_CPU)],
)
@pytest.mark.parametrize("weighting", ["uniform", "given", "ref_ce"])
def test_opcheck_weighted_loss(backend, ahead, weighting):
    inputs, settings = loss_arguments(weighting, backend)
    for tensor in (*inputs.logits, inputs.head_weights):
        if tensor is not None:
            tensor.requires_grad_()
    settings.gradient = "new" if ahead else "none"
    torch.library.opcheck(torch.ops.wmtp.weighted_loss.default, tuple(flat(inputs, settings)))


@pytest.mark.parametrize("reduction", ["weight_mean", "sum"])
def test_opcheck_weighted_loss_with_a_normalizer(reduction):
    inputs, settings = loss_arguments(
        "given", "cpu", reduction=reduction, normalizer=torch.tensor(5.0)
    )
    inputs.logits[0].requires_grad_()
    settings.gradient = "new"
    torch.library.opcheck(torch.ops.wmtp.weighted_loss.default, tuple(flat(inputs, settings)))


def test_opcheck_a_list_of_heads():
    inputs, settings = loss_arguments("given", "cpu")
    inputs.logits = [head.clone().requires_grad_() for head in inputs.logits[0].unbind(2)]
    settings.gradient = "new"
    torch.library.opcheck(torch.ops.wmtp.weighted_loss.default, tuple(flat(inputs, settings)))


def test_opcheck_shared_heads():
    inputs, settings = loss_arguments("given", "cpu", (2, 4, 1, 9))
    inputs.logits = [inputs.logits[0].expand(-1, -1, 3, -1)]
    inputs.head_weights = torch.rand(2, 4, 3)
    settings.gradient, settings.shared_heads = "new", True
    torch.library.opcheck(torch.ops.wmtp.weighted_loss.default, tuple(flat(inputs, settings)))


@pytest.mark.parametrize("backend", FUSED_ON_CPU)
def test_opcheck_the_others(backend):
    case = make_case((2, 4, 2, 9))
    of_rows = (*max_and_log_sum(case.logits), torch.rand(2, 4, 2))
    how = flat(row_settings(backend=backend))
    rows = (case.logits, case.target_ids, *of_rows)
    torch.library.opcheck(torch.ops.wmtp.row_gradient.default, (*rows, *how))
    one_head = (case.logits[:, :, 0].contiguous(), case.target_ids)
    torch.library.opcheck(torch.ops.wmtp.next_token_ce.default, (*one_head, *how))


@pytest.fixture
def kernel_calls(monkeypatch):
    """One entry for each pass of the C++ kernel: whether it wrote a gradient."""
    calls, run = [], cpu._run

    def counted(inputs, settings, gradient):
        calls.append(gradient.memory is not None)
        return run(inputs, settings, gradient)

    monkeypatch.setattr(cpu, "_run", counted)
    return calls


def compilers():
    def as_it_is(function):
        return function

    def aot_eager(function):
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    def inductor(function):
        return torch.compile(function, fullgraph=True)

    return [as_it_is, aot_eager, inductor]


@in_pairs(compiler=compilers(), dtype=[torch.float32, torch.float16], weighting=["given", "ref_ce"])
def test_loss_and_gradient_are_one_pass(kernel_calls, compiler, dtype, weighting):
    case = make_case((2, 5, 3, 20), dtype, weighting)
    logits = case.logits.requires_grad_()
    step = compiler(
        lambda x: 0.5 * fused_weighted_mtp_loss(x * 1, case.target_ids, **case.options).loss
    )
    for _ in range(2):
        step(logits).backward()
    assert kernel_calls == [True, True]


@pytest.mark.parametrize("compiler", compilers(), ids=lambda f: f.__name__)
def test_a_loss_without_gradient_writes_none(kernel_calls, compiler):
    case = make_case((2, 5, 3, 20))
    step = compiler(lambda x: fused_weighted_mtp_loss(x, case.target_ids).loss)
    step(case.logits)
    with torch.no_grad():
        step(case.logits.requires_grad_())
    assert kernel_calls == [False, False]


@pytest.mark.parametrize("compiler", compilers(), ids=lambda f: f.__name__)
def test_cross_entropies_write_their_gradient_in_backward(kernel_calls, compiler):
    case = make_case((2, 5, 3, 20))
    step = compiler(lambda x: mtp_cross_entropy(x, case.target_ids).square().sum())
    step(case.logits.requires_grad_()).backward()
    assert kernel_calls == [False, True]


@pytest.mark.parametrize("shared_heads", [False, True])
@pytest.mark.parametrize("weighting", ["uniform", "given", "ref_ce", "ref_logits"])
def test_compiles_as_one_graph(weighting, shared_heads):
    def step(hidden, weight, target_ids, options):
        logits = hidden @ weight.T
        if shared_heads:
            logits = logits[:, :, :1].expand(-1, -1, 3, -1)
        return fused_weighted_mtp_loss(logits, target_ids, **options).loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 5, 3, 20), (2, 7, 3, 20)):
        case = make_case(shape, weighting=weighting)
        results = []
        for function in (step, compiled):
            hidden = torch.randn(
                *shape[:3], 8, requires_grad=True, generator=torch.Generator().manual_seed(1)
            )
            weight = torch.linspace(-1, 1, 160).reshape(20, 8).requires_grad_()
            loss = function(hidden, weight, case.target_ids, case.options)
            results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
        for eager, compiled_result in zip(*results, strict=True):
            torch.testing.assert_close(compiled_result, eager)


def test_inductor_compiles_loss_and_gradient():
    case = make_case((2, 5, 3, 20), torch.bfloat16, "ref_ce")

    def step(logits):
        return fused_weighted_mtp_loss(logits * 2, case.target_ids, **case.options).loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        logits = case.logits.clone().requires_grad_()
        loss = function(logits)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.fixture
def graphs():
    """A compiler that counts what it compiles."""
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", ["temperature", "normalizer"])
def test_annealing_compiles_two_graphs_at_most(graphs, name, as_tensor):
    case = make_case((2, 5, 3, 20), weighting="ref_ce")

    def loss_of(logits, value):
        options = {**case.options, name: value}
        return fused_weighted_mtp_loss(logits, case.target_ids, **options).loss

    compiled = torch.compile(loss_of, fullgraph=True, backend=graphs)
    for value in torch.linspace(0.5, 3.5, 12).tolist():
        given = torch.tensor(value) if as_tensor else value
        logits = case.logits.clone().requires_grad_()
        loss = compiled(logits, given)
        torch.testing.assert_close(loss, loss_of(logits, value), rtol=1e-6, atol=1e-6)
        loss.backward()
    assert graphs.frame_count <= 2


def test_a_list_of_heads_of_any_length_compiles(graphs):
    """As one graph for all lengths, and with the gradients of the list as it is."""

    def loss_of(target_ids, *heads):
        return fused_weighted_mtp_loss(list(heads), target_ids).loss

    compiled, counts = torch.compile(loss_of, fullgraph=True, backend=graphs, dynamic=True), []
    for length in (5, 7, 11):
        case = make_case((2, length, 3, 20))
        heads = [head.clone().requires_grad_() for head in case.logits.unbind(2)]
        found, wanted = (
            torch.autograd.grad(function(case.target_ids, *heads), heads)
            for function in (compiled, loss_of)
        )
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
        counts.append(graphs.frame_count)
    assert len(set(counts)) == 1  # the first may be begun anew, when its floats turn out constants


@pytest.mark.parametrize("compiler", compilers()[1:], ids=lambda f: f.__name__)
@pytest.mark.parametrize("upstream", [1.0, -2.5])
def test_a_compiled_gradient_is_multiplied_where_it_stands(monkeypatch, compiler, upstream):
    """And by 1 not at all: that is seen when it runs, not when it is traced."""
    case = make_case((2, 5, 3, 20), weighting="given")
    weights = case.options["head_weights"].requires_grad_()
    leaves = (case.logits.requires_grad_(), weights)

    def loss_of(logits, weights):
        return fused_weighted_mtp_loss(logits * 1, case.target_ids, weights).loss

    wanted = torch.autograd.grad(loss_of(*leaves), leaves, torch.tensor(upstream))
    factors, multiply_ = [], cpu.multiply_
    monkeypatch.setattr(cpu, "multiply_", lambda g, f: factors.append(f.item()) or multiply_(g, f))
    found = torch.autograd.grad(compiler(loss_of)(*leaves), leaves, torch.tensor(upstream))
    assert factors == [upstream]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_compiled_loss_may_go_backward_twice():
    case = make_case((2, 5, 3, 20))
    compiled = torch.compile(
        lambda x: fused_weighted_mtp_loss(x * 1, case.target_ids).loss, backend="aot_eager"
    )
    logits = case.logits.requires_grad_()
    loss = compiled(logits) * 3
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)


def test_an_upstream_gradient_of_0_leaves_nothing_of_a_nan():
    """Compiled as it is uncompiled: in the first backward, and in those that make it anew."""
    case = make_case((2, 5, 3, 20), weighting="ref_ce")
    case.options["ref_ce"][0, 2] = float("nan")
    logits = case.logits.requires_grad_()
    compiled = torch.compile(
        lambda x: fused_weighted_mtp_loss(x * 1, case.target_ids, **case.options).loss,
        backend="aot_eager",
    )
    loss = compiled(logits)
    for _ in range(2):
        zero = torch.tensor(0.0)
        (gradient,) = torch.autograd.grad(loss, logits, zero, retain_graph=True)
        assert not gradient.any()


def test_a_gradient_that_waits_goes_with_its_graph():
    case = make_case((2, 5, 3, 20))
    waiting = []

    def watched(*arguments):
        outputs = weighted_loss(*arguments)
        waiting.append(weakref.ref(outputs.grad.untyped_storage()))
        return outputs

    weighted_loss = cpu.weighted_loss
    compiled = torch.compile(
        lambda x: fused_weighted_mtp_loss(x * 1, case.target_ids).loss, backend="aot_eager"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "weighted_loss", watched)
        loss = compiled(case.logits.requires_grad_())
    assert waiting[0]() is not None
    del loss
    assert waiting[0]() is None


def test_inplace_inside_compiled_code_is_refused():
    case = make_case((1, 4, 2, 9))

    @torch.compile(backend="eager", fullgraph=True)
    def step(logits):
        return fused_weighted_mtp_loss(logits, case.target_ids, inplace=True).loss

    with pytest.raises(Exception, match="inplace"):
        step(case.logits)


def test_reference_compiles_too():
    case = make_case((2, 5, 1, 20))
    compiled = torch.compile(next_token_cross_entropy, fullgraph=True, backend="aot_eager")
    logits = case.logits[:, :, 0]
    torch.testing.assert_close(
        compiled(logits, case.target_ids), next_token_cross_entropy(logits, case.target_ids)
    )


def test_eager_goes_through_torch_func():
    case = make_case((1, 6, 2, 40))

    def eager(logits):
        return fused_weighted_mtp_loss(logits, case.target_ids, backend="eager").loss

    found = torch.func.grad(eager)(case.logits)
    (expected,) = torch.autograd.grad(eager(case.logits.requires_grad_()), case.logits)
    torch.testing.assert_close(found, expected)


def test_a_trace_holds_the_operator_not_its_results():
    case = make_case((1, 6, 2, 40))

    def loss_of(logits):
        return fused_weighted_mtp_loss(logits, case.target_ids, backend="cpu").loss

    traced = make_fx(loss_of)(case.logits)
    assert "wmtp.weighted_loss" in traced.code
    torch.testing.assert_close(traced(case.logits), loss_of(case.logits))
