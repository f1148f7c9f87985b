"""AMX: the library that uses it is there, and what it computes, on tiles emulated in plain C++ (emulated_amx.h)."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from processes import run_python

from sdfast import _library

ROOT = pathlib.Path(__file__).parents[1]
NAME = "_C_cpu_avx512_amx"
PRODUCT = "tdpbf16ps"
has_bf16 = _library.cpu_isa() in ("avx512_amx", "avx512_bf16")


def test_only_its_library_uses_amx() -> None:
    objdump = shutil.which("objdump")
    libraries = {isa: _library._PACKAGE_DIR / f"_C_cpu_{isa}.so" for isa in ("avx512_amx", "avx512_bf16")}
    missing = [path.name for path in libraries.values() if not path.exists()]
    if objdump is None or missing:
        pytest.skip(f"no {', '.join(missing) or 'objdump'}")
    for isa, path in libraries.items():
        disassembly = subprocess.run([objdump, "-d", path], check=True, capture_output=True, text=True).stdout
        assert "vdpbf16ps" in disassembly
        for instruction in (PRODUCT, "ldtilecfg", "tilerelease"):
            assert (instruction in disassembly) == (isa == "avx512_amx"), (isa, instruction)


def choose(supported: bool, granted: bool) -> str:
    return run_python(f"""
        import torch
        torch.backends.cpu.get_cpu_capability = lambda: "AVX512"
        torch.cpu._is_avx512_bf16_supported = lambda: True
        torch.cpu._is_amx_tile_supported = lambda: {supported}
        torch.cpu._init_amx = lambda: {granted}
        from sdfast import _library
        print(_library.cpu_isa())
    """).strip()


def test_taken_where_linux_grants_it() -> None:
    assert choose(True, True) == "avx512_amx"
    assert choose(True, False) == choose(False, True) == "avx512_bf16"


@pytest.fixture(scope="module")
def emulated() -> pathlib.Path:
    """A folder with the library, its AMX emulated. Kept under build/ for the next run."""
    cmake, ninja = (shutil.which(tool, path=_tool_folders()) for tool in ("cmake", "ninja"))
    if not has_bf16 or cmake is None or ninja is None or shutil.which("c++") is None:
        pytest.skip("needs a CPU with AVX512-BF16, cmake, ninja and a compiler")
    sanitize = os.environ.get("SDFAST_SANITIZE", "OFF")  # "ON" from sanitize.py
    build = ROOT / "build" / f"emulated-amx-sanitize-{sanitize}".lower()
    # The sanitizer that watches this process does not suit the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    for command in (
        [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
         f"-DSDFAST_TORCH_DIR={torch.__path__[0]}", f"-DSDFAST_OUTPUT_DIR={build}",
         "-DSDFAST_EMULATE_AMX=ON", f"-DSDFAST_SANITIZE={sanitize}"],
        [cmake, "--build", build, "--target", NAME],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build


def _tool_folders() -> str:
    return os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


# Each runs the operation's own tests against fp64, as they are.
OPERATIONS = {
    "linear": """
        import test_linear as t
        for activation in t.ACTIVATIONS:
            t.test_shapes(activation, bf16)
        t.test_strides(bf16)
        t.test_non_finite_values_stay_in_their_row(float("nan"), bf16)
        t.test_bits_do_not_depend_on_threads(bf16)
    """,
    "conv2d": """
        import test_conv2d as t
        for upsample in (False, True):
            t.test_direct(bf16, upsample)
        t.test_layouts_and_strides(bf16)
    """,
    "attention": """
        import test_attention as t
        for head_dim in t.HEAD_DIMS:
            t.test_against_fp64("cpu", bf16, head_dim)
        t.test_layouts(bf16, "odd")
        t.test_causal(bf16)
        t.test_large_logits(bf16)
        for largest in (40.0, 300.0):
            t.test_later_keys_outgrow_the_first(largest, bf16)
        t.test_threads_do_not_change_a_bit(bf16)
        for value in (float("nan"), float("inf"), -float("inf")):
            t.test_non_finite_values(value, bf16)
        import test_attention_backward as t
        for head_dim in (40, 80):
            t.test_gradients_against_fp64("cpu", bf16, head_dim)
        t.test_causal_gradients(bf16)
    """,
    "tiles": """
        import test_tiles as t
        for case in t.LINEAR[:-1]:  # the last one is long
            t.test_linear(case, "geglu", bf16)
            t.test_linear(case, None, bf16)
        for case in t.CONV2D:
            t.test_conv2d(case, bf16)
        for case in t.LINEAR_GRADIENTS:
            t.test_linear_gradients(case, bf16)
        for case in t.CONV2D_GRADIENTS:
            t.test_conv2d_gradients(case)
        t.test_few_tokens_keep_no_copy()
        t.test_weights_made_for_a_call_keep_no_copy()
        for change in t.CHANGES:
            t.test_the_copy_follows_the_weight(change)
        t.test_what_does_not_fit_is_refused()
    """,
    "split": """
        import test_tiles as t
        for case in t.LINEAR[:-1]:
            t.test_linear(case, "geglu", torch.float32)
        for case in t.CONV2D:
            t.test_conv2d(case, torch.float32)
        for case in t.LINEAR_GRADIENTS:
            t.test_linear_gradients(case, torch.float32)
        for head_dim in (1, 40, 160):
            t.test_split_attention(head_dim)
        t.test_split_attention_of_growing_scores()
        for value in (float("nan"), float("inf")):
            t.test_what_is_not_finite_stays_where_it_is_split(value)
        t.test_exact_numerics_do_not_split()
    """,
    "gradients": """
        import test_linear_backward as t
        for activation in (None, "geglu"):
            t.test_shapes(activation, bf16)
        t.test_strides(bf16)
        import test_conv2d_backward as t
        for upsample in (False, True):
            t.test_direct(bf16, upsample)
    """,
    "guarded": """
        import test_guarded as t
        for name in ("linear", "linear_gradients", "conv2d", "conv2d_1x1", "conv2d_gradients", "attention"):
            t.test_reads_and_writes_nothing_beside(name, bf16)
    """,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_emulated(operation: str, emulated: pathlib.Path) -> None:
    run_python(f"""
        import ctypes, pathlib, torch
        torch.cpu._is_amx_tile_supported = torch.cpu._init_amx = lambda: True
        from sdfast import _library
        _library._PACKAGE_DIR = pathlib.Path({str(emulated)!r})
        from sdfast import ops
        assert _library.load_cpu_library().name == {NAME!r}, _library.status()
        products = ctypes.CDLL(str(_library._PACKAGE_DIR / "{NAME}.so")).emulated_amx_products
        products.restype = ctypes.c_int64
        torch.set_num_threads(1)
        torch.manual_seed(0)
        bf16 = torch.bfloat16
        {OPERATIONS[operation].strip()}
        assert products() > 1000, products()
    """)
