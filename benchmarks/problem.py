"""What is timed: the cases, the inputs of one shape, and what a provider does with them."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.benchmarks.providers import FACTOR_SIZES, PROVIDERS, leaves

Shape = tuple[int, int, int, int]  # of the logits: [B, S, H, V]
THREADS = torch.get_num_threads()
WEIGHTINGS = ("given", "uniform", "ref_ce")
TRUTH = "eager torch in float32"
# Against eager_float. Native 16-bit eager rounds its cross entropy and its probabilities.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class Case(NamedTuple):
    """One row of a table: these fields identify it within a run."""

    study: str
    shape: Shape
    dtype: str
    direction: str
    provider: str
    weighting: str = "given"
    threads: int = THREADS
    dim: int = 0  # D, where the loss is given hidden states; else it is given the logits

    def __str__(self) -> str:
        study, shape, *rest, dim = self
        last = [f"D{dim}"] if dim else []
        return "-".join([study, "x".join(map(str, shape)), *map(str, rest), *last])


class Problem:
    """Random logits, targets and weights; the logits can be had afresh after an in-place call."""

    def __init__(self, shape: Shape, dtype: torch.dtype, weighting: str, device: str = "cpu"):
        batch, length, _, vocabulary = shape
        torch.manual_seed(0)
        self.device = device
        self.weighting = weighting
        self.pristine = torch.randn(shape, device=device, dtype=dtype)
        self.logits = self.pristine.clone().requires_grad_()
        self.target_ids = torch.randint(vocabulary, (batch, length), device=device)
        self.weights = random_weights(shape, device)[weighting]

    def weighted(self, weighting: str) -> "Problem":
        """Itself, whose weights are chosen once; a LinearProblem has all of them."""
        assert weighting == self.weighting
        return self

    def forget_truth(self) -> None:
        """It is as large as the logits in float32."""
        vars(self).pop("_truth", None)

    def restore(self) -> None:
        """Undo what an in-place call did to the logits."""
        with torch.no_grad():
            self.logits.copy_(self.pristine)

    def call(self, provider: str, direction: str) -> Callable[[], tuple[Tensor, ...]]:
        """What is timed and measured; it returns the loss, and the gradients unless "forward"."""
        if provider == "copy":
            destination = torch.empty_like(self.pristine)
            return lambda: (destination.copy_(self.logits.detach()),)
        inputs = leaves(provider, self.logits)
        loss = functools.partial(PROVIDERS[provider], *inputs, self.target_ids, *self.weights)
        return without_gradient(loss) if direction == "forward" else with_gradient(loss, inputs)

    def check(self, provider: str, direction: str) -> None:
        """Call and compare.

        Raises:
            AssertionError: they disagree.
        """
        self.restore()
        self.compare(provider, self.call(provider, direction)())

    def compare(self, provider: str, found: tuple[Tensor, ...]) -> None:
        """Compare the loss and the gradients that a call returned with eager torch in float32.

        Raises:
            AssertionError: they disagree.
        """
        wanted: tuple[Tensor, ...] = self._truth
        if provider == "copy":
            wanted = (self.pristine,)
        elif provider in FACTOR_SIZES:
            wanted = self._truth_of_factors(provider)
        if provider == "cce":  # whose gradients are not compared
            found = found[:1]
        names = ("loss", "gradient", "gradient of the classifier")
        for name, got, want in zip(names, found, wanted, strict=False):
            assert_close(name, provider, got, want, TOLERANCE[self.pristine.dtype])

    @functools.cached_property
    def _truth(self) -> tuple[Tensor, ...]:
        logits = self.pristine.float().requires_grad_()
        loss = PROVIDERS["eager_float"](logits, self.target_ids, *self.weights)
        return loss.detach(), *torch.autograd.grad(loss, logits)

    def _truth_of_factors(self, provider: str) -> tuple[Tensor, ...]:
        factors = leaves(provider, self.pristine)
        hidden, classifier = (factor.detach().float().requires_grad_() for factor in factors)
        loss = PROVIDERS["eager"](hidden @ classifier.T, self.target_ids, *self.weights)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, classifier))


def random_weights(shape: Shape, device: str) -> dict[str, tuple[Tensor | None, ...]]:
    """(head_weights, ref_ce) of each weighting, for logits whose variance is 1."""
    batch, length, heads, vocabulary = shape
    given = torch.rand(batch, length, heads, device=device) + 0.1
    # A cross entropy of these logits is log V + 0.5, give or take 1.
    ref_ce = torch.rand(batch, length - 1, device=device) + math.log(vocabulary)
    return {"given": (given, None), "uniform": (), "ref_ce": (None, ref_ce)}


def assert_close(
    name: str, provider: str, got: Tensor, want: Tensor, tolerance: float, whose: str = TRUTH
) -> None:
    """The relative error, by the Euclidean norm.

    Args:
        whose: the values that are wanted.

    Raises:
        AssertionError: it is larger than the tolerance.
    """
    error = ((got.detach().float() - want).norm() / want.norm()).item()
    assert error <= tolerance, (
        f"{provider} disagrees with {whose}: relative error {error:.1e} "
        f"of the {name}, {tolerance:.0e} allowed"
    )


def without_gradient(loss: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(),)

    return call


def with_gradient(
    loss: Callable[[], Tensor], inputs: tuple[Tensor, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        value = loss()
        return value, *torch.autograd.grad(value, inputs)

    return call
