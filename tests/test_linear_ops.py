"""The linear loss's operators: torch's own checks, and whole graphs through torch.compile."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from support.agreement import operator_call
from support.covering import in_pairs
from support.linear_cases import SOME, gradients, make_case
from wmtp import fused_linear_weighted_mtp_loss, linear_next_token_cross_entropy
from wmtp.arguments import loss_inputs
from wmtp.records import LinearInputs, LinearSettings, flat
from wmtp.weightings import Excess, Given, Uniform

pytestmark = pytest.mark.usefixtures("one_thread")


def arguments_of(leaves, options, dtype, wanted=(True, True, True), chunk_bytes=SOME, ahead=True):
    """`linear_loss`'s."""
    weights, ref_ce = map(options.get, ("head_weights", "ref_ce"))
    rule = Uniform() if weights is None else Given(weights)
    if ref_ce is not None:
        rule = Excess(ref_ce)
    inputs = LinearInputs(
        **dict(zip(("hidden", "weight", "bias"), leaves, strict=True)),
        **loss_inputs(operator_call(leaves[0], options["target_ids"], rule), torch.float32),
    )
    settings = LinearSettings(
        rule=rule.key(),
        reduction="token_mean",
        ignore_index=-100,
        backend="cpu",
        dtype=dtype,
        accum_dtype=torch.float32,
        chunk_bytes=chunk_bytes,
        wanted=list(wanted),
        ahead=ahead,
    )
    return tuple(flat(inputs, settings))


@in_pairs(
    dtype=[torch.float32, torch.bfloat16],
    weighting=["uniform", "given", "ref_ce"],
    chunk_bytes=[SOME, None],
)
def test_opcheck_linear_loss(weighting, dtype, chunk_bytes):
    leaves, options = make_case(dtype, weighting, bias=True, shape=(2, 4, 2, 3, 9))
    if weighting == "given":
        options["head_weights"].requires_grad_()
    arguments = arguments_of(leaves, options, dtype, chunk_bytes=chunk_bytes)
    torch.library.opcheck(torch.ops.wmtp.linear_loss.default, arguments)


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (True, False, True)])
def test_opcheck_linear_gradient(wanted):
    leaves, options = make_case(torch.float32, bias=True, shape=(2, 4, 2, 3, 9))
    leaves = [leaf.detach() for leaf in leaves]
    arguments = arguments_of(leaves, options, torch.float32, wanted, ahead=False)
    arguments = (*arguments, torch.randn(2, 4, 2))
    torch.library.opcheck(torch.ops.wmtp.linear_gradient.default, arguments)


@pytest.mark.parametrize(
    ("weighting", "dtype", "compiler"),
    [
        ("given", torch.float32, "aot_eager"),
        ("ref_ce", torch.float32, "aot_eager"),
        ("given", torch.bfloat16, "aot_eager"),
        ("ref_ce", torch.bfloat16, "inductor"),  # to machine code, which takes longest
    ],
    ids=str,
)
def test_compiled_whole(weighting, dtype, compiler):
    leaves, options = make_case(dtype, weighting, bias=True)
    compiled = torch.compile(
        fused_linear_weighted_mtp_loss, fullgraph=True, backend=compiler, dynamic=True
    )
    for upstream in ((1.0, None), (2.0, torch.randn(2, 11, 3))):
        result, found = gradients(compiled, leaves, options, upstream, chunk_bytes=SOME)
        wanted, true = gradients(
            fused_linear_weighted_mtp_loss, leaves, options, upstream, chunk_bytes=SOME
        )
        torch.testing.assert_close(result, wanted)
        for ours, theirs in zip(found, true, strict=True):
            assert ours.dtype == theirs.dtype
            assert (ours - theirs).norm() <= 5e-3 * theirs.norm()


def test_an_upstream_gradient_of_0_leaves_nothing_of_an_infinity():
    (hidden, weight, _), options = make_case()
    hidden.data[0, 1, 1] = float("inf")

    def loss_of(hidden, weight):
        return fused_linear_weighted_mtp_loss(hidden, weight, **options).loss

    loss = torch.compile(loss_of, backend="aot_eager")(hidden, weight)
    for gradient in torch.autograd.grad(loss, (hidden, weight), torch.tensor(0.0)):
        assert not gradient.any()


def test_chunk_bytes_may_follow_from_a_size():
    (hidden, weight, _), options = make_case()

    def loss_of(hidden):
        return fused_linear_weighted_mtp_loss(
            hidden, weight, **options, chunk_bytes=hidden.shape[1] * 100
        ).loss

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(hidden), loss_of(hidden))


def test_no_cuda_graph_is_made_of_what_waits_for_the_device():
    for operator in (torch.ops.wmtp.linear_loss, torch.ops.wmtp.linear_gradient):
        assert torch.Tag.cudagraph_unsafe in operator.default.tags


def test_the_reference_is_compiled_whole():
    (hidden, weight, _), options = make_case()
    compiled = torch.compile(linear_next_token_cross_entropy, fullgraph=True, backend="aot_eager")
    arguments = hidden[:, :, 0], weight, options["target_ids"]
    torch.testing.assert_close(
        compiled(*arguments), linear_next_token_cross_entropy(*arguments), rtol=0, atol=0
    )


def test_a_traced_backward_keeps_the_upstream_gradient():
    leaves, options = make_case(torch.float32, "given")

    def step(hidden, weight, upstream):
        loss = fused_linear_weighted_mtp_loss(hidden, weight, **options, chunk_bytes=SOME).loss
        return torch.autograd.grad(loss * upstream, [hidden, weight])

    traced = make_fx(step)(*leaves[:2], torch.tensor(1.0))
    torch.testing.assert_close(
        traced(*leaves[:2], torch.tensor(3.0)), step(*leaves[:2], torch.tensor(3.0))
    )


def test_no_second_derivative():
    (hidden, weight, _), options = make_case()
    loss = fused_linear_weighted_mtp_loss(hidden, weight, **options).loss
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: use backend='eager'"):
        gradient.sum().backward()
