"""The wheel: built for every GPU that we support, installed where nothing else of ours is, and used on the CPU.

Its machine code is read here, too, so that nothing is compiled twice: no kernel may spill or have anything in local
memory, and matrix kernels need their instruction (cuda_code.py).
"""

import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import zipfile

import cuda_code
import pytest
import torch
from cuda_code import ROOT

import sdfast
from sdfast import _cuda_archs

ARCHS = "8.0;8.6;8.9;9.0a;10.0;12.0"
LARGEST_BYTES = 100 << 20
OBJECTS = ROOT / "build/cmake/CMakeFiles/_C_cuda.dir/csrc"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def archs():
    """What to build the CUDA library for: nothing where there is no nvcc, which no machine of CI lacks."""
    if cuda_code.find_nvcc() is None:
        if os.environ.get("SDFAST_REQUIRE_NATIVE") == "1":
            pytest.fail("no nvcc", pytrace=False)
        return ""
    return ARCHS


@pytest.fixture(scope="module")
def wheel(archs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # cmake and ninja where the system has none; others than before would compile everything again.
    scripts = sysconfig.get_path("scripts")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir", "-w", folder, "."],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "SDFAST_CUDA_ARCHS": archs, "SDFAST_REQUIRE_NATIVE": "1",
             "PATH": f"{os.environ['PATH']}{os.pathsep}{scripts}"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A new environment with the wheel, and the packages of this one but for what is ours; its Python."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    run(python, *pip, wheel)
    (site,) = home.glob("lib/python*/site-packages")
    # Read after that, and without the files in it that add further folders: not our source tree.
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return python


def run(installed: pathlib.Path, *command: object) -> str:
    """What a command prints, away from the source tree."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        list(map(str, command)), cwd=installed.parent, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def libraries(installed: pathlib.Path) -> list[pathlib.Path]:
    return sorted(installed.parents[1].glob("lib/python*/site-packages/sdfast/_C_*.so"))


@pytest.fixture
def cuda_library(archs, installed):
    if not archs:
        pytest.skip("no nvcc")
    return next(path for path in libraries(installed) if path.stem == "_C_cuda")


def test_name_and_version(archs, wheel, installed):
    """The wheel says what it was built for; `sdfast.__version__` is the source's, of whatever build."""
    expected = sdfast.__version__
    if archs:
        toolkit = re.search(r"release (\d+)\.(\d+)", cuda_code._nvcc_version(cuda_code.find_nvcc()))
        expected += f"+cu{toolkit[1]}{toolkit[2]}.sm80.sm86.sm89.sm90a.sm100.sm120"
    assert re.fullmatch(rf"sdfast-{re.escape(expected)}-py3-none-\w+\.whl", wheel.name)
    code = (
        "import importlib.metadata, sdfast; print(importlib.metadata.version('sdfast'), sdfast.__version__)"
    )
    assert run(installed, installed, "-c", code).split() == [expected, sdfast.__version__]


def test_what_is_in_it(wheel):
    names = {path for path in zipfile.ZipFile(wheel).namelist() if path.startswith("sdfast/")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "sdfast").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert {"sdfast/py.typed", "sdfast/_C_cpu_baseline.so", "sdfast/assets/digits/model_index.json"} <= names
    assert not [name for name in names if name.endswith((".new", ".cu", ".cpp"))]
    assert wheel.stat().st_size < LARGEST_BYTES


def test_it_runs_on_the_cpu(installed):
    code = """
        import sys, torch, sdfast
        from sdfast import ops
        assert sdfast.__file__.startswith(sys.prefix), sdfast.__file__
        x = torch.randn(2, 32, 8, 8)
        y = ops.group_norm(x, 4, activation="silu", backend="cpu")
        expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x.double(), 4))
        assert (y - expected).abs().max() < 1e-5
    """
    run(installed, installed, "-c", "\n".join(line.strip() for line in code.splitlines()))


def test_its_doctor(archs, installed):
    out = run(installed, installed.parent / "sdfast", "doctor")
    assert re.search(r"yes  _C_cpu_\w+: loaded", out) and "could not be found out" not in out
    if archs:
        assert "code for sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120, PTX of compute_120" in out


def test_nothing_of_python_is_linked(installed):
    """Nor a CUDA run-time, which would be another one than torch's."""
    found = libraries(installed)
    assert len(found) >= 2
    for path in found:
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output_of("readelf", "-dW", path))
        assert "libtorch_cpu.so" in needed
        assert not [name for name in needed if "python" in name or "cudart" in name or "c10" in name]
        assert "RPATH" not in output_of("readelf", "-dW", path) and "RUNPATH" not in output_of(
            "readelf", "-dW", path
        )
        assert not [name for name in symbols(path) if name.startswith(("Py", "_Py"))]


