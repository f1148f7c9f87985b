"""Builds the compiled libraries with CMake and packs them into a py3-none-<platform> wheel.

Metadata is in pyproject.toml, the build itself in CMakeLists.txt. The libraries hold no Python.h and no torch
symbol outside LibTorch's stable ABI, so one wheel serves every Python 3 and every torch from 2.10 on. Where
they cannot be built, the package installs without them and runs on torch; `sdfast doctor` then says so.

The CUDA library is built where SDFAST_CUDA_ARCHS names GPUs ("8.0;9.0a;12.0"; empty: none), or in its absence
TORCH_CUDA_ARCH_LIST; then it is built or the build fails, and the version says so: 0.1.0+cu130.sm90a.
Where neither does, a build in place makes it for the GPU that is there, under a torch for CUDA. MAX_JOBS
limits the jobs, NVCC_THREADS the architectures that each compiles at once.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cmake"  # one for all destinations, so that nothing is compiled twice
sys.path.insert(0, str(ROOT))

from sdfast import __version__, _cuda_archs  # noqa: E402  imports nothing that may be absent


class CudaBuild(NamedTuple):
    """What the CUDA library is built with and for.

    Attributes:
        archs: at least one.
        nvcc: its path.
        release: of its toolkit, "13.0".
    """

    archs: Sequence[_cuda_archs.Arch]
    nvcc: str
    release: str


def find_nvcc() -> str | None:
    """CUDACXX, CUDA_HOME's, the one on PATH, or CUDA's usual place."""
    named = os.environ.get("CUDACXX")
    homes = [f"{os.environ['CUDA_HOME']}/bin"] if os.environ.get("CUDA_HOME") else []
    folders = [*homes, os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which(named) if named else shutil.which("nvcc", path=os.pathsep.join(folders))


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cuda_build(nvcc: str, text: str) -> CudaBuild:
    """Raises ValueError where `text` names what does not exist or what this nvcc does not know."""
    archs = _cuda_archs.parse(text)
    match = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    if match is None:
        raise ValueError(f"{nvcc} --version names no release")
    known = set(re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch")))
    for arch in archs:
        if f"{arch.major}{arch.minor}" not in known:
            among = ", ".join(sorted((f"{each[:-1]}.{each[-1]}" for each in known), key=float))
            raise ValueError(
                f"{arch} is unknown to nvcc {match[1]}, which knows {among}: install a newer one"
            )
    return CudaBuild(archs, nvcc, match[1])


@functools.cache
def asked_for() -> CudaBuild | None:
    """What the environment asks for. Ends the build where that is impossible, before anything is compiled."""
    text, variable = os.environ.get("SDFAST_CUDA_ARCHS"), "SDFAST_CUDA_ARCHS"
    if text is None:
        text, variable = os.environ.get("TORCH_CUDA_ARCH_LIST"), "TORCH_CUDA_ARCH_LIST"
    if not text or not text.strip(";, \t\n"):
        return None
    nvcc = find_nvcc()
    try:
        if nvcc is not None:
            return cuda_build(nvcc, text)
        _cuda_archs.parse(text)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f'error: {variable}="{text}": {error}. Set SDFAST_CUDA_ARCHS to what to build for, such as'
            ' "8.0;9.0a;12.0", or to nothing for no CUDA library.'
        ) from None
    if variable == "SDFAST_CUDA_ARCHS":
        raise SystemExit(
            f'error: {variable}="{text}": nvcc was not found. Install the CUDA toolkit and set CUDA_HOME or'
            " CUDACXX, or set the variable to nothing for no CUDA library."
        )
    print(f"sdfast: no nvcc, so no CUDA library in spite of {variable}", file=sys.stderr)
    return None


def gpu_here(torch_dir: str) -> CudaBuild | None:
    """For the first GPU here, where there are nvcc and a torch for CUDA, and no variable says otherwise."""
    nvcc = find_nvcc()
    version = pathlib.Path(torch_dir, "version.py")
    if "SDFAST_CUDA_ARCHS" in os.environ or nvcc is None or shutil.which("nvidia-smi") is None:
        return None
    if not version.exists() or not re.search(r"^cuda\b.*= *['\"]", version.read_text(), re.MULTILINE):
        return None
    try:
        seen = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
        major, minor = map(int, seen[0].split("."))
        return cuda_build(nvcc, _cuda_archs.for_capability((major, minor)))
    except (ValueError, IndexError, OSError, subprocess.CalledProcessError) as error:
        print(f"sdfast: no CUDA library for the GPU of this machine: {error}", file=sys.stderr)
        return None


class CMakeBuild(build_ext):
    """Runs CMake, and puts its libraries into the package folder that is being built.

    With SDFAST_REQUIRE_NATIVE=1 a failure ends the build instead of leaving the package without libraries.
    """

    def run(self) -> None:
        asked = asked_for()
        try:
            self._build(asked)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if asked is not None or os.environ.get("SDFAST_REQUIRE_NATIVE") == "1":
                raise
            print(f"\nsdfast: no compiled library was built: {error}", file=sys.stderr)
            print("sdfast: the package installs without, and runs on torch's own kernels.\n", file=sys.stderr)

    def _build(self, asked: CudaBuild | None) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake was not found")
        torch = importlib.util.find_spec("torch")  # found, not imported: importing it takes seconds
        if torch is None or not torch.submodule_search_locations:
            raise RuntimeError("torch was not found; install it first, then build with --no-build-isolation")
        torch_dir = next(iter(torch.submodule_search_locations))
        found = gpu_here(torch_dir) if self.inplace and asked is None else None
        try:
            run_cmake(cmake, torch_dir, asked or found)
        except subprocess.CalledProcessError:
            if found is None or os.environ.get("SDFAST_REQUIRE_NATIVE") == "1":
                raise
            print("\nsdfast: the CUDA library did not build; once more without it\n", file=sys.stderr)
            run_cmake(cmake, torch_dir, None)
        built = ROOT if self.inplace else pathlib.Path(self.build_lib).resolve()
        install(cmake, built / "sdfast")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (pathlib.Path(self.build_lib) / "sdfast").glob("_C_*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def run_cmake(cmake: str, torch_dir: str, cuda: CudaBuild | None) -> None:
    """Configure and build in `BUILD`; the libraries stay there."""
    configure = [
        cmake, "-S", str(ROOT), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release",
        "-USDFAST_LIBTORCH_CPU",  # an earlier build may have found it in another environment
        f"-DSDFAST_TORCH_DIR={torch_dir}", f"-DSDFAST_OUTPUT_DIR={BUILD / 'libraries'}",
        f"-DSDFAST_CUDA_ARCHS={';'.join(_spelled(arch) for arch in cuda.archs) if cuda else ''}",
    ]  # fmt: skip
    if cuda:
        configure.append(f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}")
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    try:
        subprocess.run(configure, check=True)
    except subprocess.CalledProcessError:  # perhaps over the cache of tools that are gone: once more
        shutil.rmtree(BUILD, ignore_errors=True)
        subprocess.run(configure, check=True)
    subprocess.run([cmake, "--build", str(BUILD), "--parallel", jobs], check=True)


def _spelled(arch: _cuda_archs.Arch) -> str:
    return f"{arch}{'+PTX' if arch.ptx else ''}"


def install(cmake: str, package: pathlib.Path) -> None:
    """Copy what was built, and remove what an earlier build left. Who has a library loaded keeps it."""
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        subprocess.run([cmake, "--install", str(BUILD), "--prefix", folder], check=True)
        new = sorted(pathlib.Path(folder).iterdir())
        package.mkdir(parents=True, exist_ok=True)
        for path in new:
            shutil.copy2(path, package / f"{path.name}.new")
            os.replace(package / f"{path.name}.new", package / path.name)
    for path in package.glob("_C_*"):
        if path.name not in {each.name for each in new}:
            path.unlink()


class PlatformWheel(bdist_wheel):
    """Any Python, this platform, and nothing that an earlier build left behind."""

    def run(self) -> None:
        if not self.skip_build:
            shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def version() -> str:
    """The source's, which `sdfast.__version__` is, and what the wheel was built for."""
    cuda = asked_for()
    return f"{__version__}+{_cuda_archs.local_version(cuda.archs, cuda.release)}" if cuda else __version__


setup(
    version=version(),
    # What makes setuptools run build_ext and call the wheel platform-specific; CMake knows the sources.
    ext_modules=[Extension("sdfast._C_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
