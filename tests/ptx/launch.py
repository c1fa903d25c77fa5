"""The machine in place of a card: Triton's own launcher compiles for a card that is not here, and
what it then launches runs on the CPU tensors' memory.

TRITON_INTERPRET must not be set to 1 when Triton is first imported.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from ptx.findings import Record, UnknownError
from ptx.machine import LANES_AT_ONCE, Compiled, Machine
from ptx.memory import Global
from ptx.parse import parse
from ptx.values import TYPES, Values

ARCHITECTURES = {"sm_80": 80, "sm_90a": 90}
CACHE = Path(__file__).parents[2] / "build" / "ptx"
Change = Callable[[str], str]


class Driver:
    """What Triton asks of a device's driver, and Compiled kernels instead of loaded ones."""

    def __init__(self, architecture: str, record: Record):
        self.target = GPUTarget("cuda", ARCHITECTURES[architecture], 32)
        self.record = record
        self.utils = self
        self.listed: list[torch.UntypedStorage] = []  # of the heads of the last list
        # What a test does to the PTX, and to an argument's tensor, before it is run.
        self.change: Change | None = None
        self.replace: Callable[[str, torch.Tensor], torch.Tensor] | None = None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448 if self.target.arch >= 90 else 166912}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), kernel.decode(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return functools.partial(self.launch, source, metadata)

    def launch(self, source: Any, metadata: Any, *arguments: Any) -> None:
        grid, text, values = arguments[:3], arguments[4], arguments[9:]
        if self.change is not None:
            text = self.change(text)
        try:
            run(source, metadata, grid, text, values, self)
        except UnknownError as missing:
            self.record.add(metadata.name, "unknown", missing)
            raise


@functools.lru_cache(maxsize=512)
def compiled(text: str) -> Compiled:
    return Compiled(parse(text))


def run(
    source: Any, metadata: Any, grid: Any, text: str, values: tuple[Any, ...], driver: Driver
) -> None:
    """A launch, batch by batch."""
    code = compiled(text)
    memory, record = Global(driver.listed), driver.record
    named = zip(source.signature.items(), values, strict=True)
    given = [(name, kind, value) for (name, kind), value in named if kind != "constexpr"]
    parameters = []
    for (name, kind, value), held in zip(given, code.kernel.parameters, strict=False):
        if isinstance(value, torch.Tensor) and driver.replace is not None:
            value = driver.replace(name, value)
        parameters.append(parameter(kind, value, held, memory))
    # What is left is scratch memory of Triton's, which no kernel here has.
    left = code.kernel.parameters[len(parameters) :]
    parameters += [np.zeros(1, TYPES[held]) for held in left]

    ctas = getattr(metadata, "num_ctas", 1)
    programs = int(np.prod(grid))
    at_once = max(LANES_AT_ONCE // (code.kernel.threads * ctas), 1)
    shared = (metadata.shared, smallest_access(text))
    for first in range(0, programs, at_once):
        chosen = np.arange(first, min(first + at_once, programs))
        machine = Machine(code, chosen, grid, ctas, parameters, memory, shared, record)
        machine.run()
    record.counts["launches"] += 1
    record.counts["programs"] += programs
    record.counts[f"launches of {metadata.name}"] += 1


def parameter(kind: str, value: Any, held: str, memory: Global) -> Values:
    """An argument, as the type that the PTX declares."""
    if isinstance(value, torch.Tensor):
        return np.array([memory.address(value)], np.uint64)
    if kind.startswith("fp"):
        return np.array([value], TYPES[held]).view(f"u{int(held[1:]) // 8}")
    bits = 8 * np.dtype(TYPES[held]).itemsize
    return np.array([int(value) & ((1 << bits) - 1)], TYPES[f"u{bits}"])


@functools.lru_cache(maxsize=512)
def smallest_access(text: str) -> int:
    """To shared memory, in bytes."""
    instructions = compiled(text).kernel.instructions()
    words = [found.opcode.split(".") for found in instructions if ".shared" in found.opcode]
    sizes = [int(each[-1][1:]) // 8 for each in words if each[0] in ("ld", "st")]
    return min([4, *sizes])


def install(architecture: str) -> Driver:
    """For this process."""
    from wmtp import kernels

    if architecture not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise pytest.UsageError(f"WMTP_KERNELS_ON must be {known}, got {architecture!r}")
    driver = Driver(architecture, Record())
    # The machine's binary is the PTX itself.
    CUDABackend.make_cubin = lambda self, ptx, *_: ptx.encode()
    triton.knobs.cache.dir = str(CACHE)
    triton.runtime.driver.set_active(driver)
    # Kernels run on CPU tensors, as they do in the interpreter.
    kernels.interpreted = lambda: True
    _note_lists(driver)
    return driver


def _note_lists(driver: Driver) -> None:
    """A kernel that is given one of a list of heads finds the others from there."""
    from wmtp.kernels import loss

    as_rows = loss.as_rows

    def noting(logits: Sequence[torch.Tensor]) -> Any:
        driver.listed = [head.untyped_storage() for head in logits]
        return as_rows(logits)

    loss.as_rows = noting
