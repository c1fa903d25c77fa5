"""torch.func, forward-mode AD and batches of gradients: by eager torch, or one error of ours."""

from functools import partial

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

from support.agreement import make_case
from wmtp import (
    excess_head_weights,
    fused_linear_weighted_mtp_loss,
    fused_weighted_mtp_loss,
    linear_next_token_cross_entropy,
    mtp_cross_entropy,
    next_token_cross_entropy,
    td_head_weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CASE = make_case((2, 5, 3, 11), torch.float64, "given", ignored=0)
IDS, WEIGHTS = CASE.target_ids, CASE.options["head_weights"].double() + 0.1
REF_CE = torch.rand(2, 4).double()
HIDDEN, LM_HEAD = torch.randn(2, 5, 3, 4).double(), torch.randn(11, 4).double()


def of_logits(logits, **how):
    return fused_weighted_mtp_loss(logits, IDS, WEIGHTS, **how).loss


def of_shared_logits(logits, **how):
    return of_logits(logits[:, :, :1].expand(-1, -1, 3, -1), **how)


def of_excess(logits, **how):
    return fused_weighted_mtp_loss(logits, IDS, ref_ce=REF_CE, **how).loss


def of_weights(weights, **how):
    return fused_weighted_mtp_loss(CASE.logits, IDS, weights, **how).loss


def of_a_list(logits, **how):
    return of_logits(list(logits.unbind(2)), **how)


def of_cross_entropies(logits, **how):
    return mtp_cross_entropy(logits, IDS, **how).square().mean()


def of_hidden(hidden, **how):
    return fused_linear_weighted_mtp_loss(hidden, LM_HEAD, IDS, WEIGHTS, **how).loss


def of_a_list_of_hidden(hidden, **how):
    return of_hidden(list(hidden.unbind(2)), **how)


def of_lm_head(weight, **how):
    return fused_linear_weighted_mtp_loss(HIDDEN, weight, IDS, ref_ce=REF_CE, **how).loss


def of_weights_of_the_linear_loss(weights, **how):
    return fused_linear_weighted_mtp_loss(HIDDEN, LM_HEAD, IDS, weights, **how).loss


PROBLEMS = {
    of_logits: CASE.logits,
    of_shared_logits: CASE.logits,
    of_excess: CASE.logits,
    of_weights: WEIGHTS,
    of_a_list: CASE.logits,
    of_cross_entropies: CASE.logits,
    of_hidden: HIDDEN,
    of_a_list_of_hidden: HIDDEN,
    of_lm_head: LM_HEAD,
    of_weights_of_the_linear_loss: WEIGHTS,
}


def tangent(x):
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)


def forward_mode(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent(x)))).tangent


def gradient(function, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


# name -> (what is computed, what it is by gradients and values alone)
TRANSFORMS = {
    "grad": (lambda f, x: func.grad(f)(x), gradient),
    "vjp": (lambda f, x: func.vjp(f, x)[1](torch.ones(()).double())[0], gradient),
    "jacrev": (lambda f, x: func.jacrev(f)(x), gradient),
    "jacfwd": (lambda f, x: func.jacfwd(f)(x), gradient),
    "jvp": (
        lambda f, x: func.jvp(f, (x,), (tangent(x),))[1],
        lambda f, x: (gradient(f, x) * tangent(x)).sum(),
    ),
    "forward mode": (forward_mode, lambda f, x: (gradient(f, x) * tangent(x)).sum()),
    "vmap": (
        lambda f, x: func.vmap(f)(torch.stack((x, 2 * x))),
        lambda f, x: torch.stack((f(x), f(2 * x))),
    ),
    "vmap of grad": (
        lambda f, x: func.vmap(func.grad(f))(torch.stack((x, 2 * x))),
        lambda f, x: torch.stack((gradient(f, x), gradient(f, 2 * x))),
    ),
    "functionalize": (lambda f, x: func.functionalize(f)(x), lambda f, x: f(x)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("loss", PROBLEMS, ids=lambda f: f.__name__)
def test_eager_goes_through_all_of_them(loss, name):
    transformed, plain = TRANSFORMS[name]
    eager = partial(loss, backend="eager")
    torch.testing.assert_close(transformed(eager, PROBLEMS[loss]), plain(eager, PROBLEMS[loss]))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("loss", PROBLEMS, ids=lambda f: f.__name__)
def test_the_fused_losses_say_so(loss, name):
    """Torch's own error would speak of setup_context, and a jvp of the linear loss be 0."""
    transformed, _ = TRANSFORMS[name]
    with pytest.raises(NotImplementedError, match=r"torch\.func .* pass backend='eager'"):
        transformed(partial(loss, backend="cpu"), PROBLEMS[loss])


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("loss", [of_logits, of_hidden])
def test_inside_compiled_code(loss, name):
    transformed, plain = TRANSFORMS[name]
    x = PROBLEMS[loss]

    def compiled(backend):
        function = partial(transformed, partial(loss, backend=backend))
        return torch.compile(function, backend="eager", fullgraph=True)

    eager = partial(loss, backend="eager")
    torch.testing.assert_close(compiled("eager")(x), plain(eager, x))
    with pytest.raises(Exception, match="pass backend='eager'"):
        compiled("cpu")(x)


@pytest.mark.parametrize("loss", PROBLEMS, ids=lambda f: f.__name__)
def test_a_batch_of_upstream_gradients(loss):
    for backend in ("cpu", "eager"):
        leaf = PROBLEMS[loss].clone().requires_grad_()
        value, upstream = loss(leaf, backend=backend), torch.tensor([1.0, -2.5]).double()
        (once,) = torch.autograd.grad(value, leaf, retain_graph=True)
        for _ in range(2):
            (batch,) = torch.autograd.grad(
                value, leaf, upstream, is_grads_batched=True, retain_graph=True
            )
            torch.testing.assert_close(batch, torch.stack((once, -2.5 * once)))
        # The first one handed out is a batch, too.
        value = loss(leaf, backend=backend)
        (first,) = torch.autograd.grad(value, leaf, upstream, is_grads_batched=True)
        torch.testing.assert_close(first, batch)


def test_in_place_there_is_one_gradient():
    logits = CASE.logits.clone().requires_grad_()
    loss = of_logits(logits * 1, inplace=True, backend="cpu")
    with pytest.raises(RuntimeError, match=r"one upstream gradient, not a batch .* inplace=False"):
        torch.autograd.grad(loss, logits, torch.ones(2).double(), is_grads_batched=True)


REFERENCES = {
    "next token": lambda x: next_token_cross_entropy(x[:, :, 0], IDS),
    "linear next token": lambda x: linear_next_token_cross_entropy(x[..., 0, :4], LM_HEAD, IDS),
    "excess": lambda x: excess_head_weights(x[..., 0], REF_CE, IDS),
    "td": lambda x: td_head_weights(x[:, :, 0, 0], IDS, 3),
}


@pytest.mark.parametrize("function", REFERENCES.values(), ids=REFERENCES)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_has_no_gradient_is_a_constant(function):
    x = CASE.logits
    assert not func.grad(lambda y: function(y).sum())(x).any()
    assert not func.jvp(function, (x,), (tangent(x),))[1].any()
    torch.testing.assert_close(
        func.vmap(function)(torch.stack((x, 2 * x))), torch.stack((function(x), function(2 * x)))
    )
