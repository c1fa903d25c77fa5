"""The contestants: every way to compute the loss that is timed or profiled, and what bounds it.

A provider is given its inputs, which are what a gradient is taken for: the logits [B, S, H, V], or
hidden states [B, S, H, D] and an unembedding [V, D]. Then come

    target_ids [B, S], and the weights

or, for those that know no weights, rows of inputs [B S H, ..] and the targets [B S H] of these,
some of which are ignored.
"""

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wmtp import excess_head_weights, fused_linear_weighted_mtp_loss, fused_weighted_mtp_loss
from wmtp.labels import IGNORE_INDEX, has_target, shift_to_heads
from wmtp.weightings import (
    DFT,
    Critic,
    Decay,
    DPace,
    EntropyGate,
    Excess,
    Focal,
    KeepTop,
    Weighting,
)

Loss = Callable[..., Tensor]


class Weights(NamedTuple):
    """Uniform, if there is none."""

    head_weights: Tensor | None = None  # [B, S, H]
    ref_ce: Tensor | None = None  # [B, S - 1]
    weighting: Weighting | None = None  # of our own losses


class Provider(NamedTuple):
    """A loss, how it is called, and what it takes."""

    loss: Loss
    factors: int = 0  # D of the hidden states and the classifier that stand in for logits
    weighted: bool = True
    compiles: bool = False  # for seconds, and for each shape
    needs: tuple[str, ...] = ()  # a module, what it is called elsewhere, what must be in it
    on_gpu: bool = False
    slow: bool = False
    loss_only: bool = False  # its gradients are not compared
    options: Mapping[str, Any] = {}  # of our own losses, with which the truth is another


def eager(
    logits: Tensor, target_ids: Tensor, weights: Weights, reduction: str = "token_mean"
) -> Tensor:
    """What one writes in a trainer: torch's own cross entropy in the logits' dtype."""
    targets = shift_to_heads(target_ids, logits.shape[2], IGNORE_INDEX)
    ce = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
    return mean(ce.view(targets.shape), target_ids, weights, reduction)


def mean(ce: Tensor, target_ids: Tensor, weights: Weights, reduction: str) -> Tensor:
    """Of ce [B, S, H]: the library's own two, token_mean and weight_mean."""
    if weights.ref_ce is not None:
        w = excess_head_weights(ce, weights.ref_ce, target_ids)
    else:
        w = has_target(target_ids, ce.shape[2]).to(torch.float32)
        w = w if weights.head_weights is None else weights.head_weights * w
    if reduction == "weight_mean":
        return (w * ce).sum() / w.sum()
    weight_sum = w.sum(-1)
    token_loss = (w * ce).sum(-1) / weight_sum.clamp(min=1e-8)
    return token_loss.sum() / (weight_sum > 1e-8).sum()


def eager_float(logits: Tensor, target_ids: Tensor, weights: Weights) -> Tensor:
    """The same after `.float()`, as Hugging Face's losses and `wmtp.reference` do."""
    return eager(logits.float(), target_ids, weights)


def eager_linear(hidden: Tensor, weight: Tensor, target_ids: Tensor, weights: Weights) -> Tensor:
    """All logits, and the loss of these."""
    return eager(F.linear(hidden, weight), target_ids, weights, "weight_mean")


def eager_float_linear(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, weights: Weights
) -> Tensor:
    return eager(F.linear(hidden, weight).float(), target_ids, weights, "weight_mean")


def cce(hidden: Tensor, classifier: Tensor, target_ids: Tensor, weights: Weights) -> Tensor:
    """Cut Cross Entropy's torch.compile implementation."""
    ce = _cce(hidden, classifier, target_ids, "torch_compile")
    return mean(ce, target_ids, weights, "token_mean")


def cce_linear(hidden: Tensor, weight: Tensor, target_ids: Tensor, weights: Weights) -> Tensor:
    """Its kernel, gradient filter and all, on CUDA; else as above."""
    ce = _cce(hidden, weight, target_ids, "cce" if hidden.is_cuda else "torch_compile")
    return mean(ce, target_ids, weights, "weight_mean")


def _cce(hidden: Tensor, classifier: Tensor, target_ids: Tensor, impl: str) -> Tensor:
    module = importlib.import_module("cut_cross_entropy")
    targets = shift_to_heads(target_ids, hidden.shape[2], IGNORE_INDEX)
    return module.linear_cross_entropy(hidden, classifier, targets, reduction="none", impl=impl)


def fused(logits: Tensor, target_ids: Tensor, weights: Weights, **options: Any) -> Tensor:
    return fused_weighted_mtp_loss(logits, target_ids, **weights._asdict(), **options).loss


