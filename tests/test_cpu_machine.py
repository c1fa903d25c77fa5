"""The C++ kernel and its machine: arithmetic, instruction sets, forks, memory."""

import math
import mmap
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch

from support.agreement import (
    assert_identical,
    cpu_gradient,
    cpu_loss,
    loss_and_gradients,
    make_case,
)
from support.covering import in_pairs
from support.instruction_sets import ALL, HERE
from wmtp import fused_weighted_mtp_loss
from wmtp.backends import cpu
from wmtp.checks import FLOAT_DTYPES

missing = cpu.unavailable()
needs_kernel = pytest.mark.skipif(missing is not None, reason=f"no CPU kernel: {missing}")
every_instruction_set = pytest.mark.usefixtures("instruction_set", "unwritten_is_nan")
fused = partial(fused_weighted_mtp_loss, backend="cpu")


def run_python(code):
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr


@every_instruction_set
@in_pairs(
    instruction_set=HERE,
    dtype=[torch.float32, torch.float64],
    climbs=[False, True],
)
def test_exponential(dtype, climbs):
    """The probability of a column over that of a column where x = 0 is exp(x).

    In units of half an eps: x log2(e) is rounded once where there is no fused multiply-add (x),
    log2(e) itself is off by 0.225 in float32 and by less in float64 (0.225 x), and six stand for
    the polynomial, the scaling of both probabilities and the division by float32's own rounding.
    """
    x = torch.linspace(0, -82, 9999, dtype=torch.float64)
    if climbs:  # as far as one shift is kept: the first 256 say 0
        x = torch.cat([torch.linspace(0, -40, 256), torch.linspace(0, 40, 9000)]).double()
    elif dtype == torch.float64:
        x = torch.cat([x, torch.linspace(-82, -690, 9999)])
    x = x.to(dtype)
    logits, target_ids = x.expand(1, 2, 1, -1), torch.tensor([[0, len(x) - 1]])
    p = cpu_gradient(logits, target_ids, torch.ones(1, 2, 1, dtype=dtype))[0, 0, 0, :-1]
    found, exact = (p / p[0]).double(), x[:-1].double().exp()
    half_eps = torch.finfo(dtype).eps / 2
    allowed = (6 + 1.225 * x[:-1].double().abs()) * half_eps
    assert ((found - exact).abs() / exact / allowed).max() < 1


@every_instruction_set
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_exponential_of_the_far_below(dtype):
    """-inf, and what is below the smallest number, give exactly 0; nothing becomes negative."""
    lowest = -1e4 if dtype == torch.float16 else -1e30
    below = torch.tensor([-math.inf, lowest, -800.0, -104.0, -88.5, -87.0, -80.0], dtype=dtype)
    x = torch.cat([torch.zeros(1, dtype=dtype), below])
    logits, target_ids = x.expand(1, 2, 1, -1), torch.zeros(1, 2, dtype=torch.int64)
    acc = torch.promote_types(dtype, torch.float32)
    p = cpu_gradient(logits, target_ids, torch.ones(1, 2, 1, dtype=acc))[0, 0, 0, 1:]
    assert p[:3].tolist() == [0, 0, 0]
    error = torch.finfo(dtype).smallest_normal + 2e-2 * below.double().exp()
    assert ((p.double() - below.double().exp()).abs() <= error).all()
    assert (p >= 0).all()


