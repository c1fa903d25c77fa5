"""What Triton's compiler makes of the kernels, for cards that are not here.

    python -m benchmarks.static_gpu [--check] [--sample N] [--json FILE]
        [--summary FILE] [--known FILE] [--sass FILE] [--dtype D] [--only PATTERN] [--jobs N]
        [TARGET..]

Every binary that the library can ask for (static_variants.py), as its own configuration function
(kernels/gpu/tiers.py) would launch it, compiled for sm_80, sm_90, sm_100 and gfx942, each in a
process of its own: a compiler that dies is a finding, not the end. It takes Triton alone (>= 3.6;
no torch, no GPU), so that every version is checked from a venv of its own (`make static`). One
object a binary:

    failure           why there is none; then nothing follows
    registers         of a thread
    spill_bytes       of a thread, to memory: 0
    shared_bytes      of a CTA
    flushes           whether any arithmetic takes denormal numbers for 0
    main_loop_*_bytes widths of the accesses that move the logits: [16]. In a tier of registers
                      there is no loop: [16] says that accesses of 16 bytes move the whole tile
    occupancy         CTAs an SM: what registers, threads and shared memory allow
    in_flight         bytes that an SM may have under way with them, against
    needed            bandwidth x latency / SMs: what hides the latency
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

Row = dict[str, Any]
# Spilled bytes of a thread that are printed and do not fail. By 3.9.0 two variants (sm_90, H = 4,
# V = 50257, out of phase) spill 8, by 3.8.0 some of 1024 threads 16: a limit that avoids it leaves
# one CTA an SM where two fit.
TOLERATED = 16


def be_the_package() -> None:
    """Stand in for `wmtp`, which needs torch; and for torch, of which only names are needed."""
    if importlib.util.find_spec("torch") is None:
        for name in ("", ".nn", ".nn.functional", ".autograd", ".distributed"):
            sys.modules[f"torch{name}"] = MagicMock()
        sys.modules["torch"].version.hip = None
    here = Path(__file__).resolve().parent
    kernels = here.parent / "kernels"
    if (kernels / "gpu").exists():  # the repository; installed, they are in wmtp/kernels
        kernels /= "gpu"
    wmtp = here.parent / "wmtp" if (here.parent / "wmtp").exists() else here.parent
    for name, path in (("wmtp", wmtp), ("wmtp.kernels", kernels), ("wmtp.benchmarks", here)):
        package: Any = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package


if __name__ == "__main__":
    be_the_package()

from wmtp.benchmarks import static_table  # noqa: E402
from wmtp.benchmarks.static_compile import (  # noqa: E402
    compile_variant,
    complaint,
    constants_of,
    describe,
)
from wmtp.benchmarks.static_variants import CARDS, ITEMSIZE, Variant, sample, variants  # noqa: E402


def load_kernels() -> dict[str, Any]:
    names = [
        *("rows", "tiers", "weights_kernel", "scale_kernel", "register_kernel"),
        *("partial_kernel", "online_kernel", "gradient_kernel", "numerics"),
    ]
    return {name: importlib.import_module(f"wmtp.kernels.{name}") for name in names}


class Known:
    """Rows that were made before, in a file, by all that they follow from."""

    def __init__(self, file: Path | None):
        self._file = file
        self._rows = {}
        if file is None or not file.exists():
            return
        whole, _, cut_short = file.read_text().rpartition("\n")
        if cut_short:  # of a run that was killed; more would be written behind it
            file.write_text(whole + "\n" * bool(whole))
        for line in whole.splitlines():
            known = json.loads(line)
            self._rows[known["key"]] = known["row"]

    def get(self, key: str) -> Row | None:
        return self._rows.get(key)

    def add(self, key: str, row: Row) -> None:
        if self._file is not None and "failure" not in row:
            with open(self._file, "a") as file:
                file.write(json.dumps({"key": key, "row": row}) + "\n")


def key_of(target: str, variant: Variant) -> str:
    """Of the compiler, the kernel's source, how it is launched, and how the binary is read."""
    import triton

    reader = Path(__file__).with_name("static_compile.py").read_text()
    constants = constants_of(variant)
    follows_from = (
        *(triton.__version__, target, CARDS[target], variant.kernel.cache_key, reader),
        *(getattr(constants.get(name), "cache_key", None) for name in ("RULE", "OTHER")),
        *(variant.name, variant.dtype, variant.vocabulary, variant.launch, variant.constants),
    )
    return hashlib.sha256(repr(follows_from).encode()).hexdigest()


