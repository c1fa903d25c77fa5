"""Which C++ library is loaded, and which is refused."""

import _ctypes
import hashlib
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch

from wmtp import fused_weighted_mtp_loss, once
from wmtp.backends import cpu_library

missing = cpu_library.unavailable()
needs_kernel = pytest.mark.skipif(missing is not None, reason=f"no CPU kernel: {missing}")
SOURCES = Path(__file__).parent.parent / "kernels" / "cpu"


@pytest.fixture
def unloaded():
    """As before the first use of the library, and so again afterwards."""
    cpu_library.load.cache_clear()
    yield
    cpu_library.load.cache_clear()


@needs_kernel
@pytest.mark.usefixtures("unloaded")
def test_environment_chooses_the_instruction_set(monkeypatch):
    monkeypatch.setenv("WMTP_CPU_ISA", "baseline")
    assert cpu_library.instruction_set() == "baseline"
    cpu_library.load.cache_clear()
    monkeypatch.setenv("WMTP_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match="WMTP_CPU_ISA must be avx512_bf16, avx512, avx2 or b"):
        cpu_library.instruction_set()


@pytest.mark.usefixtures("unloaded")
def test_missing_library_has_a_reason_and_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_library, "LIBRARY", tmp_path / "libwmtp_cpu.so")
    assert "was not built" in cpu_library.unavailable()
    assert "compiler" in cpu_library.unavailable()
    cpu_library.LIBRARY.write_bytes(b"not a library")
    assert "does not load" in cpu_library.unavailable()


def write_another(path, place):
    """The library, but for one of the numbers that it says of its ABI; or one that says nothing."""
    if place is None:
        shutil.copy(_ctypes.__file__, path)
        return
    other = list(cpu_library.ABI)
    other[place] += 1
    numbers, others = (struct.pack(f"{len(other)}i", *abi) for abi in (cpu_library.ABI, other))
    code = cpu_library.LIBRARY.read_bytes()
    assert numbers in code
    path.write_bytes(code.replace(numbers, others))


@needs_kernel
@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("place", [None, *range(len(cpu_library.ABI))])
def test_stale_library_is_refused_with_the_remedy(monkeypatch, tmp_path, place):
    """`git pull` leaves the last build beside newer Python code, where it would crash."""
    path = tmp_path / "libwmtp_cpu.so"
    write_another(path, place)
    monkeypatch.setattr(cpu_library, "LIBRARY", path)
    monkeypatch.setattr(once, "_said", set())
    case = torch.randn(1, 3, 1, 5), torch.tensor([[0, 1, 2]])
    with pytest.raises(RuntimeError, match=r"another version of wmtp.*: install wmtp again"):
        fused_weighted_mtp_loss(*case, backend="cpu")
    with pytest.warns(RuntimeWarning, match=r"runs in eager torch.*: install wmtp again"):
        found = fused_weighted_mtp_loss(*case).loss
    assert found == fused_weighted_mtp_loss(*case, backend="eager").loss


def abi_text():
    """The structs of the header, and the exported functions, without comments."""
    header = (SOURCES / "wmtp_cpu.h").read_text()
    structs = header[header.index("enum Dtype") : header.index("struct Kernels")]
    exported = re.findall(r"^WMTP_EXPORT[^{=]*", (SOURCES / "dispatch.cpp").read_text(), re.M)
    return " ".join(re.sub(r"//.*", "", "\n".join([structs, *exported])).split())


def test_structs_have_the_fields_of_the_header():
    for of_python in (cpu_library.Inputs, cpu_library.Settings, cpu_library.Outputs):
        body = re.search(rf"struct {of_python.__name__} {{(.*?)}};", abi_text())[1]
        declared = re.findall(r"(\w+)(?:\[\d\])?[,;]", body)
        assert [name for name, _ in of_python._fields_] == declared


def test_another_abi_has_another_version():
    """If this fails, raise kAbiVersion of wmtp_cpu.h and cpu_library.ABI, and write both here."""
    digest = hashlib.sha256(abi_text().encode()).hexdigest()[:16]
    assert (cpu_library.ABI[0], digest) == (6, "1e9f035ab7d2a5b4")
