"""Imports flow down only, and `import wmtp` needs torch alone; read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module imports from lower layers and its own package only.
LAYERS = [
    {"transforms"},
    {"exact_zero"},
    {"labels", "layout", "registry", "files", "once"},
    {"reduction"},
    {"inplace", "kinds", "sharded", "digests", "metrics"},
    {"numerics"},
    {"records", "checks", "label_checks"},
    {"weightings"},
    {"arguments", "unembedding"},
    {"reference", "kernels"},
    {"backends"},
    {"ops"},
    {"cross_entropy"},
    {"loss", "linear", "denominator", "documents"},
    {"scorers", "models", "data", "benchmarks"},
    {"trainers"},
    {"cli"},
    {"__main__"},
]
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
FOLDERS = {"wmtp": ROOT / "wmtp", "wmtp.kernels": ROOT / "kernels/gpu"}
FOLDERS["wmtp.benchmarks"] = ROOT / "benchmarks"


def modules():
    found = []
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            dotted = ".".join((package, *file.relative_to(folder).with_suffix("").parts))
            found.append(pytest.param(dotted.removesuffix(".__init__"), file, id=dotted))
    return found


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where a name comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("module", "file"), modules())
def test_imports_flow_down(module, file):
    if module == "wmtp":
        return
    own = module.split(".")[1]
    for name in imported(file):
        parts = name.split(".")
        if parts[0] != "wmtp" or len(parts) == 1 or parts[1] not in LAYER:
            continue
        assert parts[1] == own or LAYER[parts[1]] < LAYER[own], f"{module} imports {name}"


def test_every_module_has_a_layer():
    names = {path.stem for path in (ROOT / "wmtp").iterdir() if path.suffix == ".py"}
    names |= {path.parent.name for path in (ROOT / "wmtp").glob("*/__init__.py")}
    assert names - {"__init__"} <= set(LAYER)


def test_import_wmtp_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import wmtp\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["wmtp"]


def test_kernels_is_never_an_import_name():
    assert not (ROOT / "kernels/__init__.py").exists()
