"""An installation without a compiler succeeds; the wheel's promises stand in the metadata."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_build_without_a_compiler_succeeds_and_says_so(tmp_path):
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("kernels", "wmtp", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    done = subprocess.run(
        [sys.executable, "setup.py", "build"],
        cwd=tmp_path,
        env={**os.environ, "CXX": "/no/such/compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "the wmtp CPU kernel was not built" in done.stderr
    assert "runs its CPU operator in eager PyTorch" in done.stderr
    assert not list(tmp_path.rglob("*.so"))
    assert list(tmp_path.glob("build/*/wmtp/kernels/register_kernel.py"))


def test_torch_is_the_only_core_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [name.split(">")[0] for name in project["dependencies"]] == ["torch"]
    assert set(project["optional-dependencies"]) == {"train", "bench", "test", "all"}


def test_every_requirement_of_ours_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    extras = project["optional-dependencies"]
    groups = (project["dependencies"], extras["train"], extras["bench"], extras["test"])
    assert {name.split(">")[0] for group in groups for name in group} - {"wmtp[train]"} <= pinned
