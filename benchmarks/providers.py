"""The contestants: every way to compute the weighted loss that is timed or profiled.

Each maps (leaves, target_ids [B, S], head_weights [B, S, H] or None, ref_ce [B, S - 1] or None) to
the scalar loss; neither weights nor ref_ce means uniform. The leaves, which are what a gradient is
taken for, are the logits [B, S, H, V]; those of FACTOR_SIZES are the factors of such logits.
"""

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wmtp import excess_head_weights, fused_weighted_mtp_loss
from wmtp.labels import IGNORE_INDEX, has_target, shift_to_heads

Loss = Callable[..., Tensor]


def eager(
    logits: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None = None,
    ref_ce: Tensor | None = None,
) -> Tensor:
    """What one writes in a trainer: torch's own cross entropy in the logits' dtype."""
    return _weighted_mean(cross_entropies(logits, target_ids), target_ids, head_weights, ref_ce)


def eager_float(logits: Tensor, target_ids: Tensor, *weights: Tensor | None) -> Tensor:
    """The same after `.float()`, as Hugging Face's losses do."""
    return eager(logits.float(), target_ids, *weights)


def compiled(*arguments: Tensor | None) -> Tensor:
    return _compiled(eager)(*arguments)


def cce(
    hidden: Tensor,
    classifier: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None = None,
    ref_ce: Tensor | None = None,
) -> Tensor:
    """Cut Cross Entropy's torch.compile implementation: hidden [B, S, H, 1], classifier [V, 1].

    It takes no logits. A hidden size of 1 makes its product about as cheap as filling them.
    """
    targets = shift_to_heads(target_ids, hidden.shape[2], IGNORE_INDEX)
    linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    ce = linear_cross_entropy(hidden, classifier, targets, reduction="none", impl="torch_compile")
    return _weighted_mean(ce, target_ids, head_weights, ref_ce)


def fused(
    logits: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None = None,
    ref_ce: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    return fused_weighted_mtp_loss(
        logits, target_ids, head_weights, ref_ce=ref_ce, inplace=inplace
    ).loss


def fused_compiled(*arguments: Tensor | None) -> Tensor:
    return _compiled(fused)(*arguments)


def product(
    hidden: Tensor,
    classifier: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None = None,
    ref_ce: Tensor | None = None,
) -> Tensor:
    """`fused` behind the product that makes its logits: hidden [B, S, H, D], classifier [V, D]."""
    return fused(hidden @ classifier.T, target_ids, head_weights, ref_ce)


def product_compiled(*arguments: Tensor | None) -> Tensor:
    return _compiled(product)(*arguments)


PROVIDERS: dict[str, Loss] = {
    "eager": eager,
    "eager_float": eager_float,
    "compiled": compiled,
    "cce": cce,
    "fused": fused,
    "fused_inplace": functools.partial(fused, inplace=True),
    "fused_compiled": fused_compiled,
    "product": product,
    "product_compiled": product_compiled,
}
# D of those that are given hidden states and a classifier. That of `product` is small, so that its
# matrix products, which nobody changes, do not hide what surrounds them.
FACTOR_SIZES = {"cce": 1, "product": 16, "product_compiled": 16}
# What one call does; `copy`, which is no loss, is timed beside each.
DIRECTIONS = {
    "forward": ("eager", "eager_float", "compiled", "cce", "fused"),  # under no_grad
    "forward+backward": ("eager", "eager_float", "compiled", "cce", "fused"),
    "inplace": ("fused_inplace",),  # forward + backward over the logits' own storage
}
# Ours inside torch.compile, against the same outside.
UNCOMPILED = {"fused_compiled": "fused", "product_compiled": "product"}
COMPILED = ("compiled", "cce", *UNCOMPILED)


def absent(compiling: bool) -> dict[str, str]:
    """The providers that are not timed here, and why.

    Args:
        compiling: there is time for torch.compile.
    """
    if not compiling:
        return dict.fromkeys(COMPILED, "not timed with --quick")
    missing = {}
    if not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None:
        missing = dict.fromkeys(COMPILED, "torch.compile finds no C++ compiler")
    if importlib.util.find_spec("cut_cross_entropy") is None:
        missing["cce"] = "cut-cross-entropy is not installed"
    return missing


def leaves(provider: str, logits: Tensor) -> tuple[Tensor, ...]:
    """What the provider is called with, and differentiated by."""
    if provider not in FACTOR_SIZES:
        return (logits,)
    size = min(FACTOR_SIZES[provider], *logits.shape[1::2])
    factors = (logits[..., :size], logits[0, :size, 0].T * size**-0.5)
    return tuple(factor.detach().clone().requires_grad_() for factor in factors)


def cross_entropies(logits: Tensor, target_ids: Tensor) -> Tensor:
    """[B, S, H], by torch's own in the logits' dtype."""
    targets = shift_to_heads(target_ids, logits.shape[2], IGNORE_INDEX)
    ce = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
    return ce.view(targets.shape)


def weights_of(
    ce: Tensor, target_ids: Tensor, head_weights: Tensor | None, ref_ce: Tensor | None
) -> Tensor:
    """[B, S, H]: the weights given, or those of a reference, or 1; 0 without a target."""
    if ref_ce is not None:
        return excess_head_weights(ce, ref_ce, target_ids)
    weights = has_target(target_ids, ce.shape[2]).to(torch.float32)
    return weights if head_weights is None else head_weights * weights


def _weighted_mean(
    ce: Tensor, target_ids: Tensor, head_weights: Tensor | None, ref_ce: Tensor | None
) -> Tensor:
    weights = weights_of(ce, target_ids, head_weights, ref_ce)
    weight_sum = weights.sum(-1)
    token_loss = (weights * ce).sum(-1) / weight_sum.clamp(min=1e-8)
    return token_loss.sum() / (weight_sum > 1e-8).sum()


@functools.cache
def _compiled(loss: Loss) -> Loss:
    return torch.compile(loss, dynamic=False, fullgraph=True)
