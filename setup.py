"""Builds the native modules with CMake. Everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
MODULES = ("_cpu", "_emulated", "_cuda", "_nvshmem")  # _cuda where there is an nvcc, _nvshmem where NVSHMEM is, too
# Of CMakeLists.txt, from the environment.
OPTIONS = ("DEEP_A2A_CUDA", "DEEP_A2A_CUDA_ARCHS", "DEEP_A2A_NVSHMEM", "DEEP_A2A_NVSHMEM_DIR")


class CMakeBuild(build_ext):
    """Each extension is the CMake target, and install component, of its last name."""

    def build_extensions(self) -> None:
        # One directory for each interpreter, kept between builds so that only what changed is compiled again.
        self.build_dir = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        forget_configuration(self.build_dir)
        run_cmake(
            *("-S", str(ROOT), "-B", str(self.build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",  # no directory in an isolated build: PATH has it
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DDEEP_A2A_PYTHON=ON",
            *(f"-D{name}={os.environ[name]}" for name in OPTIONS if os.environ.get(name)),
        )
        run_cmake("--build", str(self.build_dir))
        built = (self.build_dir / "modules.txt").read_text().split()
        for left_out in set(MODULES) - set(built):  # of an earlier editable installation
            for stale in (ROOT / "deep_a2a").glob(f"{left_out}.*.so"):
                stale.unlink()
        self.extensions[:] = [ext for ext in self.extensions if ext.name.rpartition(".")[2] in built]
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        component = ext.name.rpartition(".")[2]
        run_cmake("--install", str(self.build_dir), "--component", component, "--prefix", str(destination))


def forget_configuration(build_dir: Path) -> None:
    """Drop what CMake remembers but for the objects: it names programs of an earlier, vanished build environment."""
    (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
    for compilers in build_dir.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(compilers)


def run_cmake(*arguments: str) -> None:
    command = [str(Path(cmake.CMAKE_BIN_DIR) / "cmake"), *arguments]
    if subprocess.run(command).returncode != 0:
        raise ExecError(f"failed, see the messages above: {' '.join(command)}")


setup(
    ext_modules=[Extension(f"deep_a2a.{name}", sources=[]) for name in MODULES],
    cmdclass={"build_ext": CMakeBuild},
)
