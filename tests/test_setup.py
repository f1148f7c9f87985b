"""setup.py: what it builds for whom, and what it says. CMake and the GPU are stand-ins; test_wheel.py has the real one."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from cuda_code import ROOT, find_nvcc

from sdfast import __version__

UNSET = ("SDFAST_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "SDFAST_REQUIRE_NATIVE", "CUDACXX")


def run_setup(folder: pathlib.Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {k: v for k, v in os.environ.items() if k not in UNSET}
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=folder, env=variables | environment, capture_output=True, text=True)


def version_of_setup(**environment: str) -> subprocess.CompletedProcess:
    return run_setup(ROOT, "--version", **environment)


@pytest.mark.parametrize("variable", ["SDFAST_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"])
@pytest.mark.parametrize("text, said", [("9.x", "no architecture"), ("8.0;7.0", "'7.0' is too old")])
def test_a_bad_variable_ends_the_build_before_it_begins(variable, text, said):
    done = version_of_setup(**{variable: text})
    assert done.returncode != 0
    for expected in (f'{variable}="{text}"', said, "Set SDFAST_CUDA_ARCHS to"):
        assert expected in done.stderr


def test_asked_for_without_nvcc():
    """What is asked of sdfast alone is a mistake; the other variable may be meant for others."""
    done = version_of_setup(SDFAST_CUDA_ARCHS="9.0a", CUDACXX="no-such-nvcc")
    assert done.returncode != 0 and "nvcc was not found" in done.stderr
    done = version_of_setup(TORCH_CUDA_ARCH_LIST="9.0", CUDACXX="no-such-nvcc")
    assert done.returncode == 0 and done.stdout.strip() == __version__
    assert "no CUDA library in spite of TORCH_CUDA_ARCH_LIST" in done.stderr


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
def test_versions_and_what_nvcc_knows():
    assert version_of_setup(SDFAST_CUDA_ARCHS="8.0,9.0a").stdout.strip().endswith(".sm80.sm90a")
    assert version_of_setup(SDFAST_CUDA_ARCHS="", TORCH_CUDA_ARCH_LIST="9.0").stdout.strip() == __version__
    assert version_of_setup(TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX").stdout.strip().endswith(".sm80.sm90")
    done = version_of_setup(SDFAST_CUDA_ARCHS="99.0")
    assert done.returncode != 0 and "99.0 is unknown to nvcc" in done.stderr and "which knows" in done.stderr


PROGRAMS = {
    # Leaves what it was asked in a file, and libraries where --install wants them; fails where the test wants that.
    "cmake": """
        echo "$@" >> "$STAND_INS/asked"
        case "$*" in
          *-DSDFAST_CUDA_ARCHS=[0-9]*) mkdir -p build/cmake; touch build/cmake/cuda; test -z "$CUDA_FAILS" ;;
          *-DSDFAST_CUDA_ARCHS=*) mkdir -p build/cmake; rm -f build/cmake/cuda ;;
          *--install*)
            for last; do :; done
            touch "$last/_C_cpu_baseline.so"
            test ! -e build/cmake/cuda || touch "$last/_C_cuda.so" "$last/_C_cuda.json" ;;
        esac
    """,
    "nvidia-smi": 'test -n "$CAPABILITY" && echo $CAPABILITY',
    "nvcc": """
        case "$*" in
          *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
          *--list-gpu-arch*) echo compute_80 compute_86 compute_90 ;;
        esac
    """,
}


@pytest.fixture
def checkout(tmp_path):
    """As much of a source tree as setup.py looks at; returns what builds it in place, and the files that there are then."""
    root, programs, torch = tmp_path / "sdfast", tmp_path / "programs", tmp_path / "packages/torch"
    for folder in (root / "sdfast", programs, torch):
        folder.mkdir(parents=True)
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "sdfast/__init__.py",
        "sdfast/_cuda_archs.py",
    ):
        shutil.copy(ROOT / name, root / name)
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    (torch / "__init__.py").touch()

    def build(torch_cuda="'13.0'", capability="9.0", **environment):
        (torch / "version.py").write_text(f"cuda: Optional[str] = {torch_cuda}\n")
        (tmp_path / "asked").unlink(missing_ok=True)
        variables = {
            "STAND_INS": str(tmp_path), "CAPABILITY": capability, "PYTHONPATH": str(torch.parent),
            "PATH": f"{programs}:/usr/bin:/bin", "CUDACXX": str(programs / "nvcc"),
        }  # fmt: skip
        done = run_setup(root, "build_ext", "--inplace", **variables | environment)
        asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
        names = sorted(path.name for path in (root / "sdfast").glob("_C_*"))
        return done, asked, names

    return build


ALL, CPU = ["_C_cpu_baseline.so", "_C_cuda.json", "_C_cuda.so"], ["_C_cpu_baseline.so"]


def test_in_place_it_builds_for_the_gpu_that_is_there(checkout):
    done, asked, names = checkout()
    assert done.returncode == 0, done.stderr
    assert "-DSDFAST_CUDA_ARCHS=9.0a " in asked and names == ALL
    _, asked, names = checkout(capability="8.6")
    assert "-DSDFAST_CUDA_ARCHS=8.6 " in asked and names == ALL


@pytest.mark.parametrize(
    "here", [{"torch_cuda": "None"}, {"capability": ""}, {"CUDACXX": "none"}, {"SDFAST_CUDA_ARCHS": ""}]
)
def test_in_place_without_one_it_builds_for_none(checkout, here):
    """And the library of an earlier build, of other sources, is gone."""
    assert checkout()[2] == ALL
    done, asked, names = checkout(**here)
    assert done.returncode == 0, done.stderr
    assert "-DSDFAST_CUDA_ARCHS= " in asked and names == CPU


def test_what_is_asked_for_goes_before_what_is_there(checkout):
    done, asked, _ = checkout(SDFAST_CUDA_ARCHS="8.0, 8.6+PTX")
    assert done.returncode == 0 and "-DSDFAST_CUDA_ARCHS=8.0;8.6+PTX " in asked
    _, asked, _ = checkout(TORCH_CUDA_ARCH_LIST="8.0")
    assert "-DSDFAST_CUDA_ARCHS=8.0 " in asked


def test_what_was_asked_for_is_built_or_the_build_fails(checkout):
    done, _, names = checkout(SDFAST_CUDA_ARCHS="9.0a", CUDA_FAILS="1")
    assert done.returncode != 0 and names == []


def test_what_was_not_asked_for_may_fail(checkout):
    """Where a GPU was found, and its library does not build, the CPU's are built all the same."""
    done, asked, names = checkout(CUDA_FAILS="1")
    assert done.returncode == 0 and names == CPU
    assert "once more without it" in done.stderr and "-DSDFAST_CUDA_ARCHS= " in asked
    done, _, names = checkout(CUDA_FAILS="1", SDFAST_REQUIRE_NATIVE="1")
    assert done.returncode != 0


def test_jobs(checkout):
    _, asked, _ = checkout(MAX_JOBS="3")
    assert "--parallel 3" in asked
