"""The report of what nvcc makes of the CUDA kernels finds what it is for. What ships is read in test_wheel.py."""

import json
import os
import subprocess

import cuda_code
import pytest
from cuda_code import CSRC, Code, Kernel, code_of

if cuda_code.find_nvcc() is None:
    if os.environ.get("SDFAST_REQUIRE_NATIVE") == "1":
        pytest.fail("no nvcc", pytrace=False)
    pytest.skip("no nvcc", allow_module_level=True)

PLANTED = """
__global__ void clean(float* x) {
  __shared__ float sums[64];
  sums[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = sums[63 - threadIdx.x];
}
__global__ void local_array(float* x, const int* at) {
  float values[256];
  for (int i = 0; i < 256; ++i) values[i] = x[i * 32 + threadIdx.x];
  for (int i = 0; i < 256; ++i) values[at[i]] += values[at[i + 1]];
  x[threadIdx.x] = values[at[threadIdx.x]];
}
__global__ void __launch_bounds__(1024) spilling(float* x, int n) {
  float v[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int k = 0; k < n; ++k) {
#pragma unroll
    for (int i = 0; i < 128; ++i) v[i] = v[i] * v[(i + 7) % 128] + v[(i + 31) % 128];
  }
#pragma unroll
  for (int i = 0; i < 128; ++i) x[i * 1024 + threadIdx.x] = v[i];
}
"""
MULTIPLYING = """
#include <mma.h>
using namespace nvcuda::wmma;
__global__ void multiply(const half* a, const half* b, float* c) {
  fragment<matrix_a, 16, 16, 16, half, row_major> left;
  fragment<matrix_b, 16, 16, 16, half, col_major> right;
  fragment<accumulator, 16, 16, 16, float> sum;
  fill_fragment(sum, 0.0f);
  load_matrix_sync(left, a, 16);
  load_matrix_sync(right, b, 16);
  mma_sync(sum, left, right, sum);
  store_matrix_sync(c, sum, 16, mem_row_major);
}
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Writes a source of this name; what is compiled stays out of the repository's build."""
    monkeypatch.setattr(cuda_code, "BUILD", tmp_path / "build")

    def write(name, text):
        path = tmp_path / f"{name}_cuda.cu"
        path.write_text(text)
        return path

    return write


def test_spills_and_local_arrays_are_found(planted):
    """By both readers, the compiler's report and the finished code; what is clean is not."""
    source = planted("planted", PLANTED)
    code = code_of(source, "86")
    kernels = {kernel.name: kernel for kernel in code.kernels}
    assert set(kernels) == {"clean", "local_array", "spilling"}
    assert kernels["clean"].stack_bytes == 0 and kernels["clean"].shared_bytes == 256
    assert kernels["local_array"].stack_bytes >= 1024 and kernels["spilling"].stack_bytes > 0
    assert kernels["spilling"].registers == 64
    assert sorted(fault.split(":")[0] for fault in code.faults) == ["local_array", "spilling"]
    built = source.with_suffix(".o")
    targets = [f"-gencode=arch=compute_80,code=sm_{each}" for each in ("80", "86")]
    subprocess.run([cuda_code.find_nvcc(), "-O3", *targets, "-c", source, "-o", built], check=True)
    finished = cuda_code.code_in(built, source)["86"]
    assert sorted(finished.kernels) == sorted(code.kernels)
    assert sorted(fault.split(":")[0] for fault in finished.faults) == ["local_array", "spilling"]


@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_matrix_kernels_need_their_instruction(planted, name):
    code = code_of(planted(name, MULTIPLYING), "80")
    assert not code.faults and [kernel.matrix for kernel in code.kernels] == [True]
    (fault,) = code_of(planted(name, PLANTED.split("__global__ void local_array")[0]), "80").faults
    assert "no instruction" in fault
    assert cuda_code._instruction(CSRC / "add_noise_cuda.cu") is None


def test_compiled_once(planted, monkeypatch):
    """Until the source, or a header of ours that it includes, is another one."""
    source = planted("planted", '#include "planted.cuh"\n')
    header = source.with_name("planted.cuh")
    header.write_text("__global__ void kernel(float* x) { *x = 1; }\n")
    first = code_of(source, "90a")
    assert [kernel.name for kernel in first.kernels] == ["kernel"]
    digest = cuda_code._digest(source, cuda_code.find_nvcc())

    def no_more(*_, **__):
        raise AssertionError("compiled again")

    with monkeypatch.context() as patch:
        patch.setattr(cuda_code.subprocess, "run", no_more)
        assert code_of(source, "90a") == first
    header.write_text("__global__ void kernel(float* x) { *x = 2; }\n")
    assert cuda_code._digest(source, cuda_code.find_nvcc()) != digest


def test_what_does_not_compile_is_a_fault(planted):
    (fault,) = code_of(planted("planted", "__global__ void kernel(float* x) { *y = 1; }\n"), "80").faults
    assert 'identifier "y" is undefined' in fault


def test_the_record(tmp_path):
    """A row a kernel, in the order of the architectures."""
    files = [CSRC / "b_cuda.cu", CSRC / "a_cuda.cu"]
    found = [
        (files[0], "80", Code([Kernel("two", 40, 0, 512), Kernel("one", 30, 0, 0)], [])),
        (files[0], "90a", Code([Kernel("one", 31, 0, 16, True)], [])),
        (files[1], "80", Code([Kernel("zero", 20, 8, 0)], [])),
    ]
    rows = cuda_code.table(found, ["80", "90a"])
    cuda_code.write_record(tmp_path / "code.json", rows, ["80", "90a"])
    record = json.loads((tmp_path / "code.json").read_text())
    assert record["architectures"] == ["80", "90a"] and record["environment"]["nvcc"]
    assert [tuple(row.values()) for row in record["rows"]] == [
        ("a", "zero", [20, None], [0, None], 8, False),
        ("b", "one", [30, 31], [0, 16], 0, True),
        ("b", "two", [40, None], [512, None], 0, False),
    ]


@pytest.mark.parametrize(
    "name, short",
    [
        ("void sdfast::add_noise_kernel<float, 4>(sdfast::AddNoise<float>)", "add_noise_kernel<float, 4>"),
        ("sdfast::(anonymous namespace)::rows<(int)4, (bool)1>(float*, int)", "rows<4, 1>"),
        ("void k<float>(float const*): 8 bytes of stack", "k<float>: 8 bytes of stack"),
    ],
)
def test_short_names(name, short):
    assert cuda_code.short(name) == short
