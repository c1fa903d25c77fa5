"""One binary of a kernel, by Triton's compiler, and what it takes on a card. See static_gpu.py."""

import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from wmtp.benchmarks.sass import disassemble, loads_in_flight, passes
from wmtp.benchmarks.static_variants import CARDS, ITEMSIZE, Variant
from wmtp.numerics import Numerics

# The least share of `needed` that must be in flight: latencies are not known better than that.
HIDDEN = 0.85
# Arguments that are numbers and no pointers.
FLOATS = ("heads_share", "largest_gradient", *Numerics._fields)


def compile_variant(variant: Variant, target: str) -> Any:
    """As the launcher has it compiled: aligned pointers, and no integer specialised."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    attributes = {}
    for parameter in variant.kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            of_logits = name in ("logits_ptr", "grad_ptr")
            known = {"target_ptr": "i64", "offset_ptr": "i64"}
            known |= {"valid_mask_ptr": "i1", "correct_ptr": "i1"}
            signature[name] = f"*{variant.dtype if of_logits else known.get(name, 'fp32')}"
            if not parameter.do_not_specialize_on_alignment:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            assert parameter.do_not_specialize, f"{name} would make a binary for every value"
            signature[name] = parameter.annotation_type or "i32"
    backend, arch = target.split(":")
    gpu = GPUTarget(backend, int(arch) if backend == "cuda" else arch, _warp(target))
    source = ASTSource(variant.kernel, signature, constants_of(variant), attributes)
    # Nothing of a cache: each binary is made now, by this compiler.
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        return triton.compile(source, target=gpu, options=variant.launch.options())


def constants_of(variant: Variant) -> dict[str, Any]:
    """With the rules themselves instead of their names."""
    from wmtp.kernels.rules import jitted

    constants = dict(variant.constants)
    for name in ("RULE", "OTHER"):
        if constants.get(name) is not None:
            module, function = constants[name].split(".")
            rules = importlib.import_module(f"wmtp.weightings.{module}")
            constants[name] = jitted(getattr(rules, function))
    return constants


def _warp(target: str) -> int:
    return 64 if target.startswith("hip") else 32


def describe(variant: Variant, target: str, binary: Any) -> dict[str, Any]:
    """One object of the report."""
    usage = cuda_usage(binary) if target.startswith("cuda") else hip_usage(binary)
    accesses = usage.pop("accesses")
    launch, card = variant.launch, CARDS[target]
    threads = launch.num_warps * _warp(target)
    itemsize = ITEMSIZE[variant.dtype]
    in_loop = launch.tier in ("online", "")
    tile = variant.constants.get("ROWS", 1) * launch.block * itemsize
    widths = accesses.in_loops() if in_loop else accesses.moving(tile // threads)
    granule = 8 * (-(-usage["registers"] // 8)) * threads
    occupancy = min(
        card.registers // granule,
        card.threads // threads,
        card.shared_bytes // max(usage["shared_bytes"] + 1024, 1),
    )
    # A step of every thread, where the machine code is not read: AMD's, and narrow loads.
    under_way = launch.block * itemsize if in_loop else tile
    wide = variant.streams_logits and variant.constants.get("IN_PHASE", True)
    if in_loop and wide and target.startswith("cuda"):
        loops = passes(disassemble(binary.asm["cubin"]))
        under_way = 16 * threads * min(map(loads_in_flight, loops), default=0)
    in_flight = occupancy * under_way
    return {
        "name": variant.name,
        "target": target,
        "dtype": variant.dtype,
        "vocabulary": variant.vocabulary,
        **usage,
        "main_loop_load_bytes": widths[0] if variant.streams_logits else [],
        "main_loop_store_bytes": widths[1] if variant.stores_logits else [],
        "streams_logits": variant.streams_logits,
        "tier": launch.tier or None,
        "block": launch.block,
        "threads": threads,
        "occupancy": occupancy,
        "in_flight": in_flight if variant.streams_logits else None,
        "needed": card.needed_bytes(),
    }


class Accesses:
    """The global loads and stores of a kernel's assembly."""

    def __init__(self, text: str, branch: str, access: str):
        self.lines = text.splitlines()
        self.branch, self.access = branch, access

    def in_loops(self) -> tuple[list[int], list[int]]:
        """Widths of the loads, and of the stores, that stand in innermost loops."""
        found = [access for begin, end in self._innermost() for access in self._between(begin, end)]
        return self._widths(found)

    def moving(self, thread_bytes: int) -> tuple[list[int], list[int]]:
        """[16] each, if accesses of 16 bytes move so many of a thread's; else all widths."""
        accesses = self._between(0, len(self.lines))
        widths = list(self._widths(accesses))
        for i, kind in enumerate(("load", "store")):
            if 16 * accesses.count((kind, 16)) >= thread_bytes:
                widths[i] = [16]
        return widths[0], widths[1]

    def _between(self, begin: int, end: int) -> list[tuple[str, int]]:
        text = "\n".join(self.lines[begin:end])
        found = []
        for kind, lanes, word in re.findall(self.access, text):
            if word.isdigit():  # NVIDIA: v4.b32
                size = int(lanes or 1) * int(word) // 8
            else:  # AMD: dwordx4, ushort, short_d16_hi
                narrow = 4 if "dword" in word else 2 if "short" in word else 1
                size = narrow if word else 4 * int(lanes)
            found.append(("load" if kind in ("ld", "load") else "store", size))
        return found

    @staticmethod
    def _widths(accesses: list[tuple[str, int]]) -> tuple[list[int], list[int]]:
        loads = sorted({size for kind, size in accesses if kind == "load"})
        return loads, sorted({size for kind, size in accesses if kind == "store"})

    def _innermost(self) -> list[tuple[int, int]]:
        labels = {line.split(":")[0].strip(): i for i, line in enumerate(self.lines) if ":" in line}
        spans = {
            (labels[found[1]], end)
            for end, line in enumerate(self.lines)
            if (found := re.search(self.branch, line)) and labels.get(found[1], end) < end
        }
        return [
            (a, b)
            for a, b in spans
            if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)
        ]