def report(work: list[tuple[str, Variant]], jobs: int, known: Known) -> Iterator[Row]:
    """A row for each target and variant."""

    def compiled(number: int) -> Row:
        target, variant = work[number]
        return describe(variant, target, compile_variant(variant, target))

    keys = [key_of(*each) for each in work]
    made = in_processes(compiled, [i for i, key in enumerate(keys) if not known.get(key)], jobs)
    for (target, variant), key in zip(work, keys, strict=True):
        row = known.get(key)
        if row is None:
            row = next(made)
            known.add(key, row)
        of_all: dict[str, Any] = {"name": variant.name, "target": target, "dtype": variant.dtype}
        of_all |= {"vocabulary": variant.vocabulary, "constants": variant.constants}
        yield {**of_all, "launch": variant.launch.options(), **row}


def warm_caches(work: list[tuple[str, Variant]]) -> None:
    """Hash the compiler and the kernels here, once, and not in every fork."""
    from triton.runtime.cache import triton_key

    triton_key()
    for kernel in {variant.kernel for _, variant in work}:
        assert kernel.cache_key


def in_processes(
    function: Callable[[Any], Row], arguments: Iterable[Any], jobs: int
) -> Iterator[Row]:
    """function(argument) for each, in order, each in a fork of this process, `jobs` at a time."""
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[int, Any]] = {}  # by receiver
    done: dict[int, Row] = {}
    yielded = 0

    def settled() -> Iterator[Row]:
        nonlocal yielded
        ready: list[Any] = multiprocessing.connection.wait(list(running))
        for receiver in ready:
            number, process = running.pop(receiver)
            try:
                row = receiver.recv()
            except EOFError:
                row = None
            process.join()
            died = f"the compiler died of signal {-process.exitcode}"
            done[number] = row or {"failure": died}
        while yielded in done:
            yield done.pop(yielded)
            yielded += 1

    for number, argument in enumerate(arguments):
        if len(running) == jobs:
            yield from settled()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(sender, function, argument))
        process.start()
        sender.close()
        running[receiver] = number, process
    while running:
        yield from settled()


def _send(sender: Any, function: Callable[[Any], Row], argument: Any) -> None:
    try:
        sender.send(function(argument))
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        sender.send({"failure": f"{type(error).__name__}: {first_line}"})


def summary(rows: list[Row]) -> dict[str, dict[str, dict[str, int]]]:
    """By target and kernel: how many, what failed or spills, and the most registers of a thread."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for row in rows:
        of_target = found.setdefault(row["target"], {})
        line = of_target.setdefault(
            row["name"].split()[0],
            {"variants": 0, "failures": 0, "spills": 0, "complaints": 0, "registers": 0},
        )
        line["variants"] += 1
        line["failures"] += "failure" in row
        line["spills"] += row.get("spill_bytes", 0) > 0
        line["complaints"] += complaint(row) is not None
        line["registers"] = max(line["registers"], row.get("registers", 0))
    return found


def digest_of(work: list[tuple[str, Variant]]) -> str:
    """Of all that the rows follow from."""
    return hashlib.sha256("".join(key_of(*each) for each in work).encode()).hexdigest()[:16]


def summary_there(file: Path | None, version: str, target: str, of: str) -> dict[str, Any] | None:
    """A target's in the file, if it is of the same binaries."""
    if file is None or not file.exists():
        return None
    found = json.loads(file.read_text()).get(version, {}).get(target, {})
    return {**found} if found.pop("of", None) == of else None


