"""conv2d on CPU against fp64: kernels, strides, paddings, the upsample, both algorithms, instruction sets."""

from __future__ import annotations

import conv2d_checks as checks
import pytest
import torch
from conv2d_checks import make, references
from processes import run_with_library
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sdfast import _library, dispatch, ops, packing
from sdfast.ops import _tiles
from sdfast.ops._conv2d_choice import algorithm_for, shape_of
from sdfast.ops.conv2d import NormPrologue
from sdfast.testing import assert_within_budget, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, C_in, H, W, C_out, kernel, stride, padding)
FEW = (  # channels of y
    (2, 37, 9, 20, 3, 3, 1, 1),
    (1, 64, 5, 31, 8, 3, 2, 1),
    (1, 48, 5, 14, 5, 5, 1, (2, 0, 0, 2)),
    (3, 32, 1, 2, 8, 3, 1, 1),
    (2, 320, 3, 8, 4, 3, 1, 1),  # chains of additions that end with a row of the kernel
    (1, 1401, 4, 9, 2, 3, 1, 1),  # and within it
    (1, 70, 3, 9, 6, 1, 1, 0),
)
CASES = (
    (1, 3, 7, 9, 5, 3, 1, 1),
    (2, 4, 1, 1, 40, 3, 1, 1),
    (2, 33, 16, 15, 34, 3, 1, 1),
    (1, 64, 8, 8, 64, 1, 1, 0),
    (2, 17, 9, 8, 3, 3, 2, 1),
    (1, 8, 8, 8, 16, 3, 2, (0, 1, 0, 1)),
    (1, 1400, 4, 4, 33, 3, 1, 1),
    (1, 5, 6, 6, 7, 5, 1, 2),
    (3, 40, 5, 13, 48, 3, 1, 1),
    (1, 32, 6, 6, 32, 3, 1, 0),
    (1, 2561, 3, 3, 33, 1, 1, 0),  # channels in several parts, odd
    (1, 2560, 3, 3, 33, 1, 1, 0),
    (1, 2048, 5, 8, 20, 1, 1, 0),  # rows of the weight are a way of the L1 cache apart
    (3, 33, 12, 11, 37, 1, 1, 0),  # many pixels of one tap, with remainders
    *FEW,
)
ROUNDS = (2, 1400, 28, 28, 33, 3, 1, 1)  # more tiles than one round of Winograd holds
# Relative, of a layer.
WINOGRAD_ERROR = {"winograd4x4": 2e-5, "winograd2x2": 2e-6, "winograd4x4_unpacked": 2e-5}
ALGORITHMS = ("direct", *WINOGRAD_ERROR)  # test_tiles.py has the split one
needs_kernel = pytest.mark.skipif(
    not _library.has_kernel("conv2d_kernel", "cpu"), reason=_library.load_cpu_library().detail
)
pytestmark = needs_kernel


