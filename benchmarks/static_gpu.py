"""What Triton's compiler makes of the kernels, for cards that are not here.

    python -m benchmarks.static_gpu [--check] [--json FILE] [--cubins FOLDER] [--dtype D] [TARGET..]

Every kernel that the library can launch, as its own configuration function (kernels/gpu/tiers.py)
would launch it, compiled for sm_80, sm_90, sm_100 and gfx942. This file needs Triton alone (>= 3.6;
no torch, no GPU, nothing of ours), so that another version is checked from a venv of its own. One
object a kernel and target:

    registers         of a thread
    spill_bytes       of a thread, to memory: 0
    shared_bytes      of a CTA
    main_loop_*_bytes widths of the accesses that move the logits: [16]. In a tier of registers
                      there is no loop: [16] says that accesses of 16 bytes move the whole tile
    occupancy         CTAs an SM: what registers, threads and shared memory allow
    in_flight         bytes that an SM may have under way with them, against
    needed            bandwidth x latency / SMs: what hides the latency
"""

import argparse
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# The least share of `needed` that must be in flight: latencies are not known better than that.
HIDDEN = 0.85
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
# One of each class of block: a row in less than a CTA, in one, and in clusters of growing size.
VOCABULARIES = (1000, 32000, 50257, 128256, 256000, 300000)
HEADS = 4
# H, and the rows of logits that a token has: its heads', one for all heads, the linear op's.
SIZES = ((HEADS, HEADS), (HEADS, 1), (1, 1))


class Card(NamedTuple):
    """What a target's SM has, and one card's bandwidth and SMs, from its data sheet."""

    name: str
    registers: int
    threads: int
    shared_bytes: int
    bytes_a_second: float
    latency: float
    processors: int
    has_clusters: bool

    def needed_bytes(self) -> int:
        """In flight an SM, for the latency to be hidden."""
        return round(self.bytes_a_second * self.latency / self.processors)


CARDS = {
    "cuda:80": Card("A100", 65536, 2048, 164 << 10, 2.0e12, 600e-9, 108, False),
    "cuda:90": Card("H100", 65536, 2048, 228 << 10, 3.35e12, 600e-9, 132, True),
    "cuda:100": Card("B200", 65536, 2048, 228 << 10, 8.0e12, 700e-9, 148, True),
    "hip:gfx942": Card("MI300X", 131072, 2048, 64 << 10, 5.3e12, 800e-9, 304, False),
}


class Variant(NamedTuple):
    """One binary."""

    name: str
    dtype: str
    vocabulary: int
    kernel: Any
    constants: dict[str, Any]
    launch: Any  # tiers.Launch
    streams_logits: bool
    stores_logits: bool


def load_kernels() -> dict[str, Any]:
    """wmtp.kernels' modules, from their folder: `wmtp` itself would need torch."""
    if importlib.util.find_spec("torch") is None:  # then only its names are needed
        stub: Any = types.ModuleType("torch")
        stub.Tensor = stub.device = stub.dtype = object
        stub.float32, stub.version = None, types.SimpleNamespace(hip=None)
        sys.modules["torch"] = stub
    folder = Path(__file__).resolve().parents[1] / "kernels"
    if (folder / "gpu").exists():  # the repository; installed, they are in wmtp/kernels
        folder /= "gpu"
    for name, path in (("wmtp", []), ("wmtp.kernels", [str(folder)])):
        package: Any = types.ModuleType(name)
        package.__path__ = path
        sys.modules[name] = package
    names = [
        *("rows", "tiers", "weights_kernel", "scale_kernel", "next_token_kernel"),
        *("register_kernel", "partial_kernel", "online_kernel", "gradient_kernel"),
    ]
    return {name: importlib.import_module(f"wmtp.kernels.{name}") for name in names}


def variants(modules: dict[str, Any], target: str) -> Iterator[Variant]:
    """Every kernel that the launchers can ask for on this target."""
    for dtype in ITEMSIZE:
        for vocabulary in VOCABULARIES:
            yield from _loss_variants(modules, target, dtype, vocabulary)
        for vocabulary in (1000, 50257):  # streaming in steps: two classes
            yield from _streaming_variants(modules, target, dtype, vocabulary)
    yield from _small_variants(modules)


def _machine(modules: dict[str, Any], target: str) -> Any:
    tiers = modules["tiers"]
    clusters = CARDS[target].has_clusters and tiers.triton_reduces_across_clusters()
    nvidia = target.startswith("cuda")
    return tiers.Machine(32 if nvidia else 64, clusters, CARDS[target].processors, nvidia)


