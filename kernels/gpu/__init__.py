"""The Triton backend: one kernel, one file, and what `wmtp.backends.protocol` asks of each backend.

Triton is imported with the first of them, not with this package: `unavailable()` says what to do
where it is missing.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from wmtp.weightings.base import rule_of

if TYPE_CHECKING:
    from wmtp.kernels.gradient_kernel import row_gradient
    from wmtp.kernels.loss import weighted_loss
    from wmtp.kernels.rows_ce import new_rows, next_token_ce, rows_ce_
    from wmtp.kernels.scale_kernel import multiply_

__all__ = [
    "fuses",
    "interpreted",
    "multiply_",
    "new_rows",
    "next_token_ce",
    "row_gradient",
    "rows_ce_",
    "unavailable",
    "weighted_loss",
]

_MODULES = {
    "multiply_": "wmtp.kernels.scale_kernel",
    "row_gradient": "wmtp.kernels.gradient_kernel",
    "new_rows": "wmtp.kernels.rows_ce",
    "next_token_ce": "wmtp.kernels.rows_ce",
    "rows_ce_": "wmtp.kernels.rows_ce",
    "weighted_loss": "wmtp.kernels.loss",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def fuses(rule: str) -> bool:
    found = rule_of(rule)
    parts = found.parts()
    return found.known or (len(parts) <= 2 and all(part.device is not None for part in parts))


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return False
    # The decorator decided when the kernels were defined, whatever the environment says later.
    rows = importlib.import_module("wmtp.kernels.rows")
    return type(rows.exp).__name__ == "InterpretedFunction"


def unavailable() -> str | None:
    """Why the Triton kernels cannot run here, and the remedy; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (torch's CUDA builds bring their own)"
    if torch.cuda.is_available() or interpreted():
        return None
    return (
        "no CUDA or ROCm device was found: use backend='cpu', or set TRITON_INTERPRET=1 before "
        "the first import to run the kernels slowly, in Triton's interpreter"
    )
