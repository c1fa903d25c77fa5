"""The C++ kernel and its machine: arithmetic, instruction sets, threads, forks, memory, library."""

import math
import mmap
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch

from agreement import assert_identical, loss_and_gradient, make_case
from wmtp import cpu, fused_weighted_mtp_loss
from wmtp.checks import FLOAT_DTYPES
from wmtp.labels import IGNORE_INDEX

missing = cpu.unavailable()
needs_kernel = pytest.mark.skipif(missing is not None, reason=f"no CPU kernel: {missing}")
every_instruction_set = pytest.mark.usefixtures("instruction_set", "unwritten_is_nan")
fused = partial(fused_weighted_mtp_loss, backend="cpu")


@pytest.fixture
def unloaded():
    """As before the first use of the library, and so again afterwards."""
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


def run_python(code):
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr


def log_sum_exp(logits, target_ids):
    return cpu.token_loss(logits, target_ids, None, None, 0.7, False, True, IGNORE_INDEX)[4]


@every_instruction_set
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1.2e-7), (torch.float64, 4e-16)])
def test_exponential(dtype, bound):
    """With lse 0 and scale 1 the gradient is exp(x) itself, the target's column apart."""
    x = torch.cat([torch.linspace(-87, 0.3, 9999), torch.tensor([-89.0, -1e30, -math.inf, 0.0])])
    if dtype == torch.float64:
        x = torch.cat([torch.linspace(-708, -87, 9999), x[:9999], x[-4:] * 8])
    x = x.to(dtype)
    logits, target_ids = x.expand(1, 2, 1, -1), torch.tensor([[0, len(x) - 1]])
    one, zero = torch.ones(1, 2, 1, dtype=dtype), torch.zeros(1, 2, 1, dtype=dtype)
    p = cpu.row_gradient(logits, target_ids, zero, one, IGNORE_INDEX)[0, 0, 0]
    exact = x[:-4].double().exp()
    assert ((p[:-4].double() - exact) / exact).abs().max() < bound
    assert p[-4:].tolist() == [0.0, 0.0, 0.0, 0.0]


@every_instruction_set
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_read_exactly(dtype):
    """With V = 1 the log-sum-exp of a row is its one logit."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    logits = torch.cat([bits, bits[:1]]).view(dtype).view(1, -1, 1, 1)
    target_ids = torch.zeros(1, 2**16 + 1, dtype=torch.int64)
    lse = log_sum_exp(logits, target_ids).flatten()[:-1]
    expected = logits.float().flatten()[:-1]
    expected[expected == -math.inf] = math.nan
    torch.testing.assert_close(lse, expected, rtol=0, atol=0, equal_nan=True)


@every_instruction_set
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradient_is_the_fp32_one_rounded_once(dtype, scale):
    """To nearest even, through float16's subnormals and beyond its largest number."""
    case = make_case((2, 9, 4, 999), dtype, ignored=0.3)
    logits, target_ids = case.logits, case.target_ids
    lse = log_sum_exp(logits, target_ids)
    row_scalar = torch.randn(2, 9, 4) * scale
    logits[1] = lse[1] = 0  # exp(0) = 1: there the gradient is row_scalar,
    bits = row_scalar[1].to(dtype).view(torch.int16)  # here halfway between two neighbours
    row_scalar[1] = (bits.view(dtype).float() + (bits + 1).view(dtype).float()) / 2
    grad = cpu.row_gradient(logits, target_ids, lse, row_scalar, IGNORE_INDEX)
    wide = cpu.row_gradient(logits.float(), target_ids, lse, row_scalar, IGNORE_INDEX)
    torch.testing.assert_close(grad, wide.to(dtype), rtol=0, atol=0, equal_nan=True)


@every_instruction_set
def test_offsets_beyond_32_bits():
    """Two sequences 2^31 elements apart, in memory of which only the touched pages exist."""
    case = make_case((2, 4, 1, 8), torch.bfloat16, ignored=0)
    near = loss_and_gradient(fused, case)
    stride = 2**31 + 64
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (stride + 64)), dtype=torch.bfloat16)
    case.logits = memory.as_strided((2, 4, 1, 8), (stride, 8, 8, 1)).copy_(case.logits)
    assert_identical(loss_and_gradient(fused, case), near)


@every_instruction_set
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_every_number_of_threads_gives_the_same_numbers(dtype):
    case = make_case((2, 16, 2, 20000), dtype, ignored=0.3)
    one = loss_and_gradient(fused, case)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_identical(loss_and_gradient(fused, case), one)


@needs_kernel
def test_forked_child_of_a_threaded_parent():
    """OpenMP's threads do not survive a fork; a child that waited for them would never return."""
    run_python(
        """
        import os, time, torch
        from wmtp import mtp_cross_entropy
        torch.set_num_threads(2)
        logits, ids = torch.randn(1, 40, 2, 20000), torch.zeros(1, 40, dtype=torch.int64)
        expected = mtp_cross_entropy(logits, ids, backend="cpu")
        pid = os.fork()
        if pid == 0:
            same = torch.equal(mtp_cross_entropy(logits, ids, backend="cpu"), expected)
            os._exit(0 if same else 1)
        for _ in range(300):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.1)
        else:
            os.kill(pid, 9)
        assert done and status == 0, status if done else "the child hangs"
        """
    )


def test_import_loads_no_library():
    run_python("from wmtp import cpu; assert cpu._library.cache_info().currsize == 0")


def test_every_instruction_set_answers_to_its_name(instruction_set):
    assert cpu.instruction_set() == instruction_set


@needs_kernel
@pytest.mark.usefixtures("unloaded")
def test_environment_chooses_the_instruction_set(monkeypatch):
    monkeypatch.setenv("WMTP_CPU_ISA", "baseline")
    assert cpu.instruction_set() == "baseline"
    cpu._library.cache_clear()
    monkeypatch.setenv("WMTP_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match="WMTP_CPU_ISA must be avx512, avx2 or baseline"):
        cpu.instruction_set()


@pytest.mark.usefixtures("unloaded")
def test_missing_library_has_a_reason_and_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "libwmtp_cpu.so")
    assert "was not built" in cpu.unavailable()
    assert "compiler" in cpu.unavailable()
    cpu.LIBRARY.write_bytes(b"not a library")
    assert "does not load" in cpu.unavailable()