def convolve(algorithm: str, args: tuple, keywords: dict[str, object]) -> Tensor:
    """By this algorithm, whichever a model would get at this size."""
    x, weight, bias, stride, padding = args
    more = (keywords.get("time_embedding"), keywords.get("residual"), algorithm)
    upsample = keywords.get("upsample", False)
    return torch.ops.sdfast.conv2d_forward(x, weight, bias, stride, list(padding), upsample, *more)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_direct(dtype: torch.dtype, upsample: bool) -> None:
    for case in CASES:
        args, keywords = make(case, dtype, upsample)
        eager, exact = references(args, keywords)
        with dispatch.use_numerics("exact"):
            actual = ops.conv2d(*args, **keywords, backend="cpu")
            bare = ops.conv2d(*args[:2], None, *args[3:], upsample=upsample, backend="cpu")
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert_within_budget(actual, eager, exact, what=str(case))
        plain = references((*args[:2], None, *args[3:]), {"upsample": upsample})
        assert_within_budget(bare, *plain, what=f"{case} alone")


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_winograd(dtype: torch.dtype, upsample: bool) -> None:
    for algorithm, error in WINOGRAD_ERROR.items():
        tried = 0
        for case in CASES:
            if case[5:7] != (3, 1):
                continue
            args, keywords = make(case, dtype, upsample)
            eager, exact = references(args, keywords)
            actual = convolve(algorithm, args, keywords)
            allowed = error if dtype == torch.float32 else 1.5 * relative_error(eager, exact)
            assert relative_error(actual, exact) <= allowed, (algorithm, case)
            tried += 1
        assert tried == 10
        if dtype == torch.float32:
            args, keywords = make(ROUNDS, dtype)
            exact = references(args, keywords)[1]
            assert relative_error(convolve(algorithm, args, keywords), exact) <= error


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("algorithm", WINOGRAD_ERROR)
def test_a_result_larger_than_the_caches(algorithm: str, dtype: torch.dtype) -> None:
    """It is stored past them, and read by other threads than those that wrote it."""
    size = (727, 733) if dtype == torch.float32 else (1021, 1031)
    x, weight = torch.randn(1, 32, *size).to(dtype), (torch.randn(32, 32, 3, 3) / 17).to(dtype)
    residual = torch.randn_like(x)
    assert residual.nbytes >= 1 << 26
    y = convolve(algorithm, (x, weight, None, 1, (1, 1, 1, 1)), {"residual": residual})
    exact = torch.conv2d(x.float(), weight.float(), padding=1) + residual.float()
    assert relative_error(y, exact) <= WINOGRAD_ERROR[algorithm] + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_layouts_and_strides(dtype: torch.dtype) -> None:
    checks.layouts_and_strides(checks.by("cpu"), (2, 33, 9, 8, 34, 3, 1, 1), dtype, "cpu")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_left_unwritten(dtype: torch.dtype, algorithm: str, poisoned_memory: None) -> None:
    for case in (CASES[0], CASES[2], CASES[8], FEW[0]):
        for upsample in (False, True):
            assert convolve(algorithm, *make(case, dtype, upsample)).isfinite().all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bits_do_not_depend_on_threads(algorithm: str) -> None:
    """Nor on whether threads take rounds of Winograd of their own, as few do of the last three."""
    upsamples = algorithm != "winograd4x4_unpacked"
    for case, upsample in (
        ((2, 40, 20, 21, 72, 3, 1, 1), False),
        ((1, 64, 7, 7, 40, 3, 1, 1), False),
        ((2, 64, 70, 31, 4, 3, 1, 1), False),
        ((1, 64, 100, 102, 40, 3, 1, 1), False),
        ((1, 64, 100, 102, 40, 3, 1, 1), upsamples),
        ((1, 64, 150, 152, 40, 3, 1, 1), upsamples),
    ):
        args, keywords = make(case, torch.float32, upsample)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(convolve(algorithm, args, keywords))
        torch.set_num_threads(1)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_nan_reaches_only_its_neighbours(algorithm: str) -> None:
    args, _ = make((1, 32, 16, 16, 32, 3, 1, 1), torch.float32)
    args[0][0, 5, 8, 9] = float("nan")
    y = convolve(algorithm, args, {})
    assert y[0, :, 7:10, 8:11].isnan().all()
    reach = (slice(7, 10), slice(8, 11)) if algorithm == "direct" else (slice(4, 12), slice(8, 12))
    y[(0, slice(None), *reach)] = 0  # Winograd's tiles are four wide, and each sees a neighbour's edge
    assert y.isfinite().all()


def test_algorithm_of_a_size() -> None:
    weight = torch.empty(320, 320, 3, 3)

    def algorithm(size: int, stride: int = 1, upsample: bool = False) -> str:
        shape = shape_of(torch.empty(2, 320, size, size), weight, stride, [1] * 4, upsample, 0)
        return algorithm_for(shape, weight)[0]

    upsampled = "split" if _tiles.are_there() else None
    assert algorithm(64) == "winograd4x4" and algorithm(16, upsample=True) == (upsampled or "winograd4x4")
    assert algorithm(16) == "winograd4x4_unpacked"
    assert algorithm(8, upsample=True) == (upsampled or "winograd4x4_unpacked")
    direct = "split" if _tiles.are_there() else "direct"
    assert algorithm(64, stride=2) == direct
    assert algorithm(4) == direct
    assert algorithm(2, upsample=True) == direct
    for size in ((64, 320, 2, 2), (1, 320, 256, 1)):  # much of the tiles would lie beside the images
        assert algorithm_for(shape_of(torch.empty(size), weight, 1, [1] * 4, False, 0), weight)[0] == direct
    with dispatch.use_numerics("exact"):
        assert algorithm(64) == algorithm(64, upsample=True) == "direct"
    with dispatch.use_memory("low"):
        assert algorithm(64) == "winograd4x4_unpacked"
        assert algorithm(64, upsample=True) == (upsampled or "winograd4x4_unpacked")


