"""Without a GPU the Triton kernels run in Triton's interpreter or, with WMTP_KERNELS_ON=sm_80 or
sm_90a, compiled, on the machine of tests/ptx. Either is chosen before Triton's import."""

import os
import runpy
import zlib
from collections import Counter, defaultdict
from pathlib import Path

# A graph that was compiled with an operator as it was yesterday is not to be found again.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

import torch

if os.environ.get("WMTP_KERNELS_ON"):
    os.environ["TRITON_INTERPRET"] = "0"
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The folders of the package, where it is not installed.
if (links := Path(__file__).parents[1] / "benchmarks" / "__init__.py").exists():
    runpy.run_path(str(links))

import pytest
from torch.utils import deterministic

from support import instruction_sets, interpreter
from wmtp import kernels
from wmtp.backends import cpu_library

MACHINE = None
if on := os.environ.get("WMTP_KERNELS_ON"):
    from ptx import launch

    MACHINE = launch.install(on)
elif kernels.interpreted():
    interpreter.amend()

# (backend, device): Triton on the CPU is its interpreter; on a GPU it is the real thing.
TARGETS = [
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(
        ("triton", "cpu"),
        id="interpreted",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the real kernel"),
    ),
    pytest.param(("triton", "cuda"), id="gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _nothing_found(request):
    """By the PTX machine, in the kernels that a test has launched."""
    yield
    if MACHINE is None:
        return
    lines, counts = MACHINE.record.taken()
    request.node.user_properties.append(("ptx", {**counts, "findings": len(lines)}))
    assert not lines, "\n".join(lines)


@pytest.fixture
def ptx_machine():
    """The machine, where kernels run on it."""
    if MACHINE is None:
        pytest.skip("the kernels are not on the PTX machine: set WMTP_KERNELS_ON")
    return MACHINE


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of a few small text files."""
    from support import (
        tiny_runs,  # here, so that kernel tests run where nothing but torch is installed
    )

    return tiny_runs.write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def data(corpus):
    """The same, tokenised."""
    from support import tiny_runs

    return tiny_runs.prepare(corpus)


@pytest.fixture(autouse=True)
def _no_worker(monkeypatch):
    """A suite that a test starts is not one of this suite's processes, and may be timed."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.fixture
def one_thread():
    """For small tensors: a second thread costs more than it does, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def unwritten_is_nan():
    """New memory is full of NaN, so that an entry that a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the kernels run; whatever they forget to write there is NaN."""
    if request.param == "cpu" and not kernels.interpreted():
        pytest.skip("a GPU was found, so Triton is not in its interpreter")
    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4, device=request.param).isnan().all()
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["token", "row", "online"])
def tier(request, monkeypatch):
    """The Triton kernel over the logits, forced."""
    monkeypatch.setenv("WMTP_TRITON_TIER", request.param)
    return request.param


@pytest.fixture(params=instruction_sets.HERE)
def instruction_set(request, one_thread):
    """The C++ kernel with every instruction set of this machine."""
    if reason := instruction_sets.why_not(request.param):
        pytest.skip(reason)
    yield request.param
    cpu_library.select_instruction_set(cpu_library.load(), "")


# Of these files' cases the interpreter runs a half; all of them in `make fuzz`.
SHARED_OUT = ("test_numerics.py", "test_targets.py", "test_metrics.py", "test_weightings.py")


def in_share(item, share):
    return zlib.crc32(item.nodeid.encode()) % share == 0


def keep(config, items, chosen):
    left = [item for item in items if not chosen(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if chosen(item)]


def pytest_collection_modifyitems(config, items):
    """Without a device one skip a file says how many of its tests want one; `-m gpu` lists them."""
    if (share := int(os.environ.get("WMTP_PTX_SHARE", 1))) > 1:
        keep(config, items, lambda item: in_share(item, share))
    if (part := int(os.environ.get("WMTP_INTERPRETED_SHARE", 2))) > 1 and len(items) > 1:
        keep(
            config,
            items,
            lambda item: (
                "interpreted" not in item.name
                or item.path.name not in SHARED_OUT
                or in_share(item, part)
            ),
        )
    if torch.cuda.is_available():
        return
    by_file = defaultdict(list)
    for item in items:
        if item.get_closest_marker("gpu"):
            by_file[item.path].append(item)
    for ones in by_file.values():
        reason = f"no CUDA or ROCm device on this machine: {len(ones)} tests of this file need one"
        for item in ones:
            item.add_marker(pytest.mark.skip(reason=reason))
    others = {item for ones in by_file.values() for item in ones[1:]}
    if others and not config.getoption("markexpr"):
        config.hook.pytest_deselected(items=list(others))
        items[:] = [item for item in items if item not in others]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """On a GPU machine, where nothing can be installed: a file that needs a package that is not
    there is skipped, and does not stop those of the kernels."""
    report = yield
    if report.failed and collector.config.getoption("markexpr") == "gpu":
        missing = report.call.excinfo.value.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name.split(".")[0] != "wmtp":
            reason = f"Skipped: {missing.name} is not installed"
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, reason)
    return report


def told_by(reports, name) -> Counter[str]:
    """The sum of what tests have noted under this name."""
    noted = [dict(report.user_properties).get(name) for report in reports]
    return sum(map(Counter, filter(None, noted)), Counter())


def pytest_terminal_summary(terminalreporter):
    """What the runs of test_faults.py went through, and what the PTX machine has run."""
    every = [report for reports in terminalreporter.stats.values() for report in reports]
    ends = [report for report in every if getattr(report, "when", "") == "teardown"]
    if ran := told_by(ends, "ptx"):
        names = ("launches", "programs", "instructions", "findings")
        told = ", ".join(f"{ran[name]} {name}" for name in names)
        terminalreporter.write_line(f"as PTX on {os.environ['WMTP_KERNELS_ON']}: {told}")
    if faults := told_by(terminalreporter.stats.get("passed", []), "faults"):
        told = ", ".join(f"{count} {name}" for name, count in sorted(faults.items()))
        terminalreporter.write_line(f"runs that ended as they should, of all faults: {told}")