def _loss_variants(
    modules: dict[str, Any], target: str, dtype: str, vocabulary: int
) -> Iterator[Variant]:
    """The loss with its gradient: by weighting, one or all heads a row, and forced to go online."""
    tiers = modules["tiers"]
    found = set()
    for weighting, excess, signed in (("known", 0, 0), ("excess", 1, 0), ("signed", 1, 1)):
        for size in SIZES[: 2 if excess else 3]:
            for gradient in (True, False):
                for forced in ("", "online"):
                    launch = tiers.choose(
                        vocabulary, *size, ITEMSIZE[dtype], bool(excess), gradient,
                        _machine(modules, target), forced,
                    )  # fmt: skip
                    key = (launch, weighting, size, gradient)
                    # In steps of 8 KiB every V is alike; the sign is no part of the stream.
                    alike = launch.tier == "online" and vocabulary not in (1000, 50257)
                    if key in found or alike or (signed and vocabulary != 50257):
                        continue
                    found.add(key)
                    variant = _loss_variant(
                        modules, dtype, vocabulary, launch, weighting, size, gradient, bool(signed)
                    )
                    yield variant
                    if vocabulary == 50257 and gradient and not signed:
                        if size == (HEADS, HEADS):
                            yield _listed(variant)
                        if launch.tier == "online":
                            yield from _split(modules, variant, size)


def _loss_variant(
    modules: dict[str, Any],
    dtype: str,
    vocabulary: int,
    launch: Any,
    weighting: str,
    size: tuple[int, int],
    gradient: bool,
    signed: bool,
) -> Variant:
    excess, (heads, rows) = weighting != "known", size
    constants = modules["tiers"].constants(launch, heads, rows, excess)
    constants |= {"H": heads, "EXCESS": excess, "SIGNED": signed, "IN_PHASE": True}
    constants |= {"LISTED": False, "GRAD_LISTED": False}
    name, kernel = "register", modules["register_kernel"].register_kernel
    if launch.tier == "online":
        name, kernel = "online", modules["online_kernel"].online_kernel
        constants |= {"GRAD": gradient, "SPLITS": 1}
    name += f" {weighting}" + " shared" * (rows < heads) + " alone" * (heads == 1)
    name += " forward" * (not gradient)
    constants["BLOCK"] = launch.block
    return Variant(name, dtype, vocabulary, kernel, constants, launch, True, gradient)


def _listed(variant: Variant) -> Variant:
    """The same for heads of memory of their own, in place."""
    constants = {**variant.constants, "LISTED": True, "GRAD_LISTED": True}
    return variant._replace(name=f"{variant.name} listed", constants=constants)


def _split(modules: dict[str, Any], variant: Variant, size: tuple[int, int]) -> Iterator[Variant]:
    """The same for rows fewer than the SMs."""
    heads, rows = size
    splits = {"SPLITS": 8}
    constants = variant.constants | splits
    yield variant._replace(name=f"{variant.name} split", constants=constants)
    held = variant.constants["HEADS"] if rows < heads else 1
    of_parts = {"H": heads, "HEADS": held, "ROWS": rows, "LISTED": False, "EVICT": "evict_last"}
    constants = {**of_parts, **splits, "BLOCK": variant.constants["BLOCK"]}
    kernel = modules["partial_kernel"].partial_kernel
    name = variant.name.replace("online", "partial")
    yield variant._replace(name=name, kernel=kernel, constants=constants, stores_logits=False)


def _streaming_variants(
    modules: dict[str, Any], target: str, dtype: str, vocabulary: int
) -> Iterator[Variant]:
    machine = _machine(modules, target)
    launch = modules["tiers"].online(vocabulary, HEADS, ITEMSIZE[dtype], False, machine)
    next_token = modules["next_token_kernel"].next_token_ce_kernel
    block = {"BLOCK": launch.block}
    yield Variant("next_token_ce", dtype, vocabulary, next_token, block, launch, True, False)
    gradient = modules["gradient_kernel"].row_gradient_kernel
    for shared in (False, True):
        constants = {"H": HEADS, "SHARED_HEADS": shared, "IN_PHASE": True, **block}
        name = "row_gradient" + " shared" * shared
        limit = {}
        if target.startswith("cuda"):
            limit = modules["gradient_kernel"].register_limit(shared, 32 * launch.num_warps)
        limited = launch._replace(max_registers=limit.get("maxnreg"))
        yield Variant(name, dtype, vocabulary, gradient, constants, limited, True, True)