def add_summary(file: Path, version: str, rows: list[Row], of: str) -> None:
    """Put this version's targets into the file, beside what it holds of others; a line a kernel."""
    known = json.loads(file.read_text()) if file.exists() else {}
    for target, kernels in summary(rows).items():
        known.setdefault(version, {})[target] = {"of": of, **kernels}
    text = json.dumps(dict(sorted(known.items())), indent=1)
    file.write_text(re.sub(r"\{\s+(\"variants[^}]*?)\s+\}", _on_one_line, text) + "\n")


def _on_one_line(found: re.Match[str]) -> str:
    return "{" + re.sub(r"\s+", " ", found[1]) + "}"


def chosen(options: argparse.Namespace, targets: list[str]) -> list[tuple[str, Variant]]:
    """The variants of these targets that the options leave."""
    import triton

    modules = load_kernels()
    work = [
        (target, variant)
        for target in targets
        for variant in variants(modules, target)
        if options.dtype in (None, variant.dtype) and re.search(options.only, variant.name)
    ]
    return work if options.sample is None else sample(work, options.sample, triton.__version__)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--check",
        action="store_true",
        help="print what is wrong, and fail for what does not compile or spills a lot",
    )
    parser.add_argument("--sample", type=int, help="one of each class, or so many if more")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument(
        "--summary",
        type=Path,
        help="put what is found there, target by target; a target that is there is not made again",
    )
    parser.add_argument(
        "--known", type=Path, help="rows made before are taken from there, and new ones put there"
    )
    parser.add_argument("--dtype", choices=ITEMSIZE, help="one instead of all")
    parser.add_argument("--only", default="", help="variants whose name matches this pattern")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(CARDS)}; all by default")
    parser.add_argument("--sass", type=Path, help="put static_table.py's table there, and no more")
    options = parser.parse_args()
    partly = options.only or options.dtype or options.sample is not None
    if options.summary is not None and partly:
        parser.error("--summary is of all variants: leave --only, --dtype and --sample out")
    options.targets = options.targets or list(CARDS)
    return options


def main() -> None:
    """Print a line a kernel, or write all as JSON; with --check, exit 1 if one does not compile,
    or spills more than is tolerated."""
    import triton

    options, version = arguments(), triton.__version__
    if options.sass is not None:
        rows = static_table.table(load_kernels(), "cuda:90")
        static_table.add_table(options.sass, version, rows)
        print("\n".join(map(json.dumps, rows)))
        return
    known, rows, complaints, faults = Known(options.known), [], 0, 0
    for part in [[target] for target in options.targets] if options.summary else [options.targets]:
        of_part, work = [], chosen(options, part)
        warm_caches(work)
        if there := summary_there(options.summary, version, part[0], digest_of(work)):
            complaints += sum(line["complaints"] for line in there.values())
            faults += sum(line["failures"] for line in there.values())
            continue
        for row in report(work, options.jobs, known):
            of_part.append(row)
            found = complaint(row) if options.check else None
            complaints += found is not None
            faults += found is not None and ("failure" in row or row["spill_bytes"] > TOLERATED)
            if found or not (options.check or options.json):
                print(json.dumps({"complaint": found, **row} if found else row), flush=True)
        if options.summary is not None:
            add_summary(options.summary, version, of_part, digest_of(work))
        rows += of_part
    if options.json is not None:
        options.json.write_text(json.dumps({"triton": version, "kernels": rows}))
    if options.check:
        tiers = ", ".join(sorted({row["tier"] for row in rows if row.get("tier")}))
        counts = f"{complaints} complaints, {faults} failures and larger spills"
        print(f"Triton {version}: {len(rows)} kernels, tiers {tiers}, {counts}")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
