"""conv2d's Triton kernels against fp64: strides, paddings, two sources, statistics, prologue, splits of K."""

from __future__ import annotations

import conv2d_checks as checks
import pytest
import torch
import torch.nn.functional as F
from conv2d_checks import LAYOUT, references
from torch import Tensor

from sdfast import dispatch, ops
from sdfast.ops import _triton
from sdfast.ops.conv2d import NormPrologue, conv2d_torch, group_statistics, reads_skip
from sdfast.ops.conv2d_triton import convolve, gradient_geometries
from sdfast.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bf16 wrongly in tl.dot.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
# (N, C_in, H, W, C_out, kernel, stride, padding)
CASES = (
    (1, 3, 7, 9, 5, 3, 1, 1),
    (2, 4, 1, 1, 40, 3, 1, 1),
    (2, 33, 6, 7, 34, 3, 1, 1),
    (3, 1, 5, 4, 1, 1, 1, 0),
    (2, 17, 9, 8, 3, 3, 2, 1),
    (1, 8, 8, 8, 16, 3, 2, (0, 1, 0, 1)),
    (1, 5, 6, 6, 7, 5, 1, 2),
    (2, 32, 6, 7, 24, 3, 1, 0),
    (1, 16, 6, 5, 4, 2, 3, 1),
    (2, 32, 5, 6, 72, 3, 1, (2, 0, 1, 3)),
)
SPLIT = (2, 128, 3, 5, 24, 3, 1, 1)  # one tile an image, at least 18 steps
pytestmark = [
    pytest.mark.skipif(_triton.why_not("x", DEVICE) is not None, reason=str(_triton.why_not("x", DEVICE))),
]


triton = checks.by("triton")


def on_device(case: tuple, dtype: torch.dtype, upsample: bool = False) -> tuple[tuple, dict[str, object]]:
    return checks.make(case, dtype, upsample, DEVICE)