def fused_linear(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, weights: Weights, **options: Any
) -> Tensor:
    options |= {"reduction": "weight_mean", **weights._asdict()}
    return fused_linear_weighted_mtp_loss(hidden, weight, target_ids, **options).loss


def product(hidden: Tensor, weight: Tensor, target_ids: Tensor, weights: Weights) -> Tensor:
    """`fused` behind the product that makes its logits."""
    return fused(hidden @ weight.T, target_ids, weights)


def liger(logits: Tensor, targets: Tensor) -> Tensor:
    """Its gradient takes the logits' storage, in forward."""
    module = importlib.import_module("liger_kernel.transformers.functional")
    return module.liger_cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)


def liger_linear(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    module = importlib.import_module("liger_kernel.transformers.functional")
    loss = module.liger_fused_linear_cross_entropy
    return loss(x, weight, targets, ignore_index=IGNORE_INDEX, reduction="mean")


def quack(logits: Tensor, targets: Tensor) -> Tensor:
    module = importlib.import_module("quack.cross_entropy")
    return module.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="mean")


def flash_attn(logits: Tensor, targets: Tensor) -> Tensor:
    module = importlib.import_module("flash_attn.ops.triton.cross_entropy")
    losses, _ = module.cross_entropy_loss(logits, targets, ignore_index=IGNORE_INDEX)
    return losses.sum() / (targets != IGNORE_INDEX).sum()


def cce_kernel(x: Tensor, classifier: Tensor, targets: Tensor) -> Tensor:
    module = importlib.import_module("cut_cross_entropy")
    return module.linear_cross_entropy(x, classifier, targets, impl="cce")


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's path without chunks, which computes the logits."""
    return F.linear_cross_entropy(x, weight, targets)


def linear_cross_entropy_in_chunks(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's, of the rows with a target, in its own number of chunks."""
    valid, options = targets != IGNORE_INDEX, torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x[valid], weight, targets[valid], options=options)


def compiled(loss: Loss) -> Loss:
    return lambda *arguments: _compiled(loss)(*arguments)


@functools.cache
def _compiled(loss: Loss) -> Loss:
    return torch.compile(loss, dynamic=False, fullgraph=True)


_CCE, _LIGER = ("cut_cross_entropy", "cut-cross-entropy"), ("liger_kernel", "liger-kernel")
_TORCHS = ("torch.nn.functional", "torch", "linear_cross_entropy")
_CHUNKS = ("torch.nn", "torch", "LinearCrossEntropyOptions")

# Given logits. The D of `product` is small, so that its matrix products, which nobody changes, do
# not hide what surrounds them; with D = 1 a product is about as cheap as filling the logits.
LOGITS = {
    "eager": Provider(eager),
    "eager_float": Provider(eager_float),
    "compiled": Provider(compiled(eager), compiles=True),
    "cce": Provider(cce, 1, compiles=True, needs=_CCE, loss_only=True),
    "fused": Provider(fused),
    "fused_inplace": Provider(functools.partial(fused, inplace=True)),
    "fused_compiled": Provider(compiled(fused), compiles=True),
    "product": Provider(product, 16),
    "product_compiled": Provider(compiled(product), 16, compiles=True),
}
# Other people's kernels, on a GPU. They know no weights: each is the mean cross entropy.
PEERS = {
    "liger": Provider(liger, weighted=False, needs=_LIGER),
    "quack": Provider(quack, weighted=False, needs=("quack", "quack-kernels")),
    "flash_attn": Provider(flash_attn, weighted=False, needs=("flash_attn", "flash-attn")),
    "cce_kernel": Provider(cce_kernel, 1, False, needs=_CCE, loss_only=True),
    "linear_cross_entropy": Provider(linear_cross_entropy, 1, False, needs=_TORCHS, loss_only=True),
}
# Given hidden states and unembedding. All are the sum of w ce over the sum of w: with uniform
# weights the mean cross entropy, which those compute as well that know no weights.
LINEAR = {
    "fused": Provider(fused_linear),
    "eager": Provider(eager_linear),
    "eager_float": Provider(eager_float_linear),
    "compiled": Provider(compiled(eager_linear), compiles=True),
    "linear_cross_entropy": Provider(
        linear_cross_entropy_in_chunks, weighted=False, needs=_CHUNKS, slow=True
    ),
    "liger": Provider(liger_linear, weighted=False, needs=_LIGER, on_gpu=True),
    "cce": Provider(cce_linear, compiles=True, needs=_CCE),
}
# Ours with head numerics and metrics, one by one, against ours without.
OPTIONS: dict[str, dict[str, Any]] = {
    "logit_scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 30.0},
    "softcap_near": {"softcap": 3.75},  # as 30 is to logits of standard deviation 8
    "softcap_beyond": {"softcap": 0.5},  # where most of the logits are
    "sigmoid_cap": {"sigmoid_cap": (30.0, 0.0, 7.5)},
    "z_loss": {"z_loss": 1e-4},
    "smoothing": {"label_smoothing": 0.1},
    "cap_smoothing": {"softcap": 30.0, "label_smoothing": 0.1},
    "metrics": {"metrics": True},
}


