"""The inputs of the linear loss of one shape, and what a provider does with them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wmtp.benchmarks.linear_providers import FLOORS, PROVIDERS, UNWEIGHTED, rows_and_targets
from wmtp.benchmarks.problem import (
    TOLERANCE,
    Problem,
    Shape,
    assert_close,
    random_weights,
    with_gradient,
)
from wmtp.ops.chunks import Linear

# torch's chunked one adds up the loss in the inputs' dtype, a few rows at a time: 0.066 off in
# bfloat16 at V = 128256. Its gradients are held to what the others' are.
LOSS_TOLERANCE = {("linear_cross_entropy", torch.bfloat16): 0.1}


class LinearProblem:
    """Random hidden states, unembedding, targets and weights; the logits' variance is 1."""

    def __init__(
        self,
        shape: Shape,
        dim: int,
        dtype: torch.dtype,
        device: str = "cpu",
        weighting: str = "uniform",
    ):
        batch, length, _, vocabulary = shape
        torch.manual_seed(0)
        self.hidden = torch.randn(*shape[:3], dim, device=device, dtype=dtype).requires_grad_()
        weight = torch.randn(vocabulary, dim, device=device, dtype=dtype)
        self.weight = weight.mul_(dim**-0.5).requires_grad_()
        self.target_ids = torch.randint(vocabulary, (batch, length), device=device)
        self.weighting = weighting
        self._weights = random_weights(shape, device)
        self._truths: dict[str, tuple[Tensor, ...]] = {}

    def weighted(self, weighting: str) -> LinearProblem:
        """The same tensors under other weights, of WEIGHTINGS."""
        twin = copy.copy(self)
        twin.weighting = weighting
        return twin

    def restore(self) -> None:
        """No provider changes its inputs."""

    def call(
        self, provider: str, direction: str, **options: Any
    ) -> Callable[[], tuple[Tensor, ...]]:
        """What is timed and measured; it returns the loss, if it is one, and the gradients.

        Args:
            options: of the fused loss.
        """
        if provider in FLOORS:
            x, weight, _ = rows_and_targets(self.hidden, self.target_ids, self.weight)
            return functools.partial(FLOORS[provider], x.detach(), weight.detach())
        inputs: tuple[Tensor, ...] = (self.hidden, self.weight)
        if direction == "frozen":
            inputs = (self.hidden,)
        weight = self.weight if len(inputs) == 2 else self.weight.detach()
        weights = () if provider in UNWEIGHTED else self._weights[self.weighting]
        options = options if provider == "fused" else {}
        arguments = (self.hidden, weight, self.target_ids, *weights)
        return with_gradient(functools.partial(PROVIDERS[provider], *arguments, **options), inputs)

    def forget_truth(self) -> None:
        """It is as large as the weight in float32."""
        self._truths.clear()

    def check(self, provider: str, direction: str) -> None:
        """Call and compare."""
        self.compare(provider, self.call(provider, direction)())

    def compare(self, provider: str, found: tuple[Tensor, ...]) -> None:
        """Compare the loss and the gradients that a call returned with eager torch in float32.

        The products of a floor are no loss.

        Raises:
            AssertionError: they disagree.
        """
        if provider in FLOORS:
            return
        dtype = self.hidden.dtype
        tolerances = [TOLERANCE[dtype]] * 3
        tolerances[0] = LOSS_TOLERANCE.get((provider, dtype), tolerances[0])
        names = ("loss", "gradient of the hidden states", "gradient of the weight")
        for name, got, want, tolerance in zip(
            names, found, self._truth(), tolerances, strict=False
        ):
            assert_close(name, provider, got, want, tolerance)

    def _truth(self) -> tuple[Tensor, ...]:
        """The loss and both gradients."""
        if self.weighting not in self._truths:
            inputs = [
                tensor.detach().float().requires_grad_() for tensor in (self.hidden, self.weight)
            ]
            weights = self._weights[self.weighting]
            loss = PROVIDERS["eager"](*inputs, self.target_ids, *weights)
            self._truths[self.weighting] = loss.detach(), *torch.autograd.grad(loss, inputs)
        return self._truths[self.weighting]


def new_problem(
    shape: Shape, dtype: str, weighting: str, dim: int, device: str
) -> Problem | LinearProblem:
    """Given the logits, or hidden states of size `dim`."""
    if dim:
        return LinearProblem(shape, dim, getattr(torch, dtype), device, weighting)
    return Problem(shape, getattr(torch, dtype), weighting, device)


def plan_of(shape: Shape, dim: int, dtype: torch.dtype, chunk_bytes: int | None = None) -> Linear:
    """How the library computes such a problem; its tensors have no memory."""
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    hidden, weight = empty((*shape[:3], dim)), empty((shape[3], dim))
    widest = torch.promote_types(dtype, torch.float32)
    return Linear(hidden, weight, None, dtype, widest, chunk_bytes, "auto", max(shape[1] - 1, 0))
