"""Kernels compiled elsewhere: found, packed, launched through the driver; no card is needed."""

import inspect
import json
import types

import pytest
import torch

from wmtp import fused_weighted_mtp_loss
from wmtp.benchmarks import cubins
from wmtp.benchmarks.gpu_cases import forced_launch
from wmtp.benchmarks.problem import Case, Problem


def cubin(folder, number, symbol="register_kernel", **constants):
    """What static_gpu.py leaves for one kernel of bf16 logits, V = 1000, H = 2."""
    held = {"ROWS": 1, "HEADS": 1, "PROGRAMS": 2, "H": 2, "RULE": None, "COMPARES": False}
    held |= {
        "LISTED": False,
        "GRAD_LISTED": False,
        "IN_PHASE": True,
        "CLUSTER": False,
        "MULTIPLIED": False,
        "BY_HEAD": False,
        "SUMS_TO_ONE": False,
        "BLOCK": 1024,
        **constants,
    }
    row = {"symbol": symbol, "dtype": "bf16", "threads": 32, "num_ctas": 1, "shared_bytes": 64}
    (folder / f"{number}.json").write_text(json.dumps({**row, "constants": held}))
    (folder / f"{number}.cubin").write_bytes(b"\x7fELF")


def needs_interpreter():
    from wmtp import kernels

    if not kernels.interpreted():
        pytest.skip("the Triton kernels do not run on CPU tensors here")


def call_with_cubins(monkeypatch, folder, **options):
    """(file loaded, programs, arguments) of what the library would have launched."""
    launched = []
    # As CUDA's allocations, which begin on 512 bytes, are.
    monkeypatch.setattr("wmtp.kernels.launch.in_phase", lambda *_: True)
    monkeypatch.setattr(cubins, "_load", lambda file: file)
    monkeypatch.setattr(cubins, "_launch", lambda *arguments: launched.append(arguments))
    logits = torch.randn(1, 6, 2, 1000, dtype=torch.bfloat16, requires_grad=True)
    target_ids = torch.randint(1000, (1, 6))
    with cubins.installed(folder):
        fused_weighted_mtp_loss(logits, target_ids, backend="triton", **options)
    ((file, programs, arguments),) = launched
    return file, programs, arguments, logits


def test_a_launch_finds_its_cubin_and_passes_the_kernels_parameters(monkeypatch, tmp_path):
    needs_interpreter()
    from wmtp.kernels.register_kernel import register_kernel

    cubin(tmp_path, 0, BLOCK=2048)
    cubin(tmp_path, 1)
    cubin(tmp_path, 2, RULE="_absolute_excess", ROWS=2, HEADS=2, PROGRAMS=1)
    file, programs, arguments, logits = call_with_cubins(monkeypatch, tmp_path)
    assert (file.name, programs) == ("1.json", 12)
    parameters = inspect.signature(register_kernel.fn).parameters.values()
    names = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
    widths = [8 if name.endswith("_ptr") or "stride" in name else 4 for name in names]
    assert [cubins.ctypes.sizeof(argument) for argument in arguments] == widths
    found = dict(zip(names, (argument.value for argument in arguments), strict=True))
    assert found["logits_ptr"] + 2 * found["lead"] == logits.data_ptr()
    assert (found["stride_b"], found["stride_s"], found["stride_h"]) == (12000, 2000, 1000)
    assert (found["seq_len"], found["vocab_size"], found["ignore_index"]) == (6, 1000, -100)


def test_a_case_without_a_cubin_says_so(monkeypatch, tmp_path):
    needs_interpreter()
    cubin(tmp_path, 0, BLOCK=2048)
    with pytest.raises(ValueError, match=r"no cubin of .*register_kernel"):
        call_with_cubins(monkeypatch, tmp_path)


