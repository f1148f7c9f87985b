"""group_norm: every backend against the formula in fp64, and what the compiled kernels promise beyond it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_with_library
from torch import Tensor

from sdfast import _library
from sdfast.ops import group_norm
from sdfast.testing import assert_within_budget, relative_error

HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF_DTYPES)
NAMES = ("x", "weight", "bias", "scale", "shift")

has_kernel = _library.has_kernel("group_norm_forward", "cpu")
needs_kernel = pytest.mark.skipif(not has_kernel, reason=_library.load_cpu_library().detail)
BACKENDS = ("reference", "torch", pytest.param("cpu", marks=needs_kernel))


@dataclasses.dataclass
class Case:
    """Arguments of one call; an absent one is None."""

    x: Tensor
    num_groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    silu: bool = True
    eps: float = 1e-5

    def converted(self, dtype: torch.dtype) -> Case:
        tensors = {n: None if (t := getattr(self, n)) is None else t.detach().to(dtype) for n in NAMES}
        return dataclasses.replace(self, **tensors)

    def run(self, backend: str) -> Tensor:
        return group_norm(
            self.x, self.num_groups, self.weight, self.bias, self.eps, activation="silu" if self.silu else None,
            scale=self.scale, shift=self.shift, backend=backend,
        )  # fmt: skip

    def gradients(self, backend: str, dy: Tensor) -> dict[str, Tensor]:
        present = {n: t for n in NAMES if (t := getattr(self, n)) is not None}
        leaves = {n: t.detach().requires_grad_() for n, t in present.items()}
        y = dataclasses.replace(self, **leaves).run(backend)
        return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)), strict=True))


def in_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "first":
        return x.contiguous()
    if layout == "last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert layout == "strided"
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
    wide[..., 1::2] = x
    return wide[..., 1::2]


def make_case(
    shape: tuple[int, ...], num_groups: int, dtype: torch.dtype, layout: str = "last", *,
    affine: bool = True, scale_shift: bool = True, silu: bool = True,
) -> Case:  # fmt: skip
    x = in_layout((torch.randn(shape) * 2 + 0.7).to(dtype), layout)
    channels, per_image = (shape[1],), shape[:2]
    return Case(
        x,
        num_groups,
        weight=(1 + 0.3 * torch.randn(channels)).to(dtype) if affine else None,
        bias=(0.3 * torch.randn(channels)).to(dtype) if affine else None,
        scale=(0.3 * torch.randn(per_image)).to(dtype) if scale_shift else None,
        shift=(0.3 * torch.randn(per_image)).to(dtype) if scale_shift else None,
        silu=silu,
    )


def terms(case: Case, dy: Tensor) -> dict[str, Tensor]:
    """The size of the terms that each result sums up; a small group cancels to nearly nothing, for every method.

    x̂ counts as the difference that it is. A parameter's terms count twice: each is a rounded product itself.
    """
    case, dy = case.converted(torch.float64), dy.double()
    x = case.x.reshape(*case.x.shape[:2], -1)
    grouped = x.reshape(x.shape[0], case.num_groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    rstd = (grouped.var(-1, correction=0, keepdim=True) + case.eps).rsqrt()
    xhat = ((grouped - mean) * rstd).reshape(x.shape)
    size = ((grouped.abs() + mean.abs()) * rstd).reshape(x.shape)
    rstd = rstd.expand(grouped.shape).reshape(x.shape)

    def along(value: Tensor | None, default: float) -> Tensor:
        value = torch.tensor([[default]], dtype=torch.float64) if value is None else value
        return (value if value.dim() == 2 else value[None])[..., None]

    weight, bias, factor, shift = (
        along(case.weight, 1), along(case.bias, 0), 1 + along(case.scale, 0), along(case.shift, 0)
    )  # fmt: skip
    z = ((xhat * weight + bias) * factor + shift).requires_grad_()
    y = F.silu(z) if case.silu else z * 1
    size_z = size * (weight * factor).abs() + (bias * factor).abs() + shift.abs()
    (dz,) = torch.autograd.grad(y, z, dy.reshape(x.shape), create_graph=case.silu)
    (change,) = torch.autograd.grad(dz.sum(), z) if case.silu else (torch.zeros_like(dz),)
    dz = dz.detach().abs() + (change * size_z).abs()  # what rounding z does to dz
    dnorm = (dz * factor).abs()
    return {
        "y": size_z,
        "x": dnorm * weight.abs() * rstd * (1 + size * xhat.abs()),
        "weight": 2 * (dnorm * size).sum((0, 2)),
        "bias": 2 * dnorm.sum((0, 2)),
        "scale": 2 * (dz * (size * weight.abs() + bias.abs())).sum(2),
        "shift": 2 * dz.sum(2),
    }


def check(case: Case, backend: str = "cpu", *, backward: bool = True) -> None:
    """Forward and backward of one case stay within the budget, and y and dx lie as x does."""
    exact_case = case.converted(torch.float64)
    y = case.run(backend)
    dy = torch.randn_like(y)
    sizes = terms(case, dy)
    assert_within_budget(y, case.run("torch"), exact_case.run("torch"), magnitude=sizes["y"], what="y")
    if not backward:
        return
    actual, eager = case.gradients(backend, dy), case.gradients("torch", dy)
    exact = exact_case.gradients("torch", dy.double())
    for name, value in actual.items():
        assert value.shape == getattr(case, name).shape
        assert_within_budget(value, eager[name], exact[name], magnitude=sizes[name], what=f"d{name}")


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("layout", ["first", "last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_fp64(backend: str, dtype: torch.dtype, layout: str, silu: bool) -> None:
    for shape, groups in [
        ((2, 320, 16, 12), 32),
        ((3, 96, 50), 8),
        ((1, 2560, 5, 4), 32),
        ((4, 24, 2, 3, 5), 4),
    ]:
        check(make_case(shape, groups, dtype, layout, silu=silu), backend)
        check(make_case(shape, groups, dtype, layout, silu=silu, affine=False, scale_shift=False), backend)


@needs_kernel
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_are_merged(dtype: torch.dtype, layout: str) -> None:
    """Several tiles for an image, the last one shorter, and several strips of channels."""
    check(make_case((2, 64, 37, 41), 32, dtype, layout))
    check(make_case((1, 1100, 11, 7), 11, dtype, layout))
    check(make_case((1, 2, 150, 301), 1, dtype, layout))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_result_larger_than_the_caches(dtype: torch.dtype) -> None:
    """It is stored past them, and read by other threads than those that wrote it."""
    size = (727, 733) if dtype == torch.float32 else (1021, 1031)
    x = torch.randn(1, 32, *size).to(dtype, memory_format=torch.channels_last)
    assert x.nbytes >= 1 << 26
    dy = torch.randn_like(x)

    def run(norm: Callable[[Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaf = x.detach().to(dtype).requires_grad_()
        y = norm(leaf)
        return [y.detach(), *torch.autograd.grad(y, leaf, dy.to(dtype))]

    actual = run(lambda x: group_norm(x, 4, activation="silu", backend="cpu"), dtype)
    eager, exact = (run(lambda x: F.silu(F.group_norm(x, 4)), of) for of in (dtype, torch.float64))
    for name, *each in zip(("y", "dx"), actual, eager, exact, strict=True):
        assert_within_budget(*each, what=f"large {name}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_the_parameters_alone(backend: str) -> None:
    """torch's kernel for channels_last crashes without one of x, and another wants a weight with the bias."""
    weight, bias = (torch.randn(64, requires_grad=True) for _ in range(2))
    for case in ((False, weight), (True, None), (False, None)):
        x = torch.randn(2, 64, 16, 16).to(memory_format=torch.channels_last).requires_grad_(case[0])
        y = group_norm(x, 8, case[1], bias, backend=backend)
        dy = torch.randn_like(y)
        y.backward(dy)
        actual, bias.grad = bias.grad, None
        torch.testing.assert_close(actual, dy.sum((0, 2, 3)))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_shapes(dtype: torch.dtype) -> None:
    sizes = (1, 2, 7, 8, 9, 17)
    for channels in range(1, 18):
        height, width = sizes[channels % 6], sizes[channels // 3]
        for groups in (g for g in range(1, channels + 1) if channels % g == 0):
            for layout in ("first", "last"):
                check(make_case((2, channels, height, width), groups, dtype, layout))


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    case = make_case(shape, 2, torch.float32, "first")
    gradients = case.gradients("cpu", torch.empty(shape))
    assert case.run("cpu").shape == gradients["x"].shape == shape
    assert all(not gradients[name].any() for name in NAMES)


@st.composite
def strided_cases(draw: st.DrawFn) -> Case:
    """Any rank from 2 to 5, memory in any order of the axes, cut out of a larger tensor full of NaN."""
    rank = draw(st.integers(2, 5))
    groups, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    shape = [draw(st.integers(1, 3)), groups * width, *(draw(st.integers(1, 6)) for _ in range(rank - 2))]
    order = draw(st.permutations(range(rank)))
    margins = [draw(st.integers(0, 2)) for _ in range(rank)]
    steps = [draw(st.integers(1, 2)) for _ in range(rank)]
    dtype = draw(st.sampled_from(DTYPES))
    memory = torch.full([margins[a] + shape[a] * steps[a] for a in order], float("nan"), dtype=dtype)
    box = memory.permute([order.index(a) for a in range(rank)])
    x = box[tuple(slice(margins[a], margins[a] + shape[a] * steps[a], steps[a]) for a in range(rank))]
    torch.manual_seed(draw(st.integers(0, 1000)))
    x.copy_(torch.randn(shape) * 2 + 1)
    flags = {name: draw(st.booleans()) for name in ("affine", "scale_shift", "silu")}
    return dataclasses.replace(make_case(tuple(shape), groups, dtype, **flags), x=x)


@needs_kernel
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=strided_cases())
def test_any_shape_and_strides(case: Case) -> None:
    check(case)


