"""Builds the compiled libraries with CMake and packs them into a py3-none-<platform> wheel.

Metadata is in pyproject.toml, the build itself in CMakeLists.txt. The libraries hold no Python.h and no torch
symbol outside LibTorch's stable ABI, so one wheel serves every Python 3 and every torch from 2.10 on. Where
they cannot be built, the package installs without them and runs on torch; `sdfast doctor` then says so.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake once; its libraries land in the package folder that is being built.

    With SDFAST_REQUIRE_NATIVE=1 a failure ends the build instead of leaving the package without libraries.
    """

    def run(self) -> None:
        try:
            self._build()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("SDFAST_REQUIRE_NATIVE") == "1":
                raise
            print(f"\nsdfast: no compiled library was built: {error}", file=sys.stderr)
            print("sdfast: the package installs without, and runs on torch's own kernels.\n", file=sys.stderr)

    def _build(self) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake was not found")
        torch = importlib.util.find_spec("torch")  # found, not imported: importing it takes seconds
        if torch is None or not torch.submodule_search_locations:
            raise RuntimeError("torch was not found; install it first, then build with --no-build-isolation")
        output_dir = ROOT / "sdfast" if self.inplace else pathlib.Path(self.build_lib).resolve() / "sdfast"
        # One build folder per destination, so that an editable install and a wheel do not undo each other.
        build_dir = ROOT / "build" / ("cmake-inplace" if self.inplace else "cmake-wheel")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build_dir), "-DCMAKE_BUILD_TYPE=Release",
            "-USDFAST_LIBTORCH_CPU",  # an earlier build may have found it in another environment
            f"-DSDFAST_TORCH_DIR={next(iter(torch.submodule_search_locations))}",
            f"-DSDFAST_OUTPUT_DIR={output_dir}",
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        try:
            subprocess.run(configure, check=True)
        except subprocess.CalledProcessError:  # perhaps over the cache of tools that are gone: once more
            shutil.rmtree(build_dir, ignore_errors=True)
            subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir), "--parallel", jobs], check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (pathlib.Path(self.build_lib) / "sdfast").glob("_C_*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """Any Python, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    # What makes setuptools run build_ext and call the wheel platform-specific; CMake knows the sources.
    ext_modules=[Extension("sdfast._C_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