def test_norm_prologue_and_statistics() -> None:
    args, keywords = make((2, 32, 8, 8, 64, 3, 1, 1), torch.float32)
    norm = NormPrologue(4, torch.randn(32), torch.randn(32))
    y, mean, rstd = ops.conv2d(*args, **keywords, norm=norm, stats_groups=8, backend="cpu")
    expected = ops.conv2d(*args, **keywords, norm=norm, stats_groups=8, backend="reference")
    for actual, reference in zip((y, mean, rstd), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)


def test_compiles_whole() -> None:
    args, keywords = make((1, 32, 9, 8, 40, 3, 1, 1), torch.float32)

    def run(x: Tensor) -> Tensor:
        return ops.conv2d(x, *args[1:], **keywords) * 2

    packing.clear()
    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(args[0]), run(args[0]))
    assert packing.packed_bytes() > 0  # it was the kernel
    x, skip = args[0].split(16, 1)
    groups, weight = 4, torch.rand(32)
    for statistics in (
        None,
        [torch.zeros(1, groups), torch.ones(1, groups)],
    ):  # of a promise that nobody reads
        norm = ops.NormPrologue(groups, weight, weight, statistics=statistics)

        def fused(x: Tensor, skip: Tensor, norm: ops.NormPrologue = norm) -> Tensor:
            return ops.conv2d(x, *args[1:], norm=norm, skip=skip)

        with torch.no_grad():
            compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x, skip), fused(x, skip))
            whole = ops.conv2d(args[0], *args[1:], norm=norm)
            assert torch.equal(whole, fused(x, skip))


def test_a_size_of_a_model_gets_winograd() -> None:
    args, keywords = make((1, 32, 46, 46, 32, 3, 1, 1), torch.float32)
    y = ops.conv2d(*args, **keywords)
    assert torch.equal(y, convolve("winograd4x4", args, keywords))
    assert relative_error(y, references(args, keywords)[1]) <= WINOGRAD_ERROR["winograd4x4"]


def test_few_channels_of_y_are_not_left_to_torch() -> None:
    for dtype in DTYPES:
        args, keywords = make((1, 64, 16, 16, 4, 3, 1, 1), dtype)
        assert torch.equal(ops.conv2d(*args, **keywords), convolve("direct", args, keywords))


def test_an_empty_kernel_is_left_to_torch() -> None:
    with pytest.raises(ValueError, match="not empty"):
        ops.conv2d(torch.randn(1, 32, 8, 8), torch.empty(32, 32, 0, 3), backend="cpu")
    for weight in (torch.empty(1, 4, 3, 3, 0), torch.empty(1, 0, 3, 3, 4)):
        with pytest.raises(RuntimeError, match="at least one element"):
            torch.ops.sdfast.conv2d_pack(weight, 1)


def test_autocast_and_fake_tensors() -> None:
    args, _ = make((1, 32, 9, 8, 40, 3, 1, 1), torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ops.conv2d(*args).dtype == torch.bfloat16
        assert ops.linear(torch.randn(3, 8), torch.randn(6, 8)).dtype == torch.bfloat16
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in args[:3]]
        assert ops.conv2d(*fakes, *args[3:]).shape == (1, 40, 9, 8)


def test_opcheck() -> None:
    (x, weight, bias, stride, padding), keywords = make((1, 32, 9, 8, 40, 3, 1, 1), torch.float32)
    more = (keywords["time_embedding"], keywords["residual"])
    for algorithm in ("direct", "winograd4x4"):
        torch.library.opcheck(
            torch.ops.sdfast.conv2d_forward,
            (x, weight, bias, stride, list(padding), False, *more, algorithm),
        )


def test_numerics_names_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="numerics: got 'quick', expected one of exact, fast"):
        dispatch.use_numerics("quick")
    with dispatch.use_numerics("exact"):
        assert dispatch.numerics() == "exact"
    assert dispatch.numerics() == "fast"


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa: str) -> None:
    run_with_library(isa, """
        import test_conv2d as t
        for dtype in t.DTYPES:
            for upsample in (False, True):
                t.test_direct(dtype, upsample)
                t.test_winograd(dtype, upsample)
    """)  # fmt: skip