def check(args: tuple, keywords: dict[str, object], what: str) -> None:
    checks.within_budget(triton, triton, references, args, keywords, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype: torch.dtype) -> None:
    for case in (*CASES, SPLIT):
        args, keywords = on_device(case, dtype)
        check(args, keywords, str(case))
        check((*args[:2], None, *args[3:]), {}, f"{case} alone")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upsample(dtype: torch.dtype) -> None:
    """Folded, and where the kernel is none that can be."""
    for case in (CASES[0], CASES[1], CASES[4], (1, 64, 3, 5, 24, 3, 1, 1)):
        check(*on_device(case, dtype, upsample=True), str(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_sources(dtype: torch.dtype) -> None:
    """With each kind of kernel."""
    cases = (
        *((case, first, upsample) for case, first in ((CASES[0], 1), (CASES[5], 7)) for upsample in (False, True)),
        (CASES[9], 16, False), (SPLIT, 64, False), ((2, 48, 5, 4, 20, 1, 1, 0), 32, False),
    )  # fmt: skip
    checks.two_sources(triton, references, cases, dtype, DEVICE)


def test_two_sources_are_concatenated_elsewhere() -> None:
    (x, *args), keywords = on_device(CASES[2], torch.float32)
    expected = ops.conv2d(x, *args, **keywords, backend="torch")
    for backend in (None, "torch", "reference"):
        y = ops.conv2d(x[:, :20], *args, **keywords, skip=x[:, 20:], backend=backend)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.ops.sdfast.conv2d(x[:, :20], *args, **keywords, skip=x[:, 20:]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_addition_alone(dtype: torch.dtype) -> None:
    args, keywords = on_device(CASES[2], dtype)
    bare = (*args[:2], None, *args[3:])
    for name in ("time_embedding", "residual"):
        check(bare, {name: keywords[name]}, name)
    check(args, {}, "bias")


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype: torch.dtype, offset: float) -> None:
    """Of one launch, of a split K, of four phases."""
    cases = (
        ((2, 16, 13, 11, 40, 1, 2, 0), 8, False),  # groups of 5 channels, a tile that is not full
        ((2, 16, 9, 11, 40, 1, 1, 0), 40, False),
        ((1, 8, 20, 17, 70, 1, 1, 0), 7, False),
        (SPLIT, 4, False),
        ((2, 9, 5, 7, 6, 3, 1, 1), 2, True),
    )
    checks.statistics(triton, triton, cases, dtype, DEVICE, offset)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_prologue(dtype: torch.dtype, silu: bool) -> None:
    """While tiles are loaded, of a 1x1 kernel with known statistics; else before."""
    for case, first in (((2, 48, 7, 9, 20, 1, 1, 0), 48), ((2, 30, 9, 8, 40, 1, 1, 0), 17), (CASES[2], 33)):
        (x, *args), _ = on_device(case, dtype)
        x = x * 3 + 2
        channels = x.shape[1]
        parameters = (torch.randn(2, channels) + 1).to(DEVICE, dtype).unbind()
        statistics = group_statistics(x, 3, 1e-5)
        norm = NormPrologue(3, *parameters, silu=silu)
        operands = (*args, norm, silu)

        def formula(x: Tensor, weight: Tensor, bias: Tensor, *more: object) -> Tensor:
            *more, norm, silu = more
            named = {
                "norm_groups": 3,
                "norm_weight": norm.weight.to(x.dtype),
                "norm_bias": norm.bias.to(x.dtype),
            }
            return conv2d_torch(x, weight, bias, *more, **named, norm_silu=silu)

        wide = [t.double() if isinstance(t, Tensor) else t for t in (x, *operands)]
        eager, exact = formula(x, *operands), formula(*wide)
        skip = {} if first == channels else {"skip": x[:, first:]}
        for known in (None, statistics):
            y = triton(x[:, :first], *args, norm=norm._replace(statistics=known), **skip)
            assert_within_budget(
                y, eager, exact, what=f"{case}, {first} channels, known: {known is not None}"
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_stays_zero_after_the_norm(dtype: torch.dtype) -> None:
    """The kernel's own prologue, where a bias makes zeros something else; two sources, both kinds of K."""
    for case, first in ((CASES[2], 20), (CASES[9], 16), (SPLIT, 320)):
        (x, weight, bias, stride, padding), _ = on_device(case, dtype)
        channels = x.shape[1]
        norm_weight, norm_bias = (torch.randn(2, channels) + 1).to(DEVICE, dtype).unbind()
        mean, rstd = group_statistics(x, 1, 1e-5)
        skip = x[:, first:] if first < channels else None
        more = (stride, list(padding), False, None, None, skip, [mean, rstd, norm_weight, norm_bias], True)
        actual = torch.ops.sdfast.conv2d_kernel_triton(x[:, :first], weight, bias, *more)
        norm = {"norm_groups": 1, "norm_weight": norm_weight, "norm_bias": norm_bias, "norm_silu": True}
        assert_within_budget(actual, *references((x, weight, bias, stride, padding), norm), what=str(case))


def input_gradient(x: Tensor, weight: Tensor, dy: Tensor, stride: int, padding: tuple) -> Tensor:
    """Of the convolution of x, by torch."""
    left, _, top, _ = padding
    padded = torch.nn.grad.conv2d_input(F.pad(x, padding).shape, weight, dy, stride)
    return padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_gradient(dtype: torch.dtype) -> None:
    for case in (*CASES, SPLIT, (1, 24, 5, 6, 40, 1, 2, 0), (2, 64, 1, 7, 80, 3, 2, 1)):
        (x, weight, _, stride, padding), _ = on_device(case, dtype)
        weight = weight.contiguous(memory_format=LAYOUT)
        dy = torch.randn_like(conv2d_torch(x, weight, None, stride, padding))
        actual = torch.full_like(x, float("nan"))
        for part, geometry in gradient_geometries(weight, tuple(x.shape[2:]), stride, padding):
            convolve(dy.contiguous(memory_format=LAYOUT), part, actual, geometry)

        geometry = (stride, padding)
        eager = input_gradient(x, weight, dy, *geometry)
        exact = input_gradient(x.double(), weight.double(), dy.double(), *geometry)
        assert_within_budget(actual, eager, exact, what=str(case))


def launched(call: object) -> list[str]:
    """The kernels that a call would launch."""
    with _triton.recording() as launches:
        call()
    return [launch.kernel.fn.__name__ for launch in launches]


def test_launches() -> None:
    args, keywords = on_device(CASES[0], torch.float16)
    assert launched(lambda: triton(*args, **keywords)) == ["convolution_kernel"]
    assert launched(lambda: triton(*args, upsample=True)) == ["convolution_kernel"]
    assert launched(lambda: triton(*args, stats_groups=5)) == ["convolution_kernel", "_groups_kernel"]
    args, keywords = on_device(SPLIT, torch.float16)
    assert launched(lambda: triton(*args, **keywords)) == ["convolution_kernel", "finish_kernel"]
    x, weight = torch.randn(2, 48, 3, 3, device=DEVICE), torch.randn(8, 48, 1, 1, device=DEVICE)
    assert launched(lambda: triton(x.half(), weight.half())) == ["_matmul_kernel"]  # a product, linear's
    assert launched(lambda: triton(x, weight)) == ["convolution_kernel"]  # precise as convolutions are
    assert launched(lambda: triton(x[:, :32], weight, skip=x[:, 32:])) == ["convolution_kernel"]
    statistics = group_statistics(x, 4, 1e-5)
    norm = NormPrologue(4, x[0, :, 0, 0], x[0, :, 0, 1], statistics=statistics)
    assert launched(lambda: triton(x, weight, norm=norm)) == ["convolution_kernel"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_strides(dtype: torch.dtype) -> None:
    checks.layouts_and_strides(triton, (2, 33, 9, 8, 34, 3, 1, 1), dtype, DEVICE)


def test_weights_are_read_where_they_lie() -> None:
    checks.weights_are_read_where_they_lie(triton, CASES[2], torch.float32, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_left_unwritten(dtype: torch.dtype, poisoned_memory: None) -> None:
    for case in (CASES[0], SPLIT):
        for upsample in (False, True):
            args, keywords = on_device(case, dtype, upsample)
            assert all(t.isfinite().all() for t in triton(*args, **keywords, stats_groups=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stays_within_its_tensors(dtype: torch.dtype) -> None:
    checks.stays_within_its_tensors(triton, (2, 20, 5, 7, 18, 3, 1, 1), 3, dtype, DEVICE)


def test_a_nan_reaches_only_its_neighbours() -> None:
    checks.a_nan_reaches_only_its_neighbours(triton, torch.float32, DEVICE)


def test_opcheck() -> None:
    (x, weight, bias, stride, padding), keywords = on_device((1, 20, 4, 5, 12, 3, 1, 1), torch.float32)
    added = (keywords["time_embedding"], keywords["residual"])
    mean, rstd = group_statistics(x, 2, 1e-5)
    for skip, norm in (
        (None, [mean, rstd, x[0, :, 0, 0].clone(), x[0, :, 0, 1].clone()]),
        (x[:, 12:].clone(), []),
    ):
        first = x if skip is None else x[:, :12].clone(memory_format=LAYOUT)
        operands = (first, weight, bias, stride, list(padding), False, *added, skip, norm, False)
        torch.library.opcheck(torch.ops.sdfast.conv2d_kernel_triton, operands)
        torch.library.opcheck(torch.ops.sdfast.conv2d_statistics_triton, (*operands, 3, 1e-5))
    folded = (
        x,
        torch.randn(4, 12, 2, 2, 20, device=DEVICE),
        None,
        1,
        [1] * 4,
        True,
        None,
        None,
        None,
        [],
        False,
    )
    torch.library.opcheck(torch.ops.sdfast.conv2d_kernel_triton, folded)


def test_compiles_whole() -> None:
    args, keywords = on_device((1, 32, 5, 4, 40, 3, 1, 1), torch.float32)

    def run(x: Tensor) -> Tensor:
        y, mean, _ = triton(x[:, :20], *args[1:], **keywords, skip=x[:, 20:], stats_groups=4)
        return y * mean.sum()

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(args[0]), run(args[0]))


@torch.no_grad()
def test_who_is_served_by_it() -> None:
    x, weight = torch.randn(1, 16, 4, 4, device=DEVICE), torch.randn(8, 16, 3, 3, device=DEVICE)
    assert not reads_skip(x, weight)
    with dispatch.use_backend("triton"):
        assert reads_skip(x, weight) and not reads_skip(x.double(), weight)
        with torch.enable_grad():
            assert not reads_skip(x, weight)
        named = ops.conv2d(x, weight, padding=1)
    assert torch.equal(named, triton(x, weight, padding=1))
    with dispatch.use_backend("torch"):
        assert not reads_skip(x, weight)


def test_what_it_cannot_take_is_named() -> None:
    x, weight = torch.randn(1, 16, 4, 4, device=DEVICE), torch.randn(8, 16, 3, 3, device=DEVICE)
    for arguments, reason in (
        ((x.double(), weight.double()), "x is float64"),
        ((x[:0], weight), "not empty"),
    ):
        with pytest.raises(ValueError, match=reason):
            ops.conv2d(*arguments, padding=1, backend="triton")
    skip = torch.randn(1, 3, 4, 4, device=DEVICE)
    for wrong, error, message in (
        (skip, ValueError, "x and skip: got 19 channels, expected 16 to fit weight"),
        (skip[:, :, 1:], ValueError, r"skip: got shape \(1, 3, 3, 4\), expected \(1, C, 4, 4\) as the input"),
        (skip[0], ValueError, "skip: got shape .* 4 dimensions"),
        (skip.double(), TypeError, "skip: got dtype torch.float64"),
    ):
        with pytest.raises(error, match=message):
            ops.conv2d(x, weight, skip=wrong)