def test_the_library_launches_itself_again_afterwards(tmp_path):
    needs_interpreter()
    inputs = Problem((1, 6, 2, 1000), torch.float32)
    with pytest.raises(ValueError, match="no cubin"), cubins.installed(tmp_path):
        fused_weighted_mtp_loss(inputs.inputs[0], inputs.target_ids, backend="triton")
    loss = fused_weighted_mtp_loss(inputs.inputs[0], inputs.target_ids, backend="triton").loss
    assert loss.isfinite()


def test_where_only_clusters_come_from_the_folder_all_else_is_launched_as_ever(tmp_path):
    needs_interpreter()
    shape = (1, 2, 2, 17000)
    inputs = Problem(shape, torch.bfloat16)
    (logits,) = inputs.inputs
    case = Case("occupancy", shape, "bfloat16", "forward+backward", "fused", tier="row")
    with cubins.installed(tmp_path, clusters_only=True):
        with forced_launch(case._replace(ctas_per_sm=1), "cpu"):
            loss = fused_weighted_mtp_loss(
                inputs.inputs[0], inputs.target_ids, backend="triton"
            ).loss
        assert loss.isfinite()
        with (
            forced_launch(case._replace(ctas_per_sm=2), "cpu"),
            pytest.raises(ValueError, match="no cubin"),
        ):
            fused_weighted_mtp_loss(logits, inputs.target_ids, backend="triton")


def test_parameters_are_followed_by_two_null_pointers():
    ctypes = cubins.ctypes
    pointers, values = cubins.pack([ctypes.c_int32(7), ctypes.c_float(0.5)])
    assert len(pointers) == len(values) == 4
    read = [type(value).from_address(at).value for at, value in zip(pointers, values, strict=True)]
    assert read == [7, 0.5, None, None]


def test_clusters_are_asked_of_the_driver(monkeypatch):
    kinds = types.SimpleNamespace(
        CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION=4,
        CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE=5,
    )

    def attribute():
        return types.SimpleNamespace(
            value=types.SimpleNamespace(clusterDim=types.SimpleNamespace())
        )

    driver = types.SimpleNamespace(
        CUlaunchConfig=types.SimpleNamespace,
        CUlaunchAttribute=attribute,
        CUlaunchAttributeID=kinds,
        CUclusterSchedulingPolicy=types.SimpleNamespace(CU_CLUSTER_SCHEDULING_POLICY_SPREAD=1),
        CUstream=int,
    )
    monkeypatch.setattr(cubins, "_driver", lambda: driver)
    config = cubins.launch_config(cubins.Cubin(None, 512, 8, 64), programs=12, stream=3)
    assert (config.gridDimX, config.blockDimX, config.sharedMemBytes) == (96, 512, 64)
    size, spread = config.attrs
    assert (size.id, vars(size.value.clusterDim)) == (4, {"x": 8, "y": 1, "z": 1})
    assert (spread.id, spread.value.clusterSchedulingPolicyPreference) == (5, 1)
    assert config.numAttrs == 2
    alone = cubins.launch_config(cubins.Cubin(None, 512, 1, 64), programs=12, stream=3)
    assert not hasattr(alone, "attrs")


def test_the_reason_why_cubins_cannot_be_launched(monkeypatch, tmp_path):
    assert cubins.unavailable(None) == "no --cubins FOLDER was given"
    assert "holds none" in cubins.unavailable(tmp_path)
    cubin(tmp_path, 0)
    monkeypatch.setattr(cubins.importlib.util, "find_spec", lambda name: None)
    assert cubins.unavailable(tmp_path) == "cuda-bindings is not installed"
    monkeypatch.setattr(cubins.importlib.util, "find_spec", lambda name: object())
    assert cubins.unavailable(tmp_path) is None


def test_a_driver_error_is_raised_with_its_name():
    with pytest.raises(RuntimeError, match="the CUDA driver says 700"):
        cubins._check((700,))
    assert cubins._check((0, "value")) == "value"
    assert cubins._check((0,)) is None
