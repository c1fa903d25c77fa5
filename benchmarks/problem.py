"""What is timed: the cases, the inputs of one shape, and what a provider does with them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wmtp.benchmarks import providers
from wmtp.benchmarks.providers import (
    FLOORS,
    LINEAR,
    LINEAR_GRAD_HEADS,
    LINEAR_OPTIONS,
    LOGITS,
    LOGITS_OPTIONS,
    OURS,
    PEERS,
    Loss,
    Provider,
    Weights,
)
from wmtp.labels import IGNORE_INDEX, shift_to_heads
from wmtp.ops.product import Linear
from wmtp.records import LinearInputs, LinearSettings
from wmtp.reference import compute_weighted_mtp_loss
from wmtp.unembedding import GradHeads, Unembedding, logits_of

Record = dict[str, Any]  # of JSON: a case's fields, and what was found
Shape = tuple[int, int, int, int]  # of the logits: [B, S, H, V]
THREADS = torch.get_num_threads()
WEIGHTINGS = ("given", "uniform", "ref_ce")
RULES = tuple(providers.rules(*(torch.empty(0),) * 3))
SELECTIONS = tuple(providers.selections(torch.empty(0)))
TRUTH = "eager torch in float32"
# Against eager_float. Native 16-bit eager rounds its cross entropy and its probabilities.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# torch's chunked one adds up the loss in the inputs' dtype, a few rows at a time: 0.066 off in
# bfloat16 at V = 128256. Its gradients are held to what the others' are.
LOSS_TOLERANCE = {("linear_cross_entropy", torch.bfloat16): 0.1}


class Case(NamedTuple):
    """One row of a table: these fields identify it within a run."""

    study: str
    shape: Shape
    dtype: str
    direction: str
    provider: str
    weighting: str = "given"  # "none": the provider knows no weights
    threads: int = THREADS
    dim: int = 0  # D, where the loss is given hidden states; else it is given the logits
    tier: str = ""  # that the kernels are forced into; "": as the library chooses

    def __str__(self) -> str:
        last = [f"D{self.dim}"] if self.dim else []
        last += [self.tier] if self.tier else []
        return "-".join([self.study, "x".join(map(str, self.shape)), *map(str, self[2:7]), *last])

    def fields(self) -> dict[str, Any]:
        """For JSON; the tier only where there is one."""
        known = self._asdict()
        return {name: known[name] for name in known if name != "tier" or known[name]}

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def logits_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def gradient_bytes(self) -> int:
        """Of what a linear case hands out: the hidden states' gradient, and the weight's."""
        rows = math.prod(self.shape[:3])
        whose = rows if self.direction == "frozen" else rows + self.shape[3]
        return whose * self.dim * self.torch_dtype.itemsize

    def floor(self) -> "Case":
        """The matrix products that a linear case cannot do without."""
        return self._replace(provider=FLOORS[self.direction], weighting="uniform")

    def gigabytes_per_second(self, milliseconds: float) -> float:
        """Of the bytes that the job needs: one read of the logits, one write for a gradient."""
        reads_only = self.direction == "forward" and self.provider != "copy"
        return (1 if reads_only else 2) * self.logits_bytes() / (1e6 * milliseconds)


class Problem:
    """Random inputs, targets and weights; the logits can be had afresh after an in-place call.

    Args:
        shape: of the logits.
        dim: D, where the loss is given hidden states and unembedding, whose logits' variance is 1.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str = "cpu", dim: int = 0):
        batch, length, heads, vocabulary = shape
        torch.manual_seed(0)
        self.contestants = {**LOGITS, **PEERS, **LOGITS_OPTIONS}
        if dim:
            self.contestants = {**LINEAR, **LINEAR_OPTIONS, **LINEAR_GRAD_HEADS}
        self.shape, self.dtype, self.dim = shape, dtype, dim
        random = functools.partial(torch.randn, device=device, dtype=dtype)
        self.pristine = random((*shape[:3], dim or vocabulary))
        self.inputs: tuple[Tensor, ...] = (self.pristine if dim else self.pristine.clone(),)
        if dim:
            self.inputs += (random(vocabulary, dim).mul_(dim**-0.5),)
        for tensor in self.inputs:
            tensor.requires_grad_()
        self.target_ids = torch.randint(vocabulary, (batch, length), device=device)
        self.targets = shift_to_heads(self.target_ids, heads, IGNORE_INDEX).flatten()
        given = torch.rand(batch, length, heads, device=device) + 0.1
        # A cross entropy of these logits is log V + 0.5, give or take 1.
        ref_ce = torch.rand(batch, length - 1, device=device) + math.log(vocabulary)
        self.weights = {"given": Weights(given), "ref_ce": Weights(ref_ce=ref_ce)}
        values = torch.randn(batch, length, device=device)
        center = torch.rand(heads, device=device)
        rules = providers.rules(values, ref_ce, center) | providers.selections(ref_ce)
        for name, rule in rules.items():
            self.weights[name] = Weights(weighting=rule)
        self._truths: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}

    def restore(self) -> None:
        """Undo what an in-place call did to the logits."""
        if not self.dim:
            with torch.no_grad():
                self.inputs[0].copy_(self.pristine)

    def forget_truth(self) -> None:
        """It is as large as the inputs in float32."""
        self._truths.clear()

    def call(
        self, provider: str, direction: str, weighting: str = "given", **options: Any
    ) -> Callable[[], tuple[Tensor, ...]]:
        """What is timed and measured; it returns the loss, if it is one, and the gradients.

        Args:
            options: of our own losses.
        """
        if provider == "copy":
            destination = torch.empty_like(self.pristine)
            return lambda: (destination.copy_(self.inputs[0].detach()),)
        if provider in FLOORS.values():
            valid, (hidden, weight) = self.targets != IGNORE_INDEX, self.inputs
            x = hidden.detach().flatten(0, 2)[valid]
            return functools.partial(getattr(providers, provider), x, weight.detach())
        one = self.contestants[provider]
        inputs = self._inputs_of(one, self.inputs)
        if direction == "frozen":
            inputs = (inputs[0], inputs[1].detach())
        options = options if provider in OURS else {}
        weights = self.weights.get(weighting, Weights())
        loss = functools.partial(one.loss, *inputs, self.target_ids, weights, **options)
        if not one.weighted:
            loss = functools.partial(_of_rows, one.loss, inputs, self.targets)
        if direction == "forward":
            return functools.partial(_forward, loss)
        return functools.partial(_step, loss, [t for t in inputs if t.requires_grad])

    def check(self, provider: str, direction: str, weighting: str = "given") -> None:
        """Call and compare.

        Raises:
            AssertionError: they disagree.
        """
        self.restore()
        self.compare(provider, self.call(provider, direction, weighting)(), weighting)

    def compare(self, provider: str, found: tuple[Tensor, ...], weighting: str = "given") -> None:
        """Compare the loss and the gradients that a call returned with eager torch in float32.

        The products of a floor are no loss.

        Raises:
            AssertionError: they disagree.
        """
        if provider in FLOORS.values():
            return
        names = ["loss", "gradient", "gradient of the classifier"]
        if provider == "copy":
            wanted: tuple[Tensor, ...] = (self.pristine,)
        else:
            one = self.contestants[provider]
            wanted = self._truth(one, weighting)[: 1 if one.loss_only else None]
        if self.dim:
            names[1:] = ["gradient of the hidden states", "gradient of the weight"]
        tolerances = [TOLERANCE[self.dtype]] * len(names)
        tolerances[0] = LOSS_TOLERANCE.get((provider, self.dtype), tolerances[0])
        for name, got, want, tolerance in zip(names, found, wanted, tolerances, strict=False):
            assert_close(name, provider, got, want, tolerance)

    def _truth(self, one: Provider, weighting: str) -> tuple[Tensor, ...]:
        """Its loss and gradients; a mean cross entropy for who knows no weights."""
        key = one.factors, weighting, one.weighted, tuple(one.options.items())
        if key not in self._truths:
            inputs = self._inputs_of(one, (self.pristine, *self.inputs[1:]))
            exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
            logits = exact[0] if len(exact) == 1 else exact[0] @ exact[1].T  # of stand-ins
            reduction = "weight_mean" if self.dim or not one.weighted else "token_mean"
            weights = self.weights.get(weighting if one.weighted else "none", Weights())
            options = dict(one.options)
            if self.dim:
                names = ("hidden_grad_heads", "weight_grad_heads")
                heads = GradHeads(*(options.pop(name, None) for name in names))
                logits = logits_of(exact[0], Unembedding(exact[1], None), heads)
            if options or weights.weighting is not None:
                how: dict[str, Any] = {"horizon": self.shape[2], "reduction": reduction}
                if weights.weighting is not None and not self.dim:
                    how["reduction"] = None  # the rule's own
                how |= {**weights._asdict(), **options}
                loss = compute_weighted_mtp_loss(logits, self.target_ids, **how).loss
            else:
                loss = providers.eager(logits, self.target_ids, weights, reduction)
            # Of other weightings none is kept: each holds gradients in float32.
            self._truths = {k: held for k, held in self._truths.items() if k[1] == weighting}
            self._truths[key] = loss.detach(), *torch.autograd.grad(loss, exact)
        return self._truths[key]

    def _inputs_of(self, one: Provider, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the provider is called with, and differentiated by."""
        if not one.factors:
            return inputs
        logits = inputs[0]
        size = min(one.factors, *logits.shape[1::2])
        factors = (logits[..., :size], logits[0, :size, 0].T * size**-0.5)
        return tuple(factor.detach().clone().requires_grad_() for factor in factors)


def _of_rows(loss: Loss, inputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    return loss(*(tensor.flatten(0, -2) for tensor in inputs), targets)


def _forward(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (loss(),)


def _step(loss: Callable[[], Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    value = loss()
    return value, *torch.autograd.grad(value, inputs)


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


def case_of(record: Record) -> Case:
    """A record's, whatever else is in it."""
    fields = {name: record[name] for name in Case._fields if name in record}
    return Case(**{**fields, "shape": tuple(record["shape"])})


def plan_of(shape: Shape, dim: int, dtype: torch.dtype, chunk_bytes: int | None = None) -> Linear:
    """How the library computes a linear problem; its tensors have no memory."""
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    hidden, weight = empty((*shape[:3], dim)), empty((shape[3], dim))
    widest = torch.promote_types(dtype, torch.float32)
    inputs = LinearInputs(hidden=hidden, weight=weight, target_ids=hidden[..., 0, 0][:, 1:])
    settings = LinearSettings(
        rule="",
        reduction="sum",
        ignore_index=-100,
        backend="auto",
        dtype=dtype,
        accum_dtype=widest,
        chunk_bytes=chunk_bytes,
        wanted=[True] * 3,
    )
    return Linear.of(inputs, settings)
