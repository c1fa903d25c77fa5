"""The contestants of the linear loss: hidden states times unembedding, and its cross entropies.

Each maps (hidden [B, S, H, D], weight [V, D], target_ids [B, S], head_weights [B, S, H] or None,
ref_ce [B, S - 1] or None) to the sum of w ce over the sum of w, reduction="weight_mean". With
uniform weights that is the mean cross entropy over the rows with a target, which those compute as
well that know no weights (UNWEIGHTED): all of it is the same work.

The FLOORS are no losses but the matrix products that none can do without.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from wmtp import fused_linear_weighted_mtp_loss
from wmtp.benchmarks.providers import Loss, cross_entropies, weights_of
from wmtp.benchmarks.providers import absent as absent_providers
from wmtp.labels import IGNORE_INDEX, shift_to_heads


def fused(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None = None,
    ref_ce: Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:
    return fused_linear_weighted_mtp_loss(
        *(hidden, weight, target_ids, head_weights),
        ref_ce=ref_ce,
        reduction="weight_mean",
        chunk_bytes=chunk_bytes,
        backend=backend,
    ).loss


def eager(hidden: Tensor, weight: Tensor, target_ids: Tensor, *weights: Tensor | None) -> Tensor:
    """What one writes in a trainer: all logits, and torch's own cross entropy in their dtype."""
    return _weight_mean(cross_entropies(F.linear(hidden, weight), target_ids), target_ids, *weights)


def eager_float(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, *weights: Tensor | None
) -> Tensor:
    """The same after `.float()`, as Hugging Face's losses and `wmtp.reference` do."""
    ce = cross_entropies(F.linear(hidden, weight).float(), target_ids)
    return _weight_mean(ce, target_ids, *weights)


def compiled(*arguments: Tensor | None) -> Tensor:
    return _compiled_eager()(*arguments)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """torch's, chunked as it is by default."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        *rows_and_targets(hidden, target_ids, weight), reduction="mean", options=options
    )


def cce(hidden: Tensor, weight: Tensor, target_ids: Tensor, *weights: Tensor | None) -> Tensor:
    """Cut Cross Entropy: its kernel, gradient filter and all, on CUDA; else its torch.compile."""
    module = importlib.import_module("cut_cross_entropy")
    targets = shift_to_heads(target_ids, hidden.shape[2], IGNORE_INDEX)
    impl = "cce" if hidden.is_cuda else "torch_compile"
    ce = module.linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)
    return _weight_mean(ce, target_ids, *weights)


def liger(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """A call a head, as it is used where there are several."""
    module = importlib.import_module("liger_kernel.transformers.functional")
    targets = shift_to_heads(target_ids, hidden.shape[2], IGNORE_INDEX)
    total = sum(
        module.liger_fused_linear_cross_entropy(
            hidden[:, :, head].flatten(0, 1),
            weight,
            targets[:, :, head].flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        for head in range(hidden.shape[2])
    )
    return total / (targets != IGNORE_INDEX).sum()


def three_products(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The logits of x [rows, D], and two products with something of their size."""
    g = x @ weight.T
    return g @ weight, g.T @ x


def two_products(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Without the weight's gradient."""
    return (x @ weight.T @ weight,)


PROVIDERS: dict[str, Loss] = {
    "fused": fused,
    "eager": eager,
    "eager_float": eager_float,
    "compiled": compiled,
    "linear_cross_entropy": linear_cross_entropy,
    "liger": liger,
    "cce": cce,
}
FLOORS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "three_products": three_products,
    "two_products": two_products,
}
UNWEIGHTED = ("linear_cross_entropy", "liger")
# What one call does, and its floor: all gradients, or the hidden states' alone.
DIRECTIONS = {"forward+backward": "three_products", "frozen": "two_products"}


def absent(compiling: bool) -> dict[str, str]:
    """The providers that are not timed here, and why.

    Args:
        compiling: there is time for torch.compile, and for torch's chunks.
    """
    missing = {who: why for who, why in absent_providers(compiling).items() if who in PROVIDERS}
    if not compiling:
        missing["linear_cross_entropy"] = "not timed with --quick: it takes as long as the others"
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        missing["linear_cross_entropy"] = f"torch {torch.__version__} does not have it in chunks"
    if not torch.cuda.is_available():
        missing["liger"] = "its kernels need a GPU"
    elif importlib.util.find_spec("liger_kernel") is None:
        missing["liger"] = "liger-kernel is not installed"
    return missing


def rows_and_targets(
    hidden: Tensor, target_ids: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, D] of the rows with a target, the weight, and their targets [rows]."""
    targets = shift_to_heads(target_ids, hidden.shape[2], IGNORE_INDEX)
    valid = targets != IGNORE_INDEX
    return hidden[valid], weight, targets[valid]


def _weight_mean(
    ce: Tensor,
    target_ids: Tensor,
    head_weights: Tensor | None = None,
    ref_ce: Tensor | None = None,
) -> Tensor:
    weights = weights_of(ce, target_ids, head_weights, ref_ce)
    return (weights * ce).sum() / weights.sum()


@functools.cache
def _compiled_eager() -> Loss:
    return torch.compile(eager, dynamic=False)