def with_options(loss: Loss) -> dict[str, Provider]:
    return {
        f"fused_{name}": Provider(functools.partial(loss, **options), options=options)
        for name, options in OPTIONS.items()
    }


def rules(values: Tensor, ref_ce: Tensor, center: Tensor) -> dict[str, Weighting]:
    """Ours, by what they are called here.

    Args:
        values: [B, S], of a critic.
        ref_ce: [B, S - 1].
        center: [H].
    """
    return {
        "DFT": DFT(),
        "Focal": Focal(),
        "EntropyGate": EntropyGate(),
        "DPace": DPace(),
        "Decay": Decay(0.5),
        "Excess": Excess(ref_ce),
        "Excess, center": Excess(ref_ce, excess="signed", center=center),
        "Critic": Critic(values),
        "Critic, standardize": Critic(values, standardize=True),
        "DFT * Focal": DFT() * Focal(),
        "DPace * Decay": DPace() * Decay(0.5),
    }


def selections(ref_ce: Tensor) -> dict[str, Weighting]:
    """Rules that keep 0.6 of the pairs, by an excess that no rounding ranks otherwise.

    Args:
        ref_ce: [B, S - 1].
    """
    by = Excess(1e4 * (ref_ce - ref_ce.floor()), excess="signed")
    return {
        "KeepTop, chunk": KeepTop(0.6, by, scope="chunk"),
        "KeepTop, batch": KeepTop(0.6, by),
    }


# Ours with the gradients of some heads alone.
GRAD_HEADS: dict[str, dict[str, Any]] = {
    "fused_weight_of_one": {"weight_grad_heads": (0,)},
    "fused_one": {"hidden_grad_heads": (0,), "weight_grad_heads": (0,)},
}
LINEAR_GRAD_HEADS = {
    name: Provider(functools.partial(fused_linear, **options), options=options)
    for name, options in GRAD_HEADS.items()
}
LOGITS_OPTIONS, LINEAR_OPTIONS = with_options(fused), with_options(fused_linear)
# What one call does, and who does it; `copy`, which is no loss, is timed beside each.
DIRECTIONS = {
    "forward": ("eager", "eager_float", "compiled", "cce", "fused"),  # under no_grad
    "forward+backward": ("eager", "eager_float", "compiled", "cce", "fused"),
    "inplace": ("fused_inplace",),  # forward + backward over the logits' own storage
}
# The same of hidden states and unembedding, and the products that none can do without: for all
# gradients, or for the hidden states' alone.
FLOORS = {"forward+backward": "three_products", "frozen": "two_products"}
OURS = ("fused", "fused_inplace")
# Ours inside torch.compile, against the same outside.
UNCOMPILED = {"fused_compiled": "fused", "product_compiled": "product"}


def three_products(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The logits of x [rows, D], and two products with something of their size."""
    g = x @ weight.T
    return g @ weight, g.T @ x


def two_products(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Without the weight's gradient."""
    return (x @ weight.T @ weight,)


def absent(contestants: Mapping[str, Provider], compiling: bool = True) -> dict[str, str]:
    """Who of them is not timed here, and why.

    Args:
        compiling: there is time for torch.compile, and for torch's chunks.
    """
    found = {name: _why_absent(one, compiling) for name, one in contestants.items()}
    return {name: why for name, why in found.items() if why}


def _why_absent(provider: Provider, compiling: bool) -> str:
    on_gpu = torch.cuda.is_available()
    if (provider.compiles or provider.slow) and not compiling:
        return "not timed with --quick"
    if provider.on_gpu and not on_gpu:
        return "its kernels need a GPU"
    if provider.needs and importlib.util.find_spec(provider.needs[0]) is None:
        return f"{provider.needs[1]} is not installed"
    for name in provider.needs[2:]:
        if not hasattr(importlib.import_module(provider.needs[0]), name):
            return f"torch {torch.__version__} does not have {name}"
    if provider.compiles and not on_gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile finds no C++ compiler"
    return ""