@every_instruction_set
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_read_exactly(dtype):
    """With V = 1 the maximum of a row is its one logit."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    logits = torch.cat([bits, bits[:1]]).view(dtype).view(1, -1, 1, 1)
    target_ids = torch.zeros(1, 2**16 + 1, dtype=torch.int64)
    row_max = cpu_loss(logits, target_ids).row_max.flatten()[:-1]
    expected = logits.float().flatten()[:-1]
    expected[expected == -math.inf] = math.nan
    torch.testing.assert_close(row_max, expected, rtol=0, atol=0, equal_nan=True)


@every_instruction_set
@in_pairs(
    instruction_set=HERE,
    dtype=[torch.bfloat16, torch.float16],
    scale=[1e-6, 1.0, 1e5],
)
def test_16_bit_gradient_is_the_fp32_one_rounded_once(dtype, scale):
    """Give or take the 2e-7 of 16-bit storage's shorter polynomial; through float16's subnormals
    and beyond its largest number."""
    case = make_case((2, 9, 4, 999), dtype, ignored=0.3)
    row_scalar = torch.randn(2, 9, 4) * scale
    grad = cpu_gradient(case.logits, case.target_ids, row_scalar)
    wide = cpu_gradient(case.logits.float(), case.target_ids, row_scalar)
    within = torch.stack([wide * (1 - 6e-7), wide * (1 + 6e-7)]).to(dtype)
    assert ((grad >= within.amin(0)) & (grad <= within.amax(0))).all()
    assert torch.count_nonzero(grad)


@every_instruction_set
@in_pairs(
    instruction_set=HERE,
    dtype=[torch.bfloat16, torch.float16],
    inplace=[False, True],
)
def test_16_bit_gradient_is_rounded_to_nearest_even(dtype, inplace):
    """Every pair of neighbours, from the middle; 1024 equal logits have probability 2^-10."""
    bits = torch.arange(2**15, dtype=torch.int16)
    bits = bits[bits.view(dtype).abs() < torch.finfo(dtype).max / 2048]
    middle = (bits.view(dtype).float() + (bits + 1).view(dtype).float()) / 2
    if dtype == torch.bfloat16:  # subnormal results may be flushed: a test of its own
        bits, middle = bits[keep := middle >= 2.0**-115], middle[keep]
    logits = torch.zeros(1, len(bits) + 1, 1, 1024, dtype=dtype)
    target_ids = torch.full((1, len(bits) + 1), 1023)
    weights = torch.cat([middle, middle[:1]]).view(1, -1, 1) * 1024
    written = "inplace" if inplace else "new"
    out = cpu_loss(logits, target_ids, weights, reduction="sum", gradient=written)
    assert out.factors[1] == 1  # float16: the largest weight decides
    grad = out.grad
    even = bits + (bits & 1)
    assert torch.equal(grad[0, :-1, 0, 0], even.view(dtype))
    assert (grad[0, :-1, 0, :1023] == grad[0, :-1, 0, :1]).all()


@every_instruction_set
def test_subnormal_bf16_results_are_flushed_or_exact():
    """AVX-512 BF16 rounds in hardware, which knows no subnormal numbers."""
    weights = torch.full((1, 2, 1), 2.0**-128 * 1024)
    logits = torch.zeros(1, 2, 1, 1024, dtype=torch.bfloat16)
    out = cpu_loss(logits, torch.tensor([[0, 7]]), weights, reduction="sum", gradient="new")
    others = out.grad[0, 0, 0, torch.arange(1024) != 7].unique().tolist()
    assert others == [0.0 if cpu.instruction_set() == "avx512_bf16" else 2.0**-128]


@every_instruction_set
def test_offsets_beyond_32_bits():
    """Two sequences 2^31 elements apart, in memory of which only the touched pages exist."""
    case = make_case((2, 4, 1, 8), torch.bfloat16, ignored=0)
    near = loss_and_gradients(fused, case)
    stride = 2**31 + 64
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (stride + 64)), dtype=torch.bfloat16)
    case.logits = memory.as_strided((2, 4, 1, 8), (stride, 8, 8, 1)).copy_(case.logits)
    assert_identical(loss_and_gradients(fused, case), near)


@needs_kernel
def test_a_process_of_its_own():
    """Nothing is loaded at import. Scripts set the default device to their GPU; the logits here are
    on the CPU all the same. OpenMP's threads do not survive a fork; a child that waited for them
    would never return."""
    run_python(
        """
        import os, time, torch, wmtp
        from wmtp import fused_weighted_mtp_loss, mtp_cross_entropy
        assert wmtp.backends.cpu_library.load.cache_info().currsize == 0

        logits = torch.randn(1, 4, 2, 9, requires_grad=True)
        ids = torch.zeros(1, 4, dtype=torch.int64)
        with torch.device("meta"):
            loss = fused_weighted_mtp_loss(logits, ids).loss
            loss.backward()
        assert loss.device.type == logits.grad.device.type == "cpu"

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


@pytest.mark.parametrize("instruction_set", ALL, indirect=True)
def test_every_instruction_set_answers_to_its_name(instruction_set):
    """Those that this machine lacks are skipped here, and left out everywhere else."""
    assert cpu.instruction_set() == instruction_set
