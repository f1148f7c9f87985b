"""The emulation of CUDA on a CPU (tests/simt): it runs right kernels right, and finds every fault planted in them."""

from __future__ import annotations

import importlib.util
import os
import types

import emulated_cuda
import numpy as np
import pytest

SEEDS = (0, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def planted() -> types.ModuleType:
    if (reason := emulated_cuda.why_not()) is not None:
        (pytest.fail if os.environ.get("SDFAST_REQUIRE_NATIVE") == "1" else pytest.skip)(reason)
    spec = importlib.util.spec_from_file_location("simt_planted", emulated_cuda.build("simt_planted"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_barriers_and_shared_memory(seed, planted):
    planted.seed(seed)
    x, y = floats(192), np.empty(192, np.float32)
    planted.reverse(x, y, 0)
    assert np.array_equal(y, x.reshape(3, 64)[:, ::-1].ravel())


# In the order of `Fault` in kernels.cuh, after kNone; every order of threads has to show it.
FAULTS = (
    "race: another thread stored what this one loads|nobody wrote",
    "race: another thread (loads what this one stores|stored what this one loads)",
    "divergent barrier",
    r"divergent barrier: thread .* 1 threads have ended",
    "load outside of every tensor",
    "store outside of every tensor",
    "load outside a shared array",
    "store to a tensor that is only read",
    "load of shared memory that nobody wrote",
    "misaligned access",
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", range(1, len(FAULTS) + 1))
def test_finds_a_planted_fault(fault, seed, planted):
    planted.seed(seed)
    # In one array, so that what lies beside is there to be read and written.
    box = floats(2, 256)
    with pytest.raises(RuntimeError, match=FAULTS[fault - 1]) as raised:
        planted.reverse(box[0, :64], box[1, :64], fault)
    assert "kernels.cuh:" in str(raised.value) or "cuda_common.cuh:" in str(raised.value)


def test_goes_on_after_a_fault(planted):
    x, y = floats(64), np.empty(64, np.float32)
    with pytest.raises(RuntimeError):
        planted.reverse(x, y, 1)
    planted.reverse(x, y, 0)
    assert np.array_equal(y, x[::-1])


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles(seed, planted):
    planted.seed(seed)
    x, y = floats(32), np.empty((5, 32), np.float32)
    planted.shuffle(x, y)
    lane = np.arange(32)
    assert np.array_equal(y[0], x[lane ^ 5])
    assert np.array_equal(y[1], x[np.where(lane + 3 < 32, lane + 3, lane)])
    assert np.array_equal(y[2], x[np.where(lane >= 2, lane - 2, lane)])
    assert np.array_equal(y[3], np.full(32, x[7]))
    assert len(set(y[4])) == 1 and y[4, 0] == pytest.approx(x.sum(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["half", "bfloat16", "tf32"])
def test_mma(kind, seed, planted):
    planted.seed(seed)
    depth = 8 if kind == "tf32" else 16
    a, b, c, d = floats(16, depth), floats(depth, 8), floats(16, 8), np.empty((16, 8), np.float32)
    if kind == "half":
        a, b = a.astype(np.float16), b.astype(np.float16)
        given = a.view(np.uint16), b.view(np.uint16)
    else:  # bf16 is the upper half of an fp32; tf32 looks at its upper 19 bits
        kept = np.uint32(0xFFFF0000 if kind == "bfloat16" else 0xFFFFE000)
        given = a, b
        a, b = ((t.view(np.uint32) & kept).view(np.float32) for t in (a, b))
        if kind == "bfloat16":
            given = tuple((t.view(np.uint32) >> 16).astype(np.uint16) for t in (a, b))
    getattr(planted, f"multiply_{kind}")(*given, c, d)
    assert np.allclose(d, a.astype(np.float64) @ b.astype(np.float64) + c, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed, seed, planted):
    """Lane i holds row i // 4, columns 2 (i % 4) and the next, of each matrix, or of its transpose."""
    planted.seed(seed)
    x, y = np.arange(256, dtype=np.uint16).reshape(16, 16), np.empty((32, 4), np.uint32)
    planted.matrices(x, y, transposed)
    for matrix in range(4):
        tile = x[matrix % 2 * 8 :, matrix // 2 * 8 :][:8, :8]
        tile = tile.T if transposed else tile
        expected = tile[:, ::2].astype(np.uint32) | tile[:, 1::2].astype(np.uint32) << 16
        assert np.array_equal(y[:, matrix].reshape(8, 4), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_asynchronous_copies(seed, planted):
    planted.seed(seed)
    x, y = floats(2, 256), np.empty((2, 256), np.float32)
    planted.copy(x, y, 0)
    x[:, -2:] = 0
    assert np.array_equal(y, x)
    for fault in (1, 2, 3):
        if fault == 1 and seed > 1:
            continue  # some copies arrive at once, as they may on a GPU
        with pytest.raises(RuntimeError, match="nobody wrote|race|before its asynchronous copies arrived"):
            planted.copy(x, y, fault)


def test_too_little_shared_memory(planted):
    x, y = floats(256), np.empty(256, np.float32)
    with pytest.raises(RuntimeError, match="less dynamic shared memory"):
        planted.copy_with(x, y, 1000)
    with pytest.raises(RuntimeError, match="too much shared memory"):
        planted.copy_with(x, y, 1 << 20)


@pytest.mark.parametrize("seed", SEEDS)
def test_clusters(seed, planted):
    planted.seed(seed)
    x, y = floats(12), np.empty(12, np.float32)
    planted.cluster_sum(x, y, 4, 0)
    assert np.allclose(y, x.reshape(3, 4).sum(1).repeat(4), rtol=1e-6)
    for fault, found in ((1, "before a cluster barrier"), (2, "race|has ended"), (3, "block that has ended")):
        if fault == 3 and seed > 1:
            continue  # whether a block has ended by then is chance
        with pytest.raises(RuntimeError, match=found):
            planted.cluster_sum(x, y, 4, fault)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_wait_for_none(seed, planted):
    planted.seed(seed)
    x, partial, y = floats(7), np.empty(7, np.float32), np.empty(1, np.float32)
    planted.grid_sum(x, partial, np.zeros(1, np.uint32), y, 0)
    assert y[0] == pytest.approx(x.sum(dtype=np.float64), rel=1e-6)
    for fault in (1, 2):
        with pytest.raises(RuntimeError, match="race: another block"):
            planted.grid_sum(x, partial, np.zeros(1, np.uint32), y, fault)


# In the order of `TileFault` in kernels.cuh, after kNone.
TILE_FAULTS = (
    "load of shared memory that nobody wrote",
    "race: a copy onto a tile that products read|wait for a barrier",
    "race: a copy onto a tile that products read",
    "load of shared memory that nobody wrote",
    "more arrivals at a barrier than were announced|race: a copy onto a tile|wait for a barrier",
    "wait for a barrier",
)


def tiles() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bf16 factors, 256 long, as bits, and their product."""
    x, w = (floats(rows, 256).view(np.uint32) >> 16 << 16 for rows in (64, 80))
    expected = x.view(np.float32).astype(np.float64) @ w.view(np.float32).T
    return (x >> 16).astype(np.uint16), (w >> 16).astype(np.uint16), expected


@pytest.mark.parametrize("seed", SEEDS)
def test_tiles_on_hoppers_units(seed, planted):
    planted.seed(seed)
    x, w, expected = tiles()
    y = np.empty((64, 80), np.float32)
    planted.tile_products(x, w, y, 0)
    assert np.allclose(y, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", range(1, len(TILE_FAULTS) + 1))
def test_finds_faults_planted_around_tiles(fault, seed, planted):
    if fault == 1 and seed > 1:
        return  # some copies arrive at once, as they may on a GPU
    planted.seed(seed)
    x, w, _ = tiles()
    with pytest.raises(RuntimeError, match=TILE_FAULTS[fault - 1]):
        planted.tile_products(x, w, np.empty((64, 80), np.float32), fault)
