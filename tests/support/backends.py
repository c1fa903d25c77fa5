"""Which backends take CPU tensors here."""

from wmtp import kernels
from wmtp.records import RowSettings

# On a machine with a GPU Triton is not in its interpreter; whether one is there is known at import,
# so that no test is collected which would only be skipped.
FUSED_ON_CPU = ("cpu", "triton") if kernels.interpreted() else ("cpu",)
ON_CPU = ("eager", *FUSED_ON_CPU)


def row_settings(**more) -> RowSettings:
    """Of rows as they are, with torch's ignore_index."""
    return RowSettings(**{"ignore_index": -100, "backend": "", **more})
