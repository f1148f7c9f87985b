"""group_norm's CUDA kernels against fp64: layouts, groups, architectures, orders of threads, gradients."""

from __future__ import annotations

import dataclasses

import group_norm_checks as checks
import pytest
import torch
from emulated_cuda import device, thread_order
from group_norm_checks import on_device
from test_group_norm import NAMES, Case, in_layout, make_case, terms

from sdfast.ops import group_norm
from sdfast.testing import assert_within_budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("first", "last", "strided")
OPS = torch.ops.sdfast
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def check(case: Case, where: str, *, backward: bool = True) -> None:
    """Within the budget of eager on the CPU, the same bits in another order of threads, laid out as x is."""
    given, exact_case = on_device(case, where), case.converted(torch.float64)
    y = given.run("cuda")
    dy = torch.randn(y.shape).to(y.dtype)
    sizes = terms(case, dy)
    assert y.stride() == given.run("torch").stride() or not case.x.is_contiguous()
    exact = exact_case.run("torch")
    assert_within_budget(y.cpu(), case.run("torch"), exact, magnitude=sizes["y"], what="y")
    with thread_order(3):
        assert torch.equal(y, given.run("cuda"))
    if not backward:
        return
    with thread_order(2):
        actual = given.gradients("cuda", dy.to(where))
    eager, exact_gradients = case.gradients("torch", dy), exact_case.gradients("torch", dy.double())
    for name, value in actual.items():
        assert value.shape == getattr(case, name).shape
        assert_within_budget(
            value.cpu(), eager[name], exact_gradients[name], magnitude=sizes[name], what=f"d{name}"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_fp64(dtype: torch.dtype, layout: str, cuda_kernels: str) -> None:
    check(make_case((2, 30, 7, 5), 3, dtype, layout), cuda_kernels)
    check(make_case((2, 48, 4, 6), 6, dtype, layout), cuda_kernels)
    check(make_case((1, 24, 2, 3, 4), 4, dtype, layout, affine=False, scale_shift=False), cuda_kernels)
    check(make_case((2, 6, 9), 2, dtype, layout, silu=False, affine=layout != "last"), cuda_kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_channels(dtype: torch.dtype, cuda_kernels: str) -> None:
    sizes = (1, 2, 5, 3, 7, 4)
    for channels in range(1, 18):
        for groups in (g for g in range(1, channels + 1) if channels % g == 0):
            layout = LAYOUTS[(channels + groups) % 2]
            shape = (1 + channels % 2, channels, sizes[channels % 6], sizes[channels // 3])
            check(make_case(shape, groups, dtype, layout), cuda_kernels, backward=groups in (1, channels))


@pytest.mark.parametrize("channels", [320, 640, 960, 1280, 1920, 2560])
def test_real_channels(channels: int, cuda_kernels: str) -> None:
    """The widths of the models' groups, of images that are cut small."""
    dtype = DTYPES[channels // 320 % 3]
    for layout in ("last", "first"):
        case = make_case((2, channels, 4, 2), 32, dtype, layout, scale_shift=layout == "last")
        check(case, cuda_kernels, backward=channels in (320, 1280))


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("capability", [80, 86, 90, 120])
def test_architectures(capability: int, layout: str, cuda_kernels: str) -> None:
    """One launch of single blocks, of clusters, and two launches, with and without whole vectors."""
    multiprocessors = {80: 108, 86: 84, 90: 132, 120: 170}[capability]
    with device(capability, multiprocessors):
        for shape, groups, dtype in (
            ((1, 64, 24, 16), 8, torch.float16),
            ((1, 40, 45, 41), 4, torch.bfloat16),
            ((2, 20, 64, 32), 2, torch.float32),
        ):
            check(make_case(shape, groups, dtype, layout), cuda_kernels, backward=False)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_are_combined(dtype: torch.dtype, layout: str, cuda_kernels: str) -> None:
    """Images larger than shared memory, on few multiprocessors and on many; the last chunk is shorter."""
    shape = (1, 32, 66, 56) if layout == "last" or dtype is torch.float32 else (1, 16, 130, 56)
    with device(86, 80):
        check(make_case(shape, 1, dtype, layout), cuda_kernels)
    with device(86, 2):
        check(make_case((1, 12, 131, 67), 1, dtype, layout), cuda_kernels, backward=False)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_groups_wider_than_a_block(layout: str, cuda_kernels: str) -> None:
    """In parts, and channels of which a row has more than threads."""
    check(make_case((2, 2064, 5, 4), 1, torch.float16, layout), cuda_kernels, backward=False)
    check(make_case((1, 2054, 3, 3), 2, torch.float32, layout), cuda_kernels)
    check(make_case((1, 1028, 3, 3), 2, torch.bfloat16, layout), cuda_kernels)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_orders_of_threads(seed: int, cuda_kernels: str) -> None:
    """The same bits and no race, in a cluster, over two launches and backwards."""
    for capability, shape in ((90, (1, 40, 33, 31)), (86, (1, 32, 66, 56))):
        for layout in ("first", "last"):
            case = on_device(make_case(shape, 2, torch.bfloat16, layout), cuda_kernels)
            dy = torch.randn(shape).to(case.x)
            with device(capability, 40):
                expected = case.run("cuda"), *case.gradients("cuda", dy).values()
                with thread_order(seed):
                    again = case.run("cuda"), *case.gradients("cuda", dy).values()
            assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("shape", [(2, 64, 6, 6), (1, 120, 35, 34)], ids=["block", "cluster"])
def test_large_mean(shape: tuple[int, ...], layout: str, cuda_kernels: str) -> None:
    case = make_case(shape, 8, torch.float32, layout, silu=False, scale_shift=False)
    case.x += 1e4
    check(case, cuda_kernels, backward=False)
    with device(86, 170):
        check(case, cuda_kernels, backward=False)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_outliers_among_the_first_pixels(layout: str, cuda_kernels: str) -> None:
    case = make_case((1, 60, 35, 34), 2, torch.float32, layout, silu=False)
    case.x[:, ::3, 0, :3] = 3e4
    for capability in (86, 90):
        with device(capability, 132):
            check(case, cuda_kernels, backward=False)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_group(value: float, layout: str, cuda_kernels: str) -> None:
    for shape in ((2, 12, 9, 5), (2, 24, 64, 96)):
        case = on_device(make_case(shape, 3, torch.float16, layout), cuda_kernels)
        width = shape[1] // 3
        case.x[1, width + 1, 3, 2] = value
        with device(86, 100):
            y = case.run("cuda")
        assert y[1, width : 2 * width].isnan().all()
        assert int(y.isnan().sum()) == y[1, :width].numel()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fp32_parameters_with_a_half_precision_input(dtype: torch.dtype, cuda_kernels: str) -> None:
    case = make_case((2, 24, 5, 4), 8, dtype)
    wide = {n: torch.randn_like(getattr(case, n), dtype=torch.float32) for n in NAMES[1:]}
    check(dataclasses.replace(case, **wide), cuda_kernels)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_views(layout: str, cuda_kernels: str) -> None:
    """x off its alignment and between NaN, parameters that are strided: the values of the plain call."""
    case = make_case((2, 24, 4, 6), 4, torch.float16, layout)
    dy = torch.randn(case.x.shape).half()
    memory = torch.full((case.x.numel() + 2,), float("nan"), dtype=torch.float16, device=cuda_kernels)
    x = memory[1:-1].as_strided(case.x.shape, case.x.stride(), 1)
    x.copy_(case.x)
    pair = torch.full((2, 51), float("nan"), dtype=torch.float16)
    pair[:, :24], pair[:, 25:49] = case.scale, case.shift
    spread = torch.full((24, 2), float("nan"), dtype=torch.float16)
    spread[:, 1] = case.weight
    strided = Case(case.x, 4, spread[:, 1], case.bias, pair[:, :24], pair[:, 25:49])
    views = dataclasses.replace(
        strided, **{n: t.to(cuda_kernels) for n in NAMES[1:] if (t := getattr(strided, n)) is not None}, x=x
    )
    given = on_device(case, cuda_kernels)
    exact = case.converted(torch.float64)
    sizes = terms(case, dy)
    assert_within_budget(
        views.run("cuda").cpu(), given.run("cuda").cpu(), exact.run("torch"), magnitude=sizes["y"]
    )
    results = (views.gradients("cuda", dy.to(cuda_kernels)), given.gradients("cuda", dy.to(cuda_kernels)))
    right = exact.gradients("torch", dy.double())
    for name in NAMES:
        actual, plain = (r[name].cpu() for r in results)
        assert_within_budget(actual, plain, right[name], magnitude=sizes[name], what=f"d{name}")
    assert memory[[0, -1]].isnan().all()


@pytest.mark.parametrize(
    ("channels", "skip_channels", "groups", "size", "dtype"),
    [
        (20, 10, 3, (5, 7), torch.float32), (7, 5, 4, (3, 3), torch.bfloat16),
        (640, 320, 32, (2, 1), torch.float16), (24, 8, 2, (64, 32), torch.float16),
        (280, 20, 1, (3, 2), torch.float32), (1040, 16, 1, (3, 2), torch.float16),
    ],
)  # fmt: skip
def test_skip(
    channels: int, skip_channels: int, groups: int, size: tuple[int, int], dtype: torch.dtype, cuda_kernels: str
) -> None:  # fmt: skip
    """Groups that straddle the two sources, images of one launch and of two, a group in parts."""
    for capability in (86, 90):
        with device(capability, 132):
            checks.skip("cuda", channels, skip_channels, groups, size, dtype, cuda_kernels)


def test_gradients_reach_the_skip(cuda_kernels: str) -> None:
    checks.gradients_reach_the_skip("cuda", cuda_kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype: torch.dtype, layout: str, cuda_kernels: str) -> None:
    """Taken for granted, and what the forward of training gives."""
    for shape, groups in (((2, 60, 7, 5), 6), ((1, 34, 17, 19), 2), ((1, 32, 48, 40), 1)):
        checks.known_statistics("cuda", shape, groups, dtype, layout, cuda_kernels)
        x = on_device(make_case(shape, groups, dtype, layout), cuda_kernels).x
        for capability in (86, 90):
            with device(capability, 100):
                computed = OPS.group_norm_forward_cuda(x, groups, None, None, 1e-5, False, None, None)
            for actual, right in zip(computed[1:], checks.statistics_of(x, groups), strict=True):
                torch.testing.assert_close(actual, right)


def test_gradients_with_statistics(cuda_kernels: str) -> None:
    checks.gradients_with_statistics("cuda", cuda_kernels)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)])
def test_empty(shape: tuple[int, ...], cuda_kernels: str) -> None:
    checks.empty("cuda", shape, cuda_kernels)


def test_memory_format_is_kept(cuda_kernels: str) -> None:
    x = torch.randn(2, 8, 4, 6, device=cuda_kernels)
    views = [
        x, in_layout(x, "last"), x[0].mT, torch.randn(2, 3, 4, 6, 8, device=cuda_kernels).movedim(-1, 1),
        x[..., :1, :1].clone(), x[0, 0, 0, 0].expand(16).clone().as_strided((2, 8, 1, 1), (8, 1, 77, 5)),
    ]  # fmt: skip
    for view in views:
        view = view.detach().requires_grad_()
        y = group_norm(view, 2, backend="cuda")
        (dx,) = torch.autograd.grad(y, view, torch.ones_like(y))
        assert y.stride() == view.stride() and dx.stride() == view.stride()
    assert group_norm(x[..., ::2], 4, backend="cuda").is_contiguous()


@pytest.mark.parametrize("layout", ["last", "strided"])
def test_opcheck(layout: str, cuda_kernels: str) -> None:
    checks.opcheck("cuda", layout, cuda_kernels)
