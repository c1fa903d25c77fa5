"""Tensors at addresses that are no multiple of their item size, as torch.frombuffer makes them."""

import pytest
import torch

from support.agreement import make_case
from support.backends import FUSED_ON_CPU
from support.covering import in_pairs
from wmtp import (
    fused_linear_weighted_mtp_loss,
    fused_weighted_mtp_loss,
    linear_next_token_cross_entropy,
    mtp_cross_entropy,
    next_token_cross_entropy,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def misaligned(tensor):
    """The same, half an element further on."""
    offset = tensor.element_size() // 2
    memory = bytearray(tensor.nbytes + offset)
    moved = torch.frombuffer(memory, dtype=tensor.dtype, offset=offset).view(tensor.shape)
    assert moved.data_ptr() % moved.element_size()
    return moved.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def answers(function, arguments, options):
    """What comes out, and the gradients of all that requires one."""
    made = function(*arguments, **options)
    outputs = made if isinstance(made, tuple) else (made,)
    wanted = [value for value in (*arguments, *options.values()) if requires_grad(value)]
    scalars = [value.sum() for value in outputs if value.requires_grad]
    return *outputs, *(torch.autograd.grad(sum(scalars), wanted) if scalars else ())


def requires_grad(value):
    return isinstance(value, torch.Tensor) and value.requires_grad


def problems(dtype):
    """name -> function, its tensors in order, its options."""
    case = make_case((1, 4, 3, 19), dtype, "given")
    ref_ce = make_case((1, 4, 3, 19), dtype, "ref_ce").options["ref_ce"]
    logits, ids, weights = case.logits, case.target_ids, case.options["head_weights"]
    for leaf in (logits, weights):
        leaf.requires_grad_()
    hidden = torch.randn(1, 4, 3, 16).to(dtype).requires_grad_()
    lm_head = torch.randn(19, 16).to(dtype).requires_grad_()
    bias = {"lm_head_bias": torch.randn(19).to(dtype).requires_grad_()}
    one_head, one_hidden = logits.detach()[:, :, 0].contiguous(), hidden.detach()[:, :, 0]
    return {
        "given": (fused_weighted_mtp_loss, (logits, ids, weights), {}),
        "ref_ce": (fused_weighted_mtp_loss, (logits, ids), {"ref_ce": ref_ce}),
        "ref_logits": (fused_weighted_mtp_loss, (logits, ids), {"ref_logits": one_head}),
        "mtp_cross_entropy": (mtp_cross_entropy, (logits, ids), {}),
        "next_token": (next_token_cross_entropy, (one_head, ids), {}),
        "linear": (fused_linear_weighted_mtp_loss, (hidden, lm_head, ids, weights), bias),
        "linear, ref_ce": (
            fused_linear_weighted_mtp_loss,
            (hidden, lm_head, ids),
            {"ref_ce": ref_ce},
        ),
        "linear next token": (
            linear_next_token_cross_entropy,
            (one_hidden.contiguous(), lm_head.detach(), ids),
            {},
        ),
    }


@in_pairs(name=problems(torch.float32), dtype=[torch.float32, torch.bfloat16], backend=FUSED_ON_CPU)
def test_the_same_numbers_wherever_they_lie(name, dtype, backend):
    function, arguments, options = problems(dtype)[name]
    wanted = answers(function, arguments, {**options, "backend": backend})
    moved = [misaligned(value) for value in arguments]
    more = {key: misaligned(value) for key, value in options.items()}
    found = answers(function, moved, {**more, "backend": backend})
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", FUSED_ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_head_of_a_list(dtype, backend):
    case = make_case((1, 4, 3, 19), dtype, "given")
    options = {**case.options, "backend": backend}
    heads = [head.contiguous().requires_grad_() for head in case.logits.unbind(2)]
    wanted = fused_weighted_mtp_loss(heads, case.target_ids, **options).loss
    gradients = torch.autograd.grad(wanted, heads)
    for k in range(3):
        moved = [misaligned(head) if i == k else head for i, head in enumerate(heads)]
        found = fused_weighted_mtp_loss(moved, case.target_ids, **options).loss
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found, moved), gradients)
        with pytest.raises(ValueError, match=r"at a multiple of their . bytes.*inplace=False"):
            fused_weighted_mtp_loss(moved, case.target_ids, **options, inplace=True)


def test_in_place_is_refused():
    logits, ids = misaligned(torch.randn(1, 6, 2, 40)), torch.randint(40, (1, 6))
    with pytest.raises(ValueError, match="at a multiple of their 4 bytes, got them at address"):
        fused_weighted_mtp_loss(logits.requires_grad_(), ids, inplace=True)


def test_inside_compiled_code():
    case = make_case((1, 4, 3, 19))
    compiled = torch.compile(fused_weighted_mtp_loss, fullgraph=True, backend="aot_eager")
    found = compiled(misaligned(case.logits), misaligned(case.target_ids), backend="cpu")
    wanted = fused_weighted_mtp_loss(case.logits, case.target_ids, backend="cpu")
    torch.testing.assert_close(found, wanted)
