"""layer_norm's Triton kernels against fp64: widths, rows, views, gradients."""

from __future__ import annotations

import dataclasses

import layer_norm_checks as checks
import pytest
import torch
from test_layer_norm import NAMES, Case, make_case, strided

from sdfast.ops import _triton
from sdfast.ops.layer_norm_triton import layer_norm_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = [
    pytest.mark.skipif(
        _triton.why_not("x", DEVICE) is not None, reason=str(_triton.why_not("x", DEVICE))
    ),
]  # fmt: skip


def on_device(case: Case) -> Case:
    return checks.on_device(case, DEVICE)


def check(case: Case) -> None:
    checks.within_budget(case, "triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_fp64(dtype: torch.dtype) -> None:
    for shape, axes in [((2, 7, 320), 1), ((13, 64), 1), ((3, 2, 7, 12), 2), ((2, 3, 4, 5), 4), ((9,), 1)]:
        check(make_case(shape, dtype, axes))
        check(make_case(shape, dtype, axes, weight=False, bias=False))
    check(make_case((5, 24), dtype, bias=False))
    check(make_case((5, 24), dtype, weight=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_widths(dtype: torch.dtype) -> None:
    for width in (1, 2, 3, 5, 8, 13, 17, 31, 33, 127, 769):
        check(make_case((1 + width % 5, width), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_rows(dtype: torch.dtype) -> None:
    """The widest row that registers hold, and rows of several strips, the last one shorter."""
    check(make_case((2, 8192), dtype))
    check(make_case((3, 8193), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shares_are_added(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few multiprocessors, so that a program goes through several blocks of rows, of which the last is cut."""
    monkeypatch.setattr("sdfast.ops.layer_norm_triton.multiprocessors", lambda device: 1)
    check(make_case((3, 31, 320), dtype))
    check(make_case((7, 1700), dtype))


@pytest.mark.parametrize("width", [320, 1021])
def test_many_rows(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as large tiles of rows are for, of which the last is cut."""
    monkeypatch.setattr("sdfast.ops.layer_norm_triton.multiprocessors", lambda device: 3)
    check(make_case((53, width), torch.float16))


@pytest.mark.parametrize("rows", [1, 77, 154, 1000, 2048, 8192, 100_000])
@pytest.mark.parametrize("width", [320, 768, 1021, 1280, 8192, 10240])
def test_shares_are_few_beside_rows(rows: int, width: int) -> None:
    """The shares cover the rows once, of many rows they are an eighth of these at most, and many programs add them."""
    x = torch.empty((rows, width), dtype=torch.float16, device="meta")
    weight, mean = x[0], torch.empty(rows, device="meta")
    with _triton.recording() as launches:
        layer_norm_backward(x, x, mean, mean, 1, weight, weight)
    backward, parameters = launches[-2:]
    shares, steps = backward.arguments[-2:]
    tile = backward.keywords["ROWS"]
    assert shares * steps * tile >= rows > (shares - 1) * steps * tile
    assert shares <= max(rows / 8, 132) and shares <= 2 * 132
    assert backward.grid[0] * backward.grid[1] >= min(rows / tile, 66)
    assert parameters.grid[0] == -(-width // 8)


def test_large_mean() -> None:
    for shape in ((4, 300), (2, 9000)):
        case = make_case(shape, torch.float32, bias=False)
        case.x += 1e4
        check(case)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_row(value: float) -> None:
    for width in (40, 8200):
        checks.non_finite_values_stay_in_their_row(value, width, "triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fp32_parameters_with_a_half_precision_input(dtype: torch.dtype) -> None:
    case = make_case((5, 48), dtype)
    check(dataclasses.replace(case, weight=torch.randn(48), bias=torch.randn(48)))


def test_views() -> None:
    """Strided or off its alignment, between NaN: the bits of the plain call."""
    case = make_case((6, 40), torch.float16)
    memory = torch.full((242,), float("nan"), dtype=torch.float16)
    memory[1:-1].view(6, 40).copy_(case.x)
    dy = torch.randn(40, 6).t().to(DEVICE)
    expected = on_device(case).gradients("triton", dy)
    for x in (strided(case.x), case.x.t().contiguous().t(), memory[1:-1].view(6, 40)):
        views = dataclasses.replace(case, x=x, weight=strided(case.weight), bias=strided(case.bias))
        assert torch.equal(on_device(views).run("triton"), on_device(case).run("triton"))
        actual = on_device(views).gradients("triton", dy)
        assert all(torch.equal(actual[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    checks.empty(shape, "triton", DEVICE)


def test_opcheck() -> None:
    checks.opcheck("triton", DEVICE)


def test_compiles_to_one_graph() -> None:
    checks.compiles_to_one_graph("triton", DEVICE)
