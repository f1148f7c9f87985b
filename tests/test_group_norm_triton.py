"""group_norm's Triton kernels against fp64: layouts, groups, two sources, known statistics, gradients.

fp32 has few pixels here: the interpreter adds a tile's rows one after the other, where a GPU adds them in a tree.
"""

from __future__ import annotations

import dataclasses

import group_norm_checks as checks
import pytest
import torch
from test_group_norm import NAMES, Case, make_case, terms
from torch import Tensor

from sdfast.ops import _triton, group_norm
from sdfast.ops.group_norm import group_norm_torch
from sdfast.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("first", "last", "strided")
OPS = torch.ops.sdfast
pytestmark = [
    pytest.mark.skipif(
        _triton.why_not("x", DEVICE) is not None, reason=str(_triton.why_not("x", DEVICE))
    ),
]  # fmt: skip


def on_device(case: Case) -> Case:
    return checks.on_device(case, DEVICE)


def check(case: Case, *, backward: bool = True) -> None:
    """Within the budget of eager on the CPU, the same bits twice, and laid out as x is."""
    given, exact_case = on_device(case), case.converted(torch.float64)
    y = given.run("triton")
    dy = torch.randn(y.shape).to(y.dtype)
    sizes = terms(case, dy)
    assert y.stride() == given.run("torch").stride() or not case.x.is_contiguous()
    assert torch.equal(y, given.run("triton"))
    exact = exact_case.run("torch")
    assert_within_budget(y.cpu(), case.run("torch"), exact, magnitude=sizes["y"], what="y")
    if not backward:
        return
    actual = given.gradients("triton", dy.to(DEVICE))
    eager, exact_gradients = case.gradients("torch", dy), exact_case.gradients("torch", dy.double())
    for name, value in actual.items():
        assert value.shape == getattr(case, name).shape
        assert_within_budget(
            value.cpu(), eager[name], exact_gradients[name], magnitude=sizes[name], what=f"d{name}"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_fp64(dtype: torch.dtype, layout: str) -> None:
    check(make_case((2, 30, 7, 5), 3, dtype, layout))
    check(make_case((1, 24, 2, 3, 4), 4, dtype, layout, affine=False, scale_shift=False))
    check(make_case((2, 6, 9), 2, dtype, layout, silu=False, affine=layout != "last"))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_odd_channels(dtype: torch.dtype) -> None:
    sizes = (1, 2, 5, 3, 7, 4)
    for channels in range(1, 18):
        divisors = [g for g in range(1, channels + 1) if channels % g == 0]
        groups = divisors[(channels + DTYPES.index(dtype)) % len(divisors)]
        layout = LAYOUTS[channels % 2]
        shape = (1 + channels % 2, channels, sizes[channels % 6], sizes[channels // 3])
        check(make_case(shape, groups, dtype, layout))


def test_real_channels() -> None:
    """The widths of the models' groups, of images that are cut small."""
    for channels, layout in ((320, "last"), (640, "first"), (960, "last"), (1280, "last"), (2560, "last")):
        case = make_case((1, channels, 3, 2), 32, torch.float16, layout, scale_shift=False)
        check(case, backward=channels == 320)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_are_combined(dtype: torch.dtype, layout: str) -> None:
    """Images larger than a program's registers: partial statistics, the last chunk shorter than the others."""
    shape = (1, 60, 36, 31) if dtype is torch.float32 else (1, 20, 40, 37)
    check(make_case(shape, 4, dtype, layout), backward=dtype is torch.float16)


def test_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few multiprocessors, so that a program takes several tiles, of which the last is cut."""
    for module in ("sdfast.ops._group_norm_plan", "sdfast.ops.group_norm_backward_triton"):
        monkeypatch.setattr(f"{module}.multiprocessors", lambda device: 1)
    check(make_case((2, 60, 33, 35), 6, torch.float16, "last"))
    check(make_case((1, 30, 33, 35), 3, torch.float16, "first"), backward=False)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_groups_wider_than_a_program(layout: str) -> None:
    check(make_case((2, 600, 5, 4), 1, torch.float16, layout), backward=False)
    check(make_case((1, 594, 3, 3), 2, torch.float32, layout))


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("shape", [(2, 64, 6, 6), (1, 120, 35, 34)], ids=["whole", "chunks"])
def test_large_mean(shape: tuple[int, ...], layout: str) -> None:
    case = make_case(shape, 8, torch.float32, layout, silu=False, scale_shift=False)
    case.x += 1e4
    check(case, backward=False)


@pytest.mark.parametrize("layout", ["first", "last"])
def test_outliers_among_the_first_pixels(layout: str) -> None:
    case = make_case((1, 120, 35, 34), 4, torch.float32, layout, silu=False)
    case.x[:, ::3, 0, :3] = 3e4
    check(case, backward=False)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_group(value: float, layout: str) -> None:
    for shape in ((2, 12, 9, 5), (2, 12, 32, 33)):
        case = on_device(make_case(shape, 3, torch.float16, layout))
        case.x[1, 5, 3, 2] = value
        y = case.run("triton")
        assert y[1, 4:8].isnan().all() and int(y.isnan().sum()) == y[1, 4:8].numel()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fp32_parameters_with_a_half_precision_input(dtype: torch.dtype) -> None:
    case = make_case((2, 24, 5, 4), 8, dtype)
    wide = {n: torch.randn_like(getattr(case, n), dtype=torch.float32) for n in NAMES[1:]}
    check(dataclasses.replace(case, **wide))


@pytest.mark.parametrize("layout", ["first", "last"])
def test_views(layout: str) -> None:
    """x off its alignment and between NaN, parameters that are strided: the bits of the plain call."""
    case = make_case((2, 20, 5, 7), 4, torch.float16, layout)
    dy = torch.randn(case.x.shape)
    memory = torch.full((case.x.numel() + 2,), float("nan"), dtype=torch.float16)
    x = memory[1:-1].as_strided(case.x.shape, case.x.stride(), 1)
    x.copy_(case.x)
    pair = torch.full((2, 43), float("nan"), dtype=torch.float16)
    pair[:, :20], pair[:, 21:41] = case.scale, case.shift
    spread = torch.full((20, 2), float("nan"), dtype=torch.float16)
    spread[:, 1] = case.weight
    views = Case(
        x, 4, spread[:, 1], case.bias, pair[:, :20], pair[:, 21:41]
    )  # fmt: skip
    assert torch.equal(on_device(views).run("triton"), on_device(case).run("triton"))
    given = (on_device(c).gradients("triton", dy.to(DEVICE)) for c in (views, case))
    assert all(torch.equal(a, b) for a, b in zip(*(g.values() for g in given), strict=True))
    assert memory[[0, -1]].isnan().all()


@pytest.mark.parametrize(
    ("channels", "skip_channels", "groups", "size", "dtype"),
    [
        (20, 10, 3, (5, 7), torch.float32), (7, 5, 4, (3, 3), torch.float32), (7, 5, 4, (3, 3), torch.bfloat16),
        (640, 320, 32, (2, 1), torch.float16), (20, 10, 3, (40, 27), torch.float16),
        (280, 20, 1, (3, 2), torch.float32),
    ],
)  # fmt: skip
def test_skip(
    channels: int, skip_channels: int, groups: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Groups that straddle the two sources, images of one launch and of two, a group in parts."""
    checks.skip("triton", channels, skip_channels, groups, size, dtype, DEVICE)


def test_skip_is_the_concatenation() -> None:
    x, skip = torch.randn(2, 7, 3, 2), torch.randn(2, 5, 3, 2)
    for backend in ("torch", "reference", "cpu"):
        expected = group_norm(torch.cat([x, skip], 1), 4, activation="silu", backend=backend)
        assert torch.equal(group_norm(x, 4, activation="silu", skip=skip, backend=backend), expected)


def test_gradients_reach_the_skip() -> None:
    checks.gradients_reach_the_skip("triton", DEVICE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype: torch.dtype, layout: str) -> None:
    for shape, groups in (((2, 60, 7, 5), 6), ((1, 34, 17, 19), 2), ((1, 294, 3, 2), 1)):
        checks.known_statistics("triton", shape, groups, dtype, layout, DEVICE)


def test_statistics_are_taken_for_granted_by_triton_alone() -> None:
    x = torch.randn(2, 6, 4, 3)
    promised = torch.full((2, 2), 3.0), torch.full((2, 2), 0.5)
    y = group_norm(x.to(DEVICE), 2, statistics=tuple(t.to(DEVICE) for t in promised), backend="triton")
    torch.testing.assert_close(y.cpu(), (x - 3) * 0.5)
    for backend in ("torch", "reference", "cpu"):
        expected = group_norm(x, 2, backend=backend)
        assert torch.equal(group_norm(x, 2, statistics=promised, backend=backend), expected)


def test_gradients_with_statistics() -> None:
    checks.gradients_with_statistics("triton", DEVICE)


def test_launches() -> None:
    """One where a program holds its groups or knows their statistics, two else; nothing is copied for these."""
    small = torch.randn(2, 40, 16, 16).half().to(memory_format=torch.channels_last)
    large = torch.randn(2, 40, 64, 64).half().to(memory_format=torch.channels_last)
    other, mean = small.clone(), torch.zeros(2, 4)
    common = (4, None, None, 1e-5, True, None, None)
    calls = (
        (lambda: OPS.group_norm_triton(small, *common), 1, (small,)),
        (lambda: OPS.group_norm_triton(large, *common), 2, (large,)),
        (lambda: OPS.group_norm_apply_triton(large, mean, mean, 4, None, None, True, None, None), 1, (large,)),
        (lambda: OPS.group_norm_pair_triton(small, other, *common), 1, (small, other)),
        (lambda: OPS.group_norm_pair_triton(large, large, *common), 2, (large,)),
    )  # fmt: skip
    for call, count, sources in calls:
        with _triton.recording() as launches:
            call()
        assert len(launches) == count
        for launch in launches:
            read = {a.data_ptr() for a in launch.arguments if isinstance(a, Tensor)}
            assert {x.data_ptr() for x in sources} <= read


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    checks.empty("triton", shape, DEVICE)


@pytest.mark.parametrize("layout", ["last", "strided"])
def test_opcheck(layout: str) -> None:
    checks.opcheck("triton", layout, DEVICE)


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    x, skip = torch.randn(2, 6, 4, 3, device=DEVICE), torch.randn(2, 2, 4, 3, device=DEVICE)

    def call(x: Tensor, skip: Tensor) -> Tensor:
        return group_norm(x * 2, 4, skip=skip, activation="silu", backend="triton") + 1

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, skip), call(x, skip))


def test_errors_name_the_argument() -> None:
    x, skip, mean = torch.randn(2, 6, 4, 3), torch.randn(2, 2, 4, 3), torch.zeros(2, 2)
    wrong: list[tuple[type[Exception], str, dict[str, object]]] = [
        (TypeError, "num_groups: got float, expected an int", {"num_groups": 2.0}),
        (TypeError, "skip: got list", {"skip": [1.0]}),
        (ValueError, "skip: got shape .* expected 4 dimensions", {"skip": skip[0]}),
        (ValueError, r"skip: got shape \(2, 2, 4, 1\), expected \(2, 'C2', 4, 3\)", {"skip": skip[..., :1]}),
        (ValueError, r"skip: got shape \(1, 2, 4, 3\)", {"skip": skip[:1]}),
        (TypeError, "skip: got dtype torch.float16, expected torch.float32", {"skip": skip.half()}),
        (ValueError, "skip: is on meta, expected cpu", {"skip": skip.to("meta")}),
        (ValueError, "num_groups: got 2, expected a divisor of the 7 channels", {"skip": skip[:, :1]}),
        (ValueError, r"weight: got shape \(6,\), expected \(8,\)", {"skip": skip, "weight": x[0, :, 0, 0]}),
        (ValueError, "statistics: got them with skip", {"skip": skip, "statistics": (mean, mean)}),
        (TypeError, "statistics: got Tensor, expected a tuple of two tensors", {"statistics": mean}),
        (ValueError, r"statistics, mean: got shape \(2, 1\), expected \(2, 2\)", {"statistics": (mean[:, :1], mean)}),
        (TypeError, "statistics, rstd: got dtype torch.float16", {"statistics": (mean, mean.half())}),
        (ValueError, "statistics, rstd: is on meta", {"statistics": (mean, mean.to("meta"))}),
        (ValueError, "backend 'triton' cannot run: x is float64", {"backend": "triton", "x": x.double()}),
    ]  # fmt: skip
    for error, message, keywords in wrong:
        arguments = {"x": x, "num_groups": 2, **keywords}
        with pytest.raises(error, match=message):
            group_norm(**arguments)  # type: ignore[arg-type]
    wide = x.double()
    exact = group_norm_torch(wide, 2)
    assert torch.equal(group_norm(wide, 2, statistics=(mean.double(), mean.double())), exact)
