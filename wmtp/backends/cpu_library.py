"""libwmtp_cpu: its C ABI, which library is loaded, and which is refused.

It is loaded at first use; `WMTP_CPU_ISA=avx512_bf16|avx512|avx2|baseline` overrides its choice of
instruction set.
"""

import ctypes
import functools
import os
from pathlib import Path

from wmtp import numerics

# The variable is for a build of another kind, `make sanitize` for one.
LIBRARY = Path(os.environ.get("WMTP_CPU_LIBRARY") or Path(__file__).parents[1] / "libwmtp_cpu.so")

_UNKNOWN_ISA, _MISSING_ISA = 3, 4


Numbers = ctypes.c_double * 4  # a rule's


class Numerics(ctypes.Structure):  # wmtp/numerics.py
    _fields_ = [
        (name, ctypes.c_double) for name in (*numerics.Numerics._fields, "largest_gradient")
    ]


class Inputs(ctypes.Structure):  # kernels/cpu/wmtp_cpu.h, and so the next two
    _fields_ = [
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride_b", "stride_s", "stride_h")),
        *((name, ctypes.c_int64) for name in ("B", "S", "H", "V")),
        ("head_offsets", ctypes.POINTER(ctypes.c_int64)),
        ("target_ids", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("target_stride_b", "target_stride", "targets")),
        ("ignore_index", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("head_weights", "head_scale", "ref_ce")),
        *((name, ctypes.c_int64) for name in ("ref_stride_b", "ref_stride")),
        ("numbers", Numbers),
        ("normalizer", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("has_normalizer", "dtype", "threads")),
    ]


class Settings(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in ("rule", "known", "whole_token", "sums_to_one", "reduction", "checked")
        ),
        ("numerics", Numerics),
        ("metrics", ctypes.c_int32),
    ]


class Outputs(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("loss", "valid_mask", "ce", "row_loss", "token_loss", "weight_sum"),
                *("row_scalar", "row_max", "log_sum", "entropy", "correct", "factors"),
                *("grad", "scratch"),
            )
        ),
        ("grad_stride", ctypes.c_int64),
        ("grad_scale", ctypes.c_double),
    ]


ABI = (6, *map(ctypes.sizeof, (Inputs, Settings, Outputs)))  # wmtp_cpu_abi of dispatch.cpp


class _VersionError(OSError):
    """The library is not the one that this file was written for."""


def unavailable() -> str | None:
    """Why the CPU kernel cannot run here, with the remedy; None when it can.

    Raises:
        RuntimeError: WMTP_CPU_ISA names an instruction set that is unknown or missing here.
    """
    remedy = "install a C++17 compiler, CMake and Ninja, then install wmtp again"
    try:
        load()
    except _VersionError as error:
        return f"{error}: install wmtp again"
    except OSError as error:
        if not LIBRARY.exists():
            return f"its C++ kernel was not built when wmtp was installed: {remedy}"
        return f"its C++ kernel does not load ({error}): {remedy}"
    return None


def instruction_set() -> str:
    """ "avx512_bf16", "avx512", "avx2" or "baseline": what the kernel runs with here.

    Raises:
        OSError: the kernel is not there, or of another version; `unavailable` says why.
        RuntimeError: WMTP_CPU_ISA names an instruction set that is unknown or missing here.
    """
    name: bytes = load().wmtp_cpu_instruction_set()
    return name.decode()


@functools.cache
def load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    _check_version(library)
    inputs, settings = ctypes.POINTER(Inputs), ctypes.POINTER(Settings)
    library.wmtp_cpu_select.argtypes = [ctypes.c_char_p]
    library.wmtp_cpu_instruction_set.restype = ctypes.c_char_p
    library.wmtp_cpu_rule.argtypes = [ctypes.c_char_p]
    library.wmtp_cpu_ask_for_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.wmtp_cpu_scratch_bytes.argtypes = [inputs, settings, ctypes.c_int]
    library.wmtp_cpu_scratch_bytes.restype = ctypes.c_int64
    library.wmtp_cpu_weighted_loss.argtypes = [
        *(inputs, settings, ctypes.POINTER(Outputs)),
        ctypes.POINTER(ctypes.c_int64),
    ]
    select_instruction_set(library, os.environ.get("WMTP_CPU_ISA", ""))
    return library


def _check_version(library: ctypes.CDLL) -> None:
    """Before anything of it is called: after `git pull` an editable install has the last build."""
    try:
        found = tuple((ctypes.c_int32 * len(ABI)).in_dll(library, "wmtp_cpu_abi"))
    except ValueError:  # no such symbol
        found = None
    if found != ABI:
        raise _VersionError(
            f"its C++ kernel {LIBRARY} was built from another version of wmtp "
            f"(ABI {found}, wanted {ABI})"
        )


def select_instruction_set(library: ctypes.CDLL, name: str) -> None:
    status = library.wmtp_cpu_select(name.encode())
    if status == _UNKNOWN_ISA:
        raise RuntimeError(
            f"WMTP_CPU_ISA must be avx512_bf16, avx512, avx2 or baseline (the last only, elsewhere "
            f"than on x86-64), got {name!r}: unset it to choose the best"
        )
    if status == _MISSING_ISA:
        raise RuntimeError(f"WMTP_CPU_ISA is {name}, which this CPU lacks: unset it")