def test_the_run_time_within_is_hidden(cuda_library):
    """torch's own must not be taken for it, nor it for torch's."""
    assert not [name for name in symbols(cuda_library) if re.match(r"_*(cuda|cu|nv)[A-Z]", name)]
    assert "libtorch_cuda.so" in output_of("readelf", "-dW", cuda_library)  # whom it asks for the stream


def test_it_holds_what_it_says(cuda_library):
    contents = _cuda_archs.read_contents(cuda_library)
    cuobjdump = cuda_code._package("triton") / "backends/nvidia/bin/cuobjdump"
    assert set(re.findall(r"sm_(\w+)\.cubin", output_of(cuobjdump, "-lelf", cuda_library))) == set(
        contents.code
    )
    assert set(re.findall(r"sm_(\w+)\.ptx", output_of(cuobjdump, "-lptx", cuda_library))) == set(contents.ptx)


def test_its_machine_code_is_clean(cuda_library):
    """Of every kernel for every GPU; and none was left out."""
    sources = cuda_code.sources()
    assert sources
    for source in sources:
        found = cuda_code.code_in(OBJECTS / f"{source.name}.o", source)
        assert set(found) == set(cuda_code.ARCHITECTURES)
        kernels = {kernel.name for code in found.values() for kernel in code.kernels}
        assert kernels, source
        faults = [
            f"{source.name}, sm_{arch}: {fault}" for arch, code in found.items() for fault in code.faults
        ]
        assert not faults, "\n".join(faults)


def test_what_is_checked_is_what_ships(cuda_library):
    """cuda_code.py compiles as CMake does: the same kernels with the same registers."""
    source = cuda_code.CSRC / "add_noise_cuda.cu"
    shipped = cuda_code.code_in(OBJECTS / f"{source.name}.o", source)["89"]
    assert shipped == cuda_code.code_of(source, "89")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a libtorch_cuda of its own")
def test_it_loads_and_registers_its_kernels(cuda_library, installed, tmp_path):
    """Beside a stand-in for libtorch_cuda: whatever else it needs is in torch for the CPU, resolved at once."""
    source, stand_in = tmp_path / "stand_in.c", tmp_path / "stand_in.so"
    source.write_text("int aoti_torch_get_current_cuda_stream(int i, void** stream) { return 0; }\n")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", source, "-o", stand_in], check=True
    )
    code = f"""
        import ctypes, os, torch
        from sdfast import _library, ops
        ctypes.CDLL({str(stand_in)!r})
        ctypes.CDLL({str(cuda_library)!r}, mode=os.RTLD_NOW)
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        missing = [name for name in _library._cuda_ops if not has(f"sdfast::{{name}}_cuda", "CUDA")]
        assert _library._cuda_ops and not missing, missing
    """
    run(installed, installed, "-c", "\n".join(line.strip() for line in code.splitlines()))


def output_of(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def symbols(path: pathlib.Path) -> list[str]:
    """Names in the dynamic symbol table, its own and those it wants of others."""
    lines = output_of("readelf", "-W", "--dyn-syms", path).splitlines()
    return [line.split()[7].split("@")[0] for line in lines if len(line.split()) >= 8]