@needs_kernel
@pytest.mark.parametrize("layout", ["first", "last"])
def test_large_mean(layout: str) -> None:
    case = make_case((2, 64, 24, 24), 8, torch.float32, layout, silu=False, scale_shift=False)
    case.x += 1e4
    check(case, backward=False)
    # Beyond the budget, which takes 1e4 for the size of the terms: as if the mean were not there.
    error = relative_error(case.run("cpu"), case.converted(torch.float64).run("torch"))
    assert error < 4 * torch.finfo(torch.float32).eps


@needs_kernel
@pytest.mark.parametrize("layout", ["first", "last"])
def test_outliers_among_the_first_pixels(layout: str) -> None:
    """The first pixels, which center the sums, say nothing about the others."""
    case = make_case((1, 32, 40, 40), 4, torch.float32, layout, silu=False)
    case.x[:, ::3, 0, :3] = 3e4
    check(case)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_far_from_zero(dtype: torch.dtype) -> None:
    """Saturated in both directions; the exponential overflows and underflows."""
    case = make_case((1, 8, 16, 16), 2, dtype, scale_shift=False)
    case.weight = torch.full((8,), 3e4, dtype=dtype)
    check(case)


@needs_kernel
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_stay_in_their_group(value: float, dtype: torch.dtype, layout: str) -> None:
    case = make_case((2, 12, 9, 5), 3, dtype, layout)
    case.x[1, 5, 3, 2] = value
    y = case.run("cpu")
    assert torch.equal(y.isnan(), case.run("torch").isnan())
    assert y[1, 4:8].isnan().all() and int(y.isnan().sum()) == 4 * 9 * 5


