"""The registered operators: torch's own checks, and whole graphs through torch.compile."""

import pytest
import torch

from agreement import make_case
from wmtp import fused_weighted_mtp_loss, next_token_cross_entropy

BACKENDS = [
    "cpu",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="not interpreted on GPUs"),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighting", ["uniform", "given", "ref_ce"])
def test_opcheck_token_loss(backend, weighting):
    case = make_case((2, 4, 2, 9), weighting=weighting)
    weights = case.options.get("head_weights")
    arguments = (
        case.logits.requires_grad_(),
        case.target_ids,
        None if weights is None else weights.requires_grad_(),
        case.options.get("ref_ce"),
        0.7, False, True, -100, backend, False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.wmtp.token_loss.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_the_others(backend):
    case = make_case((2, 4, 2, 9))
    lse = case.logits.logsumexp(-1)
    rows = (case.logits, case.target_ids, lse, torch.rand(2, 4, 2), -100, backend)
    torch.library.opcheck(torch.ops.wmtp.row_gradient.default, (*rows, False))
    torch.library.opcheck(torch.ops.wmtp.row_gradient_.default, rows)
    torch.library.opcheck(
        torch.ops.wmtp.next_token_ce.default,
        (case.logits[:, :, 0].contiguous(), case.target_ids, -100, backend),
    )


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
