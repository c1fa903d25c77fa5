"""What the GPU suite compiles ahead is what it launches later; compiled here for a card's sake."""

import json
import os
import subprocess
import sys

import pytest

from support.gpu_jobs import BOTH, job
from wmtp.benchmarks import gpu, gpu_compile
from wmtp.benchmarks.gpu_cases import OURS, Job
from wmtp.benchmarks.gpu_compile import parts
from wmtp.benchmarks.problem import Case

pytest.importorskip("triton")


def test_every_kind_of_call_is_compiled_once_and_together_with_its_likes():
    jobs = [job for jobs in gpu.all_jobs().values() for job in jobs]
    shares = parts(jobs, 5)
    found = [job for share in shares for job in share]
    assert {job.case.provider for job in found} == set(OURS)
    kinds = [(*one[1:], one.case[1][2:], *one.case[2:]) for one in found]
    assert len(set(kinds)) == len(kinds)
    assert set(kinds) == {
        (*one[1:], one.case[1][2:], *one.case[2:]) for one in jobs if one.case.provider in OURS
    }
    owners = {}
    for number, share in enumerate(shares):
        for one in share:
            owners.setdefault(
                (one.case.shape[2:], one.case.dtype, one.case.dim, one.case.weighting), number
            )
    assert set(owners.values()) == set(range(5))
    assert all(
        owners[one.case.shape[2:], one.case.dtype, one.case.dim, one.case.weighting] == number
        for number, share in enumerate(shares)
        for one in share
    )


# Triton's own compiler, told that there is an H100; what it makes lies in its cache on disk.
H100 = """
import json, sys
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Card:
    get_current_device = get_current_stream = lambda self, *rest: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Card())
from wmtp import backends, kernels
from wmtp.benchmarks import gpu_compile
from wmtp.benchmarks.gpu_cases import Job
from wmtp.benchmarks.linear_problem import new_problem
from wmtp.benchmarks.problem import Case
from wmtp.kernels import tiers

backends.DEFAULT_FOR_DEVICE["cpu"] = "triton"
kernels.interpreted = lambda: True
tiers.machine = lambda device: tiers.Machine(32, 1, 4)
cache, (job, linear, unservable, broken) = Path(sys.argv[1]), [
    Job(Case(*case, dim=dim), *forced) for case, dim, forced in json.loads(sys.argv[2])
]
records = Path(sys.argv[3])
gpu_compile.compile_jobs([job, linear, unservable, broken], 0, 60.0, records, "cpu")
before = set(cache.iterdir())
assert any(cache.rglob("register_kernel.cubin")) and any(cache.rglob("scale_kernel.cubin"))
# The calls of a timing: in a process that knows no binary nothing is left to compile.
for one in (job, linear):
    for module in list(sys.modules.values()):
        for kernel in vars(module).values() if "wmtp.kernels" in module.__name__ else ():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()
    with gpu_compile.compile_only() as binaries:
        problem = new_problem(one.case.shape, *one.case[2:6:3], one.case.dim, "cpu")
        problem.call(one.case.provider, one.case.direction)()
    assert binaries
    new = {file.stem for made in set(cache.iterdir()) - before for file in made.glob("*.cubin")}
    # To the linear loss's scale_kernel the number of rows is a constant.
    assert new <= ({"scale_kernel"} if one is linear else set()), new
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The records of four jobs: two that can be had, a tier that cannot, a provider that breaks."""
    folder = tmp_path_factory.mktemp("compiled")
    small, wide = (1, 40, 2, 700), (1, 40, 2, 70000)
    jobs = [
        (("speed", small, "bfloat16", BOTH, "fused"), 0, ("row",)),
        (("linear", small, "bfloat16", BOTH, "fused", "uniform"), 16, ()),
        (("tiers", wide, "bfloat16", BOTH, "fused", "ref_ce"), 0, ("token",)),
        (("speed", small, "bfloat16", BOTH, "nobody"), 0, ()),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    (folder / "cache").mkdir()
    arguments = [folder / "cache", json.dumps(jobs), folder / "records"]
    done = subprocess.run(
        [sys.executable, "-c", H100, *map(str, arguments)],
        env={**environment, "TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return gpu_compile.read_records(folder / "records")


def test_nothing_is_left_to_compile_when_a_job_is_timed(compiled):
    given, linear, *_ = compiled
    assert (given["outcome"], linear["outcome"]) == ("ok", "ok")
    assert len(given["binaries"]) == 4  # weights, row, finish, and what scales the gradient
    assert linear["binaries"]


def test_what_cannot_be_had_is_told_and_stops_nothing(compiled):
    *_, unservable, broken = compiled
    assert unservable["outcome"] == "refused"
    assert unservable["why"].startswith("ValueError: WMTP_TRITON_TIER=token cannot hold")
    assert (broken["outcome"], broken["why"]) == ("failed", "KeyError: 'nobody'")
    assert unservable["case"] == f"2, 70000, bfloat16, {BOTH}, ref_ce, token"


def test_a_process_that_dies_in_the_compiler_costs_one_job(monkeypatch, tmp_path):
    """Two processes share four jobs; whoever compiles the second dies, as Triton can."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys\n"
        "value = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
        "part, first = value('--part'), int(value('--first'))\n"
        "for number in range(first, 2):\n"
        "    if (part, number) == ('0/2', 1): os.abort()\n"
        "    record = json.dumps({'case': part, 'outcome': 'ok', 'why': ''})\n"
        "    open(value('--records'), 'a').write(record + '\\n')\n"
    )
    monkeypatch.setattr(gpu_compile, "WORKER", (sys.executable, str(script)))
    monkeypatch.setattr(gpu_compile, "processes", lambda: 2)
    jobs = [job(shape=(1, 8, 2, vocabulary)) for vocabulary in (40, 30, 20, 10)]
    found = gpu_compile.compile_in_processes("compile", jobs, 30.0, tmp_path)
    assert [record["outcome"] for record in found] == ["ok", "failed", "ok", "ok"]
    assert found[1]["case"] == f"2, 20, bfloat16, {BOTH}, given"
    assert found[1]["why"] == "its process ended with status -6"


def test_a_call_that_fails_is_told(monkeypatch, tmp_path):
    code = "import sys; number = sys.argv[-1]; print('bad ' + number); sys.exit(number == '1/6')"
    monkeypatch.setattr(gpu_compile, "WORKER", (sys.executable, "-c", code))
    found = gpu_compile.call_in_processes(30.0, tmp_path)
    assert [record["outcome"] for record in found] == ["ok", "failed", *["ok"] * 4]
    assert found[1]["why"] == "exit status 1: bad 1/6"


def test_the_suites_workers_compile_their_share(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(gpu, "compile_jobs", lambda *arguments: asked.append(arguments) or 0)
    options = ["--first", "3", "--seconds", "9", "--records", str(tmp_path / "r"), "--part", "1/4"]
    for worker, studies in gpu.COMPILED.items():
        assert gpu.main(["--worker", worker, *options]) == 0
        jobs = [one for name in studies for one in gpu.all_jobs()[name]]
        assert asked.pop() == (parts(jobs, 4)[1], 3, 9.0, tmp_path / "r")


def test_a_job_is_named():
    case = Case("occupancy", (1, 8, 4, 32000), "bfloat16", BOTH, "fused")
    record = gpu_compile.new_record(Job(case, "row", 2), "ok")
    assert record["case"] == f"4, 32000, bfloat16, {BOTH}, given, row, 2 CTAs an SM"
