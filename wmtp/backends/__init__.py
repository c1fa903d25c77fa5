"""Which implementation runs: C++ on CPUs, Triton on GPUs, eager torch elsewhere."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from wmtp import kernels
from wmtp.backends import cpu
from wmtp.backends.protocol import Backend
from wmtp.kinds import check_choice
from wmtp.once import warn_once
from wmtp.transforms import is_batched
from wmtp.weightings.base import rule_of

BACKENDS: dict[str, Backend] = {"cpu": cpu, "triton": kernels}
NAMES = ("auto", *BACKENDS, "eager")
DEFAULT_FOR_DEVICE = {
    "cpu": "cpu",
    "cuda": "triton",
}  # ROCm devices call themselves cuda


def choose_backend(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that will run: `backend` itself, or what "auto" means for this device.

    Raises:
        ValueError: unknown backend, or one that cannot take tensors of this device or dtype.
        RuntimeError: a backend asked for by name is not available here; says why and the remedy.
    """
    check_choice("backend", backend, NAMES)
    chosen = DEFAULT_FOR_DEVICE.get(device_type, "eager") if backend == "auto" else backend
    if chosen == "eager":
        return chosen
    if chosen == "cpu" and device_type != "cpu":
        raise ValueError(
            f"backend 'cpu' takes CPU tensors, got {device_type}: use backend='auto' or move them"
        )
    if chosen == "triton" and dtype == torch.float64:
        raise ValueError(
            "backend 'triton' takes float32, bfloat16 and float16 logits, got float64: "
            "use backend='eager', or the CPU"
        )
    reason = BACKENDS[chosen].unavailable()
    if reason is None and chosen == "triton" and device_type == "cpu":
        reason = _interpreter_missing()
    if reason is None:
        return chosen
    if backend != "auto":
        raise RuntimeError(f"backend {chosen!r} is not available: {reason}")
    warn_once(f"wmtp runs in eager torch, backend {chosen!r} is not available: {reason}")
    return "eager"


def fuses(backend: str, rule: str) -> bool:
    """Whether a backend has a twin of the rule of this `Weighting.key`; where not it says so."""
    found = BACKENDS[backend].fuses(rule)
    if not found and not any(part.selects for part in rule_of(rule).parts()):
        warn_once(
            f"{type(rule_of(rule)).__name__} has no twin for backend {backend!r}: the loss reads "
            "its logits once for the cross entropies and once more for the gradient"
        )
    return found


# To torch.compile the answers are constants of the trace, whatever it takes to find them: as with
# torch.compiler.assume_constant_result, which costs a second's import of torch._dynamo.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
fuses._dynamo_marked_constant = True  # type: ignore[attr-defined]


def multiply(grad: Tensor, factor: Tensor | None, backend: str) -> Tensor:
    """A gradient [B, S, H, V] or [B, S, V] that was written ahead, times what came from above [].

    In place, and nothing is read where that is 1; None says so beforehand. Traced, its value is not
    known yet.
    """
    if factor is None:
        return grad
    if type(factor) is not Tensor or is_in_torch_dispatch_mode() or is_batched(factor):
        return torch.where(factor == 0, 0.0, grad * factor).to(grad.dtype)  # as the kernels do
    return BACKENDS[backend].multiply_(grad, factor)


def _interpreter_missing() -> str | None:
    if kernels.interpreted():
        return None
    return (
        "the tensors are on the CPU and Triton runs there only in its interpreter: "
        "set TRITON_INTERPRET=1 before the first import, or use backend='cpu'"
    )
