"""Which backend runs, and what is said when one cannot."""

import subprocess
import sys
import warnings

import pytest
import torch

from wmtp import fused_weighted_mtp_loss, once
from wmtp.backends import choose_backend

LOGITS, IDS = torch.randn(1, 6, 2, 11), torch.randint(11, (1, 6))


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [("auto", "cpu", "cpu"), ("auto", "mps", "eager"), ("eager", "cuda", "eager")],
)
def test_choice_by_device(backend, device, expected):
    assert choose_backend(backend, device, torch.float32) == expected


def test_cpu_backend_refuses_other_devices():
    with pytest.raises(ValueError, match="backend 'cpu' takes CPU tensors, got cuda"):
        choose_backend("cpu", "cuda", torch.float32)


def test_triton_refuses_float64():
    with pytest.raises(ValueError, match="got float64: use backend='eager'"):
        choose_backend("auto", "cuda", torch.float64)


@pytest.fixture
def no_cpu_kernel(monkeypatch):
    monkeypatch.setattr("wmtp.backends.cpu.unavailable", lambda: "not built: install a compiler")
    monkeypatch.setattr(once, "_said", set())


@pytest.mark.usefixtures("no_cpu_kernel")
def test_auto_falls_back_with_one_warning():
    with pytest.warns(RuntimeWarning, match="runs in eager torch, .*install a compiler"):
        loss = fused_weighted_mtp_loss(LOGITS, IDS).loss
    assert loss == fused_weighted_mtp_loss(LOGITS, IDS, backend="eager").loss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_weighted_mtp_loss(LOGITS, IDS)


@pytest.mark.usefixtures("no_cpu_kernel")
def test_by_name_never_falls_back():
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: not built"):
        fused_weighted_mtp_loss(LOGITS, IDS, backend="cpu")


def test_triton_on_cpu_tensors_needs_the_interpreter():
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch, wmtp\n"
        "wmtp.fused_weighted_mtp_loss(\n"
        "    torch.zeros(1, 2, 1, 3), torch.zeros(1, 2).long(), backend='triton')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "RuntimeError: backend 'triton' is not available" in done.stderr
    assert "set TRITON_INTERPRET=1" in done.stderr
