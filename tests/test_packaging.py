"""An installation without a compiler succeeds; the wheel's promises stand in the metadata."""

import email
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import wmtp

ROOT = Path(__file__).parents[1]
FILES = ("setup.py", "CMakeLists.txt", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
FORMS = ("wrong_number", "slow_or_memory", "feature")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A checkout that was built without a compiler, and without a torch that can be imported."""
    checkout = tmp_path_factory.mktemp("built")
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    for name in ("kernels", "wmtp", "benchmarks"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("*.so"))
    (checkout / "torch.py").write_text("raise ImportError('a build needs no torch')\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "build", "egg_info"],
        cwd=checkout,
        env={**os.environ, "CXX": "/no/such/compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return checkout, done.stderr


def test_build_without_a_compiler_succeeds_and_says_so(built):
    checkout, said = built
    assert "the wmtp CPU kernel was not built" in said
    assert "runs its CPU operator in eager PyTorch" in said
    assert not list(checkout.rglob("*.so"))
    assert list(checkout.glob("build/*/wmtp/kernels/register_kernel.py"))


def test_types_are_shipped_in_wheel_and_sdist(built):
    checkout, _ = built
    assert list(checkout.glob("build/lib*/wmtp/py.typed"))
    assert "wmtp/py.typed" in (checkout / "wmtp.egg-info/SOURCES.txt").read_text().splitlines()


def test_one_version_for_source_and_package(built):
    checkout, _ = built
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = email.message_from_string((checkout / "wmtp.egg-info/PKG-INFO").read_text())
    assert metadata["Version"] == wmtp.__version__
    links = dict(link.split(", ") for link in metadata.get_all("Project-URL"))
    assert set(links) == {"Homepage", "Documentation", "Changelog", "Issues"}


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


def test_help_knows_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = next(line for line in makefile.splitlines() if line.startswith(".PHONY:")).split()[1:]
    command = ["make", "--no-print-directory", "help"]  # the suite may run inside make itself
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(line.split()[1] for line in done.stdout.splitlines()) == sorted(targets)


def test_workflow_calls_the_one_script():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["ci"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_hooks_need_no_network():
    yaml = pytest.importorskip("yaml")
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = {hook["id"]: hook for hook in repositories[0]["hooks"]}
    assert set(hooks) == {"ruff-check", "ruff-format", "mypy"}
    assert {hook["language"] for hook in hooks.values()} == {"system"}


@pytest.mark.parametrize("form", FORMS)
def test_issue_forms_are_what_the_site_takes(form):
    yaml = pytest.importorskip("yaml")
    parsed = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())
    assert {"name", "description", "body"} <= set(parsed)
    fields = [part for part in parsed["body"] if part["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)
