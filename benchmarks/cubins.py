"""Kernels compiled elsewhere, by a Triton that knows clusters, in place of those made here.

    python -m benchmarks.static_gpu --cubins FOLDER cuda:90      # anywhere, with Triton >= 3.9
    python -m benchmarks.gpu --cubins FOLDER --out DIR           # on the card, with any Triton

`installed` puts itself where wmtp.kernels.launch launches its kernel, so that everything around
it (weights, sum, autograd, checks) is the library's own and the numbers compare. The launch is that
of Triton's launcher (backends/nvidia/driver.c of 3.9), through the CUDA driver API:

    parameters    those of the kernel that are no constexprs, in order; then two pointers to scratch
                  memory (global, profile), null where the metadata give it a size of 0, as here.
                  The PTX shows both: register_kernel has 28 parameters, and 30 once compiled
    grid          programs x num_ctas, 1, 1: Triton counts clusters, the driver blocks
    attributes    the cluster's size, and that clusters spread over the SMs; 16 blocks a cluster,
                  more than every card must schedule, need a permission of the function's
"""

import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

TORCH_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MOST_PORTABLE_CTAS = 8
DEFAULT_SHARED_BYTES = 48 << 10  # more must be asked for
SCRATCH_POINTERS = 2
WARP = 32

Key = tuple[str, str, int, int, frozenset[tuple[str, Any]]]


class Cubin(NamedTuple):
    """A loaded binary and how it is launched."""

    function: Any
    threads: int
    num_ctas: int
    shared_bytes: int


def unavailable(folder: Path | None) -> str | None:
    """Why cubins cannot be launched here; None where they can."""
    if folder is None:
        return "no --cubins FOLDER was given"
    if not list(folder.glob("*.cubin")):
        return f"{folder} holds none: python -m benchmarks.static_gpu --cubins {folder} cuda:90"
    if importlib.util.find_spec("cuda") is None or not importlib.util.find_spec("cuda.bindings"):
        return "cuda-bindings is not installed"
    return None


@contextlib.contextmanager
def installed(folder: Path, clusters_only: bool = False) -> Iterator[None]:
    """The loss, or what of it needs clusters, is launched from the folder's cubins; a case without
    one raises ValueError."""
    from wmtp.kernels import launch, tiers

    launch_as, machine, library = launch.launch_as, tiers.machine, Library(folder)

    def launch_either(chosen: Any, case: Any) -> None:
        from_folder = chosen.num_ctas > 1 or not clusters_only
        (library.launch_as if from_folder else launch_as)(chosen, case)

    launch.launch_as = launch_either
    # Few rows are not split: there is one kernel a case.
    tiers.machine = lambda device: machine(device)._replace(most_ctas=16, processors=1)
    try:
        yield
    finally:
        launch.launch_as, tiers.machine = launch_as, machine


def key_of(symbol: str, dtype: str, threads: int, num_ctas: int, constants: dict[str, Any]) -> Key:
    """What tells one binary from another; V is no part of it, but through BLOCK."""
    named = {name: getattr(value, "__name__", value) for name, value in constants.items()}
    return symbol, dtype, threads, num_ctas, frozenset(named.items())


def c_arguments(arguments: dict[str, Any]) -> list[Any]:
    """As static_gpu.py has them compiled: strides are 64 bits wide, other integers 32."""

    def as_c(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return ctypes.c_void_p(value.data_ptr())
        return (ctypes.c_int64 if "stride" in name else ctypes.c_int32)(value)

    return [as_c(name, value) for name, value in arguments.items()]


def split(call: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call's arguments in the order of its kernel's parameters, and its constants."""
    arguments: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for parameter in inspect.signature(call.kernel.fn).parameters.values():
        of_kind = constants if "constexpr" in str(parameter.annotation) else arguments
        of_kind[parameter.name] = call.arguments[parameter.name]
    return arguments, constants


def pack(arguments: list[Any]) -> tuple[Any, list[Any]]:
    """(void **, what it points to): the second must live as long as the first."""
    values = [*arguments, *[ctypes.c_void_p(0)] * SCRATCH_POINTERS]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    return pointers, values


class Library:
    """The cubins of a folder, each loaded with its first launch."""

    def __init__(self, folder: Path):
        self._files: dict[Key, Path] = {}
        self._loaded: dict[Key, Cubin] = {}
        for file in sorted(folder.glob("*.json")):
            row = json.loads(file.read_text())
            key = key_of(
                row["symbol"], row["dtype"], row["threads"], row["num_ctas"], row["constants"]
            )
            self._files[key] = file

    def launch_as(self, chosen: Any, case: Any) -> None:
        """As wmtp.kernels.launch.launch_as, which see."""
        from wmtp.kernels.launch import prepare

        *_, call = prepare(chosen, case)
        symbol = "online_kernel" if chosen.tier == "online" else "register_kernel"
        dtype, threads = TORCH_NAMES[case.rows.dtype], WARP * chosen.num_warps
        arguments, constants = split(call)
        cubin = self._load(key_of(symbol, dtype, threads, chosen.num_ctas, constants))
        _launch(cubin, call.grid[0], c_arguments(arguments))

    def _load(self, key: Key) -> Cubin:
        if key not in self._files:
            raise ValueError(f"no cubin of {key[:4]} with {dict(key[4])}")
        if key not in self._loaded:
            self._loaded[key] = _load(self._files[key])
        return self._loaded[key]


def launch_config(cubin: Cubin, programs: int, stream: int) -> Any:
    """CUlaunchConfig."""
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = programs * cubin.num_ctas, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = cubin.threads, 1, 1
    config.sharedMemBytes = cubin.shared_bytes
    config.hStream = driver.CUstream(stream)
    if cubin.num_ctas > 1:
        names = driver.CUlaunchAttributeID
        size, spread = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
        size.id = names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster = size.value.clusterDim
        cluster.x, cluster.y, cluster.z = cubin.num_ctas, 1, 1
        spread.id = names.CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE
        policy = driver.CUclusterSchedulingPolicy.CU_CLUSTER_SCHEDULING_POLICY_SPREAD
        spread.value.clusterSchedulingPolicyPreference = policy
        config.attrs, config.numAttrs = [size, spread], 2
    return config


def _launch(cubin: Cubin, programs: int, arguments: list[Any]) -> None:
    packed, values = pack(arguments)
    config = launch_config(cubin, programs, torch.cuda.current_stream().cuda_stream)
    _check(_driver().cuLaunchKernelEx(config, cubin.function, ctypes.addressof(packed), 0))
    del values  # the driver has copied them


def _load(file: Path) -> Cubin:
    """Into the context of torch, which is current wherever a tensor was made."""
    driver, row = _driver(), json.loads(file.read_text())
    module = _check(driver.cuModuleLoadData(file.with_suffix(".cubin").read_bytes()))
    function = _check(driver.cuModuleGetFunction(module, row["symbol"].encode()))
    attributes = driver.CUfunction_attribute
    if row["shared_bytes"] > DEFAULT_SHARED_BYTES:
        name = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, name, row["shared_bytes"]))
    if row["num_ctas"] > MOST_PORTABLE_CTAS:
        name = attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        _check(driver.cuFuncSetAttribute(function, name, 1))
    return Cubin(function, row["threads"], row["num_ctas"], row["shared_bytes"])


def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _check(answer: tuple[Any, ...]) -> Any:
    """The value of a driver call.

    Raises:
        RuntimeError: the call failed; names the driver's error.
    """
    error, *values = answer
    if int(error) != 0:
        raise RuntimeError(f"the CUDA driver says {error!r}")
    return values[0] if values else None
