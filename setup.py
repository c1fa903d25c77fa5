"""Build of the C++ CPU kernel; everything else about the package is in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARY = "libwmtp_cpu.so"
# Packages whose folder stands elsewhere: neither `kernels` nor `benchmarks` may be an import name.
FOLDERS = {"wmtp.kernels": "kernels/gpu", "wmtp.benchmarks": "benchmarks"}


class CMakeBuild(build_ext):
    """CMake + Ninja into the package. Without them, or a compiler, the package works in eager."""

    def run(self):
        package = Path.cwd() / "wmtp" if self._in_source() else Path(self.build_lib) / "wmtp"
        build = Path(self.build_temp).resolve() / "cpu"
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        install = ["cmake", "--install", str(build), "--prefix", str(package.resolve())]
        (package / LIBRARY).unlink(missing_ok=True)  # a failed build must not leave the last one
        try:
            for command in (configure, ["cmake", "--build", str(build)], install):
                subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"WARNING: the wmtp CPU kernel was not built ({error}). wmtp installs without it "
                "and runs its CPU operator in eager PyTorch. To get it, install CMake, Ninja and "
                "a C++17 compiler and install wmtp again.",
                file=sys.stderr,
            )

    def get_outputs(self):
        return [str(Path(self.build_lib) / "wmtp" / LIBRARY)]

    def get_output_mapping(self):
        return {}

    def _in_source(self):
        return self.inplace or self.editable_mode


class PlatformWheel(bdist_wheel):
    """The library does not touch Python's ABI: one wheel per platform serves every version."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=sorted({*find_packages(include=["wmtp", "wmtp.*"]), *FOLDERS}),
    package_dir={"wmtp": "wmtp", **FOLDERS},
    ext_modules=[Extension("wmtp.libwmtp_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
