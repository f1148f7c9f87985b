"""Fixtures shared by the tests."""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined

pytest.register_assert_rewrite("conv2d_checks", "group_norm_checks", "layer_norm_checks")

import emulated_cuda  # noqa: E402
from triton_guards import guarded  # noqa: E402

from sdfast import _library, dispatch, packing, tuning  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, and named as such, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the user measured on this machine is neither used nor touched; processes inherit this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDFAST_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def within_tensors() -> Iterator[None]:
    """Where kernels are interpreted, those that touch memory beside their tensors fail."""
    if os.environ.get("TRITON_INTERPRET") != "1" or "triton" not in sys.modules:
        yield
        return
    with guarded():
        yield


torch.set_num_threads(1)  # of models this small threads would only wait for each other


@pytest.fixture
def exact_numerics() -> Iterator[None]:
    """fp32 is multiplied as such, on CPUs with AMX too."""
    with dispatch.use_numerics("exact"):
        yield


@pytest.fixture(autouse=True)
def seed_and_threads() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """Tensors are NaN until they are written, on any device: torch fills them where it has to repeat itself."""
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(300, device="cuda" if torch.cuda.is_available() else "cpu").isnan().all()
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def unwritten_by_kernels(request: pytest.FixtureRequest) -> None:
    """Triton's tests do not take what is left of another tensor for a result."""
    if request.module.__name__.endswith("_triton"):
        request.getfixturevalue("unwritten_is_nan")


@pytest.fixture(autouse=True)
def exact_convolutions(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU fp32 is multiplied as such by Triton's kernels and eager, whatever the shape; not as tf32."""
    if not (torch.cuda.is_available() and request.module.__name__.endswith("_triton")):
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every byte that malloc hands out is 0xff, so that what nobody wrote reads as NaN."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        pytest.skip("this C library cannot fill what it allocates")
    perturb, all_ones = -6, 0x100  # glibc's M_PERTURB: memory gets the low byte of the value's complement
    libc.mallopt(perturb, all_ones)
    try:
        assert torch.empty(300).isnan().all()
        yield
    finally:
        libc.mallopt(perturb, 0)


@pytest.fixture
def tuning_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """Where this test's measured times go; none are there yet."""
    monkeypatch.setenv("SDFAST_CACHE_DIR", str(tmp_path / "cache"))
    tuning.reload()
    packing.clear()
    yield tmp_path / "cache" / "tuning.json"
    tuning.reload()
    packing.clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuning.Shape]:
    """The shapes of conv2d that are measured, in order; each takes no time and gives the same result."""
    shapes: list[tuning.Shape] = []

    def measure(shape: tuning.Shape, seconds: float) -> tuning.Times:
        shapes.append(shape)
        return {"torch": 3.0, "direct": 2.0}

    monkeypatch.setitem(tuning._measures, "conv2d", measure)
    return shapes


@pytest.fixture(scope="module")
def cuda_kernels() -> Iterator[str]:
    """Where the CUDA kernels run: "cuda", or without a GPU "cpu", executed by the emulation."""
    if torch.cuda.is_available():
        torch.cuda.init()  # the library is checked against the GPU then
        if (status := _library.load_cuda_library()).loaded:
            yield "cuda"
            return
        pytest.skip(status.detail)
    if (reason := emulated_cuda.why_not()) is not None:
        (pytest.fail if os.environ.get("SDFAST_REQUIRE_NATIVE") == "1" else pytest.skip)(reason)
    with emulated_cuda.kernels():
        yield "cpu"
