"""Other people's cross entropies on a GPU, where they are installed.

They have no weights: each is the mean cross entropy over the same rows and targets, which is less
work than a weighted loss. Those of LINEAR take hidden states and a classifier instead of logits;
they get such of size 1, whose products they also compute, and only their loss is compared.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wmtp.benchmarks.problem import Problem, Shape, with_gradient, without_gradient
from wmtp.benchmarks.providers import absent as absent_providers
from wmtp.benchmarks.providers import leaves
from wmtp.labels import IGNORE_INDEX, shift_to_heads


class Peer(NamedTuple):
    """Where a peer comes from, and its mean cross entropy of (logits [N, V], targets [N])."""

    module: str
    package: str
    loss: Callable[..., Tensor]


def liger(logits: Tensor, targets: Tensor) -> Tensor:
    """Its gradient takes the logits' storage, in forward."""
    module = importlib.import_module("liger_kernel.transformers.functional")
    return module.liger_cross_entropy(logits, targets, ignore_index=IGNORE_INDEX)


def quack(logits: Tensor, targets: Tensor) -> Tensor:
    module = importlib.import_module("quack.cross_entropy")
    return module.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="mean")


def flash_attn(logits: Tensor, targets: Tensor) -> Tensor:
    module = importlib.import_module("flash_attn.ops.triton.cross_entropy")
    losses, _ = module.cross_entropy_loss(logits, targets, ignore_index=IGNORE_INDEX)
    return losses.sum() / (targets != IGNORE_INDEX).sum()


def cce_kernel(hidden: Tensor, classifier: Tensor, targets: Tensor) -> Tensor:
    """Cut Cross Entropy's own kernel, with its gradient filter as it comes."""
    module = importlib.import_module("cut_cross_entropy")
    return module.linear_cross_entropy(hidden, classifier, targets, impl="cce")


def linear_cross_entropy(hidden: Tensor, classifier: Tensor, targets: Tensor) -> Tensor:
    """torch's, where it has one: its path without chunks, which computes the logits."""
    return F.linear_cross_entropy(hidden, classifier, targets)


PEERS = {
    "liger": Peer("liger_kernel", "liger-kernel", liger),
    "quack": Peer("quack", "quack-kernels", quack),
    "flash_attn": Peer("flash_attn", "flash-attn", flash_attn),
    "cce_kernel": Peer("cut_cross_entropy", "cut-cross-entropy", cce_kernel),
    "linear_cross_entropy": Peer("", "torch", linear_cross_entropy),
}
LINEAR = ("cce_kernel", "linear_cross_entropy")


def absent() -> dict[str, str]:
    """Whom the suite cannot time here, and why."""
    missing = {name: why for name, why in absent_providers(compiling=True).items() if name != "cce"}
    for name, peer in PEERS.items():
        if peer.module and importlib.util.find_spec(peer.module) is None:
            missing[name] = f"{peer.package} is not installed"
    if not hasattr(F, "linear_cross_entropy"):
        missing["linear_cross_entropy"] = f"torch {torch.__version__} does not have it"
    return missing


class PeerProblem(Problem):
    """The problem as one peer sees it: no weights, the mean over all rows with a target."""

    def __init__(self, peer: str, shape: Shape, dtype: torch.dtype, device: str):
        super().__init__(shape, dtype, "uniform", device)
        self.linear = peer in LINEAR
        self.targets = shift_to_heads(self.target_ids, shape[2], IGNORE_INDEX).flatten()

    def call(self, provider: str, direction: str) -> Callable[[], tuple[Tensor, ...]]:
        inputs = self._leaves(self.logits)

        def loss() -> Tensor:
            rows = (tensor.flatten(0, -2) for tensor in inputs)
            return PEERS[provider].loss(*rows, self.targets)

        return without_gradient(loss) if direction == "forward" else with_gradient(loss, inputs)

    @functools.cached_property
    def _truth(self) -> tuple[Tensor, ...]:
        if self.linear:  # the gradients of its factors are no gradient of the logits
            hidden, classifier = (factor.detach().float() for factor in self._leaves(self.pristine))
            return (F.cross_entropy((hidden @ classifier.T).flatten(0, 2), self.targets),)
        logits = self.pristine.float().requires_grad_()
        loss = F.cross_entropy(logits.flatten(0, 2), self.targets)
        return loss.detach(), *torch.autograd.grad(loss, logits)

    def _leaves(self, logits: Tensor) -> tuple[Tensor, ...]:
        return leaves("cce" if self.linear else "", logits)
