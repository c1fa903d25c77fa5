"""weights_kernel and finish_kernel against the fp64 truth: any H, any denominator, no token."""

import pytest
import torch

from support.agreement import GRADIENT_TOLERANCE, relative_error
from support.covering import in_pairs
from support.kernel_outputs import DTYPES, IGNORED, make
from wmtp import fused_weighted_mtp_loss
from wmtp.reference import compute_weighted_mtp_loss

REDUCTIONS = ["token_mean", "weight_mean", "sum"]


def loss_and_gradient(function, logits, target_ids, **options):
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, target_ids, **options).loss
    (grad,) = torch.autograd.grad(3 * loss, leaf)
    return loss.detach().double().cpu(), grad.double().cpu()


def truth(logits, target_ids, **options):
    def exact(value):
        is_tensor = isinstance(value, torch.Tensor)
        return value.double().cpu() if is_tensor and value.is_floating_point() else value

    options = {name: exact(value) for name, value in options.items()}
    return loss_and_gradient(
        compute_weighted_mtp_loss,
        exact(logits),
        target_ids.cpu(),
        horizon=logits.shape[2],
        **options,
    )


def assert_right(logits, target_ids, **options):
    loss, grad = loss_and_gradient(
        fused_weighted_mtp_loss, logits, target_ids, backend="triton", **options
    )
    wanted_loss, wanted_grad = truth(logits, target_ids, **options)
    torch.testing.assert_close(loss, wanted_loss, rtol=2e-5, atol=0)
    largest = torch.finfo(logits.dtype).max
    rounded = wanted_grad.clamp(-largest, largest)
    assert relative_error(grad, rounded) <= 2 * GRADIENT_TOLERANCE[logits.dtype]


@in_pairs(
    heads=range(1, 9),
    reduction=REDUCTIONS,
    weighting=["uniform", "given", "ref_ce"],
    normalizer=[None, 7.0],
    dtype=DTYPES,
)
def test_every_weighting_and_normalizer_with_any_number_of_heads(
    device, heads, reduction, weighting, normalizer, dtype
):
    weights = torch.rand(1, 4, heads, device=device)
    weights[0, 1] = 0.0
    options = {
        "uniform": {},
        "given": {"head_weights": weights},
        "ref_ce": {"ref_ce": 4 * torch.rand(1, 3, device=device)},
    }[weighting]
    logits, target_ids = make((1, 4, heads, 5), dtype, device)
    assert_right(logits, target_ids, reduction=reduction, normalizer=normalizer, **options)


@in_pairs(
    dtype=DTYPES,
    reduction=REDUCTIONS,
    normalizer=[torch.tensor(0.0), None, 3.0],
    weighting=["uniform", "given", "ref_ce", "of 0"],
)
def test_nothing_to_learn_from_is_a_loss_of_0_whatever_divides_it(
    device, dtype, reduction, normalizer, weighting
):
    logits, target_ids = make((1, 4, 2, 9), dtype, device)
    options = {
        "uniform": {},
        "given": {"head_weights": torch.ones(1, 4, 2, device=device)},
        "ref_ce": {"ref_ce": torch.rand(1, 3, device=device)},
        "of 0": {"head_weights": torch.zeros(1, 4, 2, device=device)},
    }[weighting]
    if weighting != "of 0":
        target_ids.fill_(IGNORED)
    loss, grad = loss_and_gradient(
        fused_weighted_mtp_loss,
        logits,
        target_ids,
        backend="triton",
        reduction=reduction,
        normalizer=normalizer,
        **options,
    )
    assert loss == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("weights", ["given", "ref_ce"])
def test_a_normalizer_of_0_divides_what_weighs(device, weights):
    """inf, as IEEE has it, but for the pairs of weight 0."""
    logits, target_ids = make((1, 5, 2, 9), torch.float32, device, ignored=0.0)
    options = {"ref_ce": torch.rand(1, 4, device=device)}
    if weights == "given":
        options = {"head_weights": torch.tensor([1.0, 0.0], device=device).expand(1, 5, 2)}
    loss, grad = loss_and_gradient(
        fused_weighted_mtp_loss,
        logits,
        target_ids,
        backend="triton",
        normalizer=torch.tensor(0.0),
        **options,
    )
    assert loss == float("inf")
    assert not grad[0, :3, 0].isfinite().any()
    assert weights != "given" or (grad[0, :, 1] == 0).all()


# The smallest of float32's, denormals, one whose inverse overflows; sums that overflow.
SIZES = [2e-45, 1e-42, 1e-40, 1e-38, 1e-30, 1e30, 1e38, 3e38]


@pytest.mark.parametrize(
    ("size", "dtype"),
    list(zip(SIZES, 3 * DTYPES, strict=False)),
)
def test_weight_mean_of_weights_of_any_size(device, dtype, size):
    logits, target_ids = make((1, 5, 2, 5), dtype, device)
    weights = (size * torch.randint(1, 9, (1, 5, 2), dtype=torch.float64)).float()
    weights = weights.clamp(max=torch.finfo(torch.float32).max).to(device)
    weights[0, 1] = 0.0
    assert_right(logits, target_ids, head_weights=weights, reduction="weight_mean")
    total = weights.double().sum().clamp(max=3e38).float()
    for reduction in ("weight_mean", "sum"):
        options = {"reduction": reduction, "normalizer": total}
        assert_right(logits, target_ids, head_weights=weights, **options)


def test_a_tokens_weights_may_sum_to_more_than_float32_holds(device):
    logits, target_ids = make((2, 5, 3, 9), torch.float32, device)
    weights = (3.4e38 * torch.rand(2, 5, 3)).to(device)
    weights[0, 0] = 3.4e38
    assert_right(logits, target_ids, head_weights=weights)


def test_the_gradient_of_denormal_weights_goes_through_fp16_as_through_fp32(device):
    """The power of two that float16 gradients carry is found in the weights' own unit."""
    logits, target_ids = make((1, 6, 2, 9), torch.float16, device, ignored=0.0)
    weights = torch.rand(1, 6, 2, device=device)
    grads = [
        loss_and_gradient(
            fused_weighted_mtp_loss, logits, target_ids, backend="triton",
            head_weights=weights * unit, reduction="weight_mean",
        )[1]
        for unit in (1.0, 2.0**-110, 2.0**110)
    ]  # fmt: skip
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
