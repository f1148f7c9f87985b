"""layer_norm's CUDA kernels against fp64: every path of the launch plan, views, gradients, any order of threads."""

from __future__ import annotations

import dataclasses

import layer_norm_checks as checks
import pytest
import torch
from emulated_cuda import device, thread_order
from layer_norm_checks import on_device
from test_layer_norm import DTYPES, Case, make_case, strided

from sdfast.testing import assert_within_budget, relative_error


def check(case: Case, where: str, seed: int = 3) -> None:
    """Again in another order of threads."""
    checks.within_budget(case, "cuda", where, thread_order(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_fp64(dtype: torch.dtype, cuda_kernels: str) -> None:
    """The widths of models, each by another kernel, with and without parameters."""
    for width in (320, 640, 768, 1280, 2048):
        check(make_case((2, 3, width), dtype), cuda_kernels)
    for shape, axes in (((3, 2, 7, 12), 2), ((2, 3, 4, 5), 4), ((9,), 1)):
        check(make_case(shape, dtype, axes), cuda_kernels)
        check(make_case(shape, dtype, axes, weight=False, bias=False), cuda_kernels)
    check(make_case((5, 24), dtype, bias=False), cuda_kernels)
    check(make_case((5, 24), dtype, weight=False), cuda_kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_widths(dtype: torch.dtype, cuda_kernels: str) -> None:
    for width in (*range(1, 18), 31, 33, 127, 513, 769):
        check(make_case((1 + width % 5, width), dtype), cuda_kernels, seed=width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_rows(dtype: torch.dtype, cuda_kernels: str) -> None:
    """The widest rows that registers hold, and those of several strips, the last one shorter."""
    for width in (4096, 4097, 8192, 8200):
        check(make_case((2, width), dtype), cuda_kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_shares_are_added(dtype: torch.dtype, capability: int, cuda_kernels: str) -> None:
    """Few multiprocessors: blocks go through several rows, of which the last ones are cut, and hold several."""
    with device(capability, 3):
        check(make_case((67, 320), dtype), cuda_kernels, seed=capability)
        check(make_case((7, 1700), dtype), cuda_kernels)
        check(make_case((21, 33), dtype), cuda_kernels)


def test_large_mean(cuda_kernels: str) -> None:
    """As if the mean were not there: what rounding leaves in it is known."""
    for shape in ((40, 640), (3, 5000), (2, 9000)):
        case = make_case(shape, torch.float32)
        case.x += 1e4
        error = relative_error(
            on_device(case, cuda_kernels).run("cuda").cpu(), case.converted(torch.float64).run("torch")
        )
        assert error < 4e-7
        check(case, cuda_kernels)


def test_constant_rows(cuda_kernels: str) -> None:
    """Their variance is zero, and never below."""
    case = make_case((12, 320), torch.float32)
    case.x[:] = 123.456
    given = on_device(case, cuda_kernels)
    assert torch.allclose(given.run("cuda"), given.bias.expand(case.x.shape), atol=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_row(value: float, cuda_kernels: str) -> None:
    for width in (40, 300, 8200):
        checks.non_finite_values_stay_in_their_row(value, width, "cuda", cuda_kernels)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fp32_parameters_with_a_half_precision_input(dtype: torch.dtype, cuda_kernels: str) -> None:
    case = make_case((5, 48), dtype)
    check(dataclasses.replace(case, weight=torch.randn(48), bias=torch.randn(48)), cuda_kernels)
    mixed = on_device(dataclasses.replace(case, weight=torch.randn(48)), cuda_kernels)
    exact = mixed.converted(torch.float64).run("torch")
    assert_within_budget(mixed.run("cuda"), mixed.run("torch"), exact)


def test_views(cuda_kernels: str) -> None:
    """Strided or off its alignment, between NaN: the values of the plain call."""
    case = make_case((6, 40), torch.float16)
    memory = torch.full((242,), float("nan"), dtype=torch.float16)
    memory[1:-1].view(6, 40).copy_(case.x)
    dy = torch.randn(40, 6).t().to(cuda_kernels)
    expected = on_device(case, cuda_kernels).gradients("cuda", dy)
    y = on_device(case, cuda_kernels).run("cuda")
    off = torch.full((41,), float("nan"), dtype=torch.float16)[1:]
    for x in (strided(case.x), case.x.t().contiguous().t(), memory[1:-1].view(6, 40)):
        views = dataclasses.replace(case, x=x, weight=strided(case.weight), bias=off.copy_(case.bias))
        views = on_device(views, cuda_kernels)
        torch.testing.assert_close(views.run("cuda"), y)  # sums are taken in another order
        for name, gradient in views.gradients("cuda", dy).items():
            torch.testing.assert_close(gradient, expected[name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
def test_empty(shape: tuple[int, ...], cuda_kernels: str) -> None:
    checks.empty(shape, "cuda", cuda_kernels)


def test_opcheck(cuda_kernels: str) -> None:
    checks.opcheck("cuda", cuda_kernels)


def test_what_is_unsafe_is_refused_by_the_operation_itself(cuda_kernels: str) -> None:
    x, op = torch.randn(2, 8, device=cuda_kernels), torch.ops.sdfast.layer_norm_cuda
    one = torch.ones(7, device=cuda_kernels)
    for arguments in [(x, 0), (x, 3), (x.double(), 1), (x, 1, one), (x, 1, x), (x, 1, x[0].half())]:
        with pytest.raises(RuntimeError):
            op(*arguments, *(None,) * (4 - len(arguments)), 1e-5)


def test_compiles_to_one_graph(cuda_kernels: str) -> None:
    checks.compiles_to_one_graph("cuda", cuda_kernels)