def _small_variants(modules: dict[str, Any]) -> Iterator[Variant]:
    """Those that stream no logits."""
    weights, tiers = modules["weights_kernel"], modules["tiers"]
    once = tiers.Launch("", 0, 8)
    tokens = {"H": HEADS, "TOKENS": 2048 // HEADS}
    for weighting in (weights.UNIFORM, weights.GIVEN, weights.EXCESS):
        for reduction in weights.REDUCTIONS.values():
            for scaled in (False, True):
                constants = {
                    "WEIGHTING": weighting.value,
                    "REDUCTION": reduction.value,
                    "HAS_NORMALIZER": scaled,
                    "SCALED": scaled,
                    **tokens,
                }
                kernel = weights.weights_kernel
                yield Variant("weights", "fp32", 0, kernel, constants, once, False, False)
    yield Variant("finish", "fp32", 0, weights.finish_kernel, tokens, once, False, False)
    scale = modules["scale_kernel"].scale_kernel
    for dtype in ITEMSIZE:
        constants = {"BLOCK": modules["scale_kernel"].BLOCK_BYTES // ITEMSIZE[dtype]}
        yield Variant("scale", dtype, 0, scale, constants, once, False, False)


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
            known = {"target_ptr": "i64", "offset_ptr": "i64", "valid_mask_ptr": "i1"}
            signature[name] = f"*{variant.dtype if of_logits else known.get(name, 'fp32')}"
            if not parameter.do_not_specialize_on_alignment:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        elif name == "heads_share":
            signature[name] = "fp32"
        else:
            assert parameter.do_not_specialize, f"{name} would make a binary for every value"
            signature[name] = parameter.annotation_type or "i32"
    backend, arch = target.split(":")
    gpu = GPUTarget(backend, int(arch) if backend == "cuda" else arch, _warp(target))
    source = ASTSource(variant.kernel, signature, variant.constants, attributes)
    return triton.compile(source, target=gpu, options=variant.launch.options())


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
    tile = variant.constants.get("ROWS", 1) * launch.block * itemsize // launch.num_ctas
    widths = accesses.in_loops() if in_loop else accesses.moving(tile // threads)
    granule = 8 * (-(-usage["registers"] // 8)) * threads
    occupancy = min(
        card.registers // granule,
        card.threads // threads,
        card.shared_bytes // max(usage["shared_bytes"] + 1024, 1),
    )
    # Online: a step of every thread, two accesses of 16 bytes.
    in_flight = occupancy * (launch.block * itemsize if in_loop else tile)
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
        "num_ctas": launch.num_ctas,
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
        "accesses": Accesses(text, r"s_c?branch\w*\s+(\S+)", access),
    }


def complaint(row: dict[str, Any]) -> str | None:
    """What is wrong with a kernel of the report; None if nothing is."""
    if row["spill_bytes"]:
        return f"spills {row['spill_bytes']} bytes"
    if not row["streams_logits"]:
        return None
    if row["main_loop_load_bytes"] != [16]:
        return f"loads logits by {row['main_loop_load_bytes']} bytes"
    if row["main_loop_store_bytes"] not in ([], [16]):
        return f"stores logits by {row['main_loop_store_bytes']} bytes"
    if row["in_flight"] < HIDDEN * row["needed"]:
        return f"has {row['in_flight']} of {row['needed']} bytes in flight"
    return None


def report(
    targets: list[str], dtypes: list[str], cubins: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Compile everything for the targets; keep the cubins, beside what launching them takes."""
    modules = load_kernels()
    for target in targets:
        for number, variant in enumerate(variants(modules, target)):
            if variant.dtype not in dtypes:
                continue
            binary = compile_variant(variant, target)
            row = describe(variant, target, binary)
            if cubins is not None and target.startswith("cuda") and variant.launch.tier:
                cubins.mkdir(parents=True, exist_ok=True)
                stem = cubins / f"{target.replace(':', '_')}-{number:03}"
                stem.with_suffix(".cubin").write_bytes(binary.asm["cubin"])
                symbol = {"symbol": binary.metadata.name, "constants": variant.constants}
                stem.with_suffix(".json").write_text(json.dumps({**row, **symbol}))
            yield row


def main() -> None:
    """Print a line a kernel, or write all as JSON; with --check, exit 1 if there is a complaint."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="print what is wrong, and fail")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--cubins", type=Path, help="keep the binaries of the loss there")
    parser.add_argument("--dtype", choices=ITEMSIZE, help="one instead of all")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(CARDS)}; all by default")
    options = parser.parse_args()
    import triton

    dtypes = [options.dtype] if options.dtype else list(ITEMSIZE)
    rows, complaints = [], 0
    for row in report(options.targets or list(CARDS), dtypes, options.cubins):
        rows.append(row)
        found = complaint(row) if options.check else None
        complaints += found is not None
        if found or not (options.check or options.json):
            print(json.dumps({"complaint": found, **row} if found else row), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}))
    if options.check:
        tiers = sorted({row["tier"] for row in rows if row["tier"]})
        found_tiers = ", ".join(tiers)
        print(f"Triton {triton.__version__}: {len(rows)} kernels, tiers {found_tiers},", end=" ")
        print(f"{complaints} complaints")
    sys.exit(complaints > 0)


if __name__ == "__main__":
    main()