def cuda_usage(binary: Any) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    access = r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bfus](\d+)\b"
    return {
        "registers": found["REG"],
        "spill_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": binary.metadata.shared,
        "flushes": ".ftz." in binary.asm["ptx"],
        "accesses": Accesses(binary.asm["ptx"], r"bra(?:\.uni)?\s+(\S+);", access),
    }


def hip_usage(binary: Any) -> dict[str, Any]:
    text = binary.asm["amdgcn"]
    access = r"\b(?:global|buffer)_(load|store)_(?:dwordx(\d)|([a-z]\w*))\b"
    pattern = r"\.(\w+_count|private_\w+):\s+(\d+)"
    values = {key: int(value) for key, value in re.findall(pattern, text)}
    spilled = 4 * values["vgpr_spill_count"]  # scalar registers spill to vector ones
    return {
        "registers": values["vgpr_count"],
        "spill_bytes": values["private_segment_fixed_size"] + spilled,
        "shared_bytes": binary.metadata.shared,
        "flushes": ".amdhsa_float_denorm_mode_32 3" not in text,
        "accesses": Accesses(text, r"s_c?branch\w*\s+(\S+)", access),
    }


def complaint(row: dict[str, Any]) -> str | None:
    """What is wrong with a kernel of the report; None if nothing is."""
    if "failure" in row:
        return row["failure"]
    if row["spill_bytes"]:
        return f"spills {row['spill_bytes']} bytes"
    if row["flushes"] and row["name"].split()[0] in ("weights", "finish"):
        return "takes denormal weights for 0"
    if not row["streams_logits"]:
        return None
    if row["main_loop_load_bytes"] != [16] and "out of phase" not in row["name"]:
        return f"loads logits by {row['main_loop_load_bytes']} bytes"
    if row["main_loop_store_bytes"] not in ([], [16]):
        return f"stores logits by {row['main_loop_store_bytes']} bytes"
    if row["in_flight"] < HIDDEN * row["needed"]:
        return f"has {row['in_flight']} of {row['needed']} bytes in flight"
    return None