@needs_kernel
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", ["first", "last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_is_written(dtype: torch.dtype, layout: str) -> None:
    check(make_case((2, 33, 7, 5), 3, dtype, layout))
    check(make_case((2, 64, 31, 33), 32, dtype, layout))


@needs_kernel
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_and_guarded(dtype: torch.dtype, layout: str) -> None:
    """Views one element off any alignment; what lies beside them is NaN and is neither read nor written."""
    case = make_case((2, 20, 5, 7), 4, dtype, layout)
    memory = torch.full((case.x.numel() + 2,), float("nan"), dtype=dtype)
    x = memory[1:-1].as_strided(case.x.shape, case.x.stride(), 1)
    x.copy_(case.x)
    guarded = dataclasses.replace(case, x=x)
    check(guarded)
    assert torch.equal(guarded.run("cpu"), case.run("cpu"))
    assert memory[[0, -1]].isnan().all()


@needs_kernel
def test_memory_format_is_kept() -> None:
    x = torch.randn(2, 8, 4, 6)
    views = [
        x, in_layout(x, "last"), torch.randn(2, 5, 8).mT, torch.randn(2, 3, 4, 6, 8).movedim(-1, 1),
        torch.randn(2, 8, 1, 1), torch.randn(16).as_strided((2, 8, 1, 1), (8, 1, 77, 5)),
    ]  # fmt: skip
    for view in views:
        view = view.detach().requires_grad_()
        y = group_norm(view, 4, backend="cpu")
        (dx,) = torch.autograd.grad(y, view, torch.ones(y.shape))
        assert y.stride() == view.stride() and dx.stride() == view.stride()
    assert group_norm(x[..., ::2], 4, backend="cpu").is_contiguous()


@needs_kernel
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_fp32_parameters_with_a_half_precision_input(dtype: torch.dtype) -> None:
    case = make_case((2, 32, 8, 8), 8, dtype)
    parameters = {n: torch.randn_like(getattr(case, n), dtype=torch.float32) for n in NAMES[1:]}
    check(dataclasses.replace(case, **parameters))


@needs_kernel
def test_threads_do_not_change_a_bit() -> None:
    for shape, layout in [((2, 96, 40, 40), "last"), ((3, 96, 40, 40), "first"), ((1, 64, 70, 71), "last")]:
        case = make_case(shape, 32, torch.float32, layout)
        dy = torch.randn_like(case.x)
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append([case.run("cpu"), *case.gradients("cpu", dy).values()])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernel
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa: str) -> None:
    """The libraries of lesser CPUs, on this one."""
    code = """
        import test_group_norm as t
        for dtype in t.DTYPES:
            t.test_odd_shapes(dtype)
            t.test_silu_far_from_zero(dtype)
            for layout in ("first", "last"):
                t.test_tiles_are_merged(dtype, layout)
                for value in (float("nan"), float("inf")):
                    t.test_non_finite_values_stay_in_their_group(value, dtype, layout)
    """
    run_with_library(isa, code)
