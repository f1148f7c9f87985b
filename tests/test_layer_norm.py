"""layer_norm: every backend against the formula in fp64, and what the compiled kernels promise beyond it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_with_library
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops import layer_norm
from sdfast.ops.layer_norm import layer_norm_reference, layer_norm_torch
from sdfast.testing import assert_within_budget, relative_error

HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF_DTYPES)
NAMES = ("x", "weight", "bias")

has_kernel = _library.has_kernel("layer_norm_forward", "cpu")
needs_kernel = pytest.mark.skipif(not has_kernel, reason=_library.load_cpu_library().detail)
BACKENDS = ("reference", "torch", pytest.param("cpu", marks=needs_kernel))


@dataclasses.dataclass
class Case:
    """Arguments of one call; an absent one is None."""

    x: Tensor
    axes: int = 1
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[self.x.dim() - self.axes :])

    def converted(self, dtype: torch.dtype) -> Case:
        tensors = {n: None if (t := getattr(self, n)) is None else t.detach().to(dtype) for n in NAMES}
        return dataclasses.replace(self, **tensors)

    def run(self, backend: str | None) -> Tensor:
        return layer_norm(self.x, self.shape, self.weight, self.bias, self.eps, backend=backend)

    def gradients(self, backend: str, dy: Tensor) -> dict[str, Tensor]:
        present = {n: t for n in NAMES if (t := getattr(self, n)) is not None}
        leaves = {n: t.detach().requires_grad_() for n, t in present.items()}
        y = dataclasses.replace(self, **leaves).run(backend)
        return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)), strict=True))


def strided(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
    wide[..., 1::2] = x
    return wide[..., 1::2]


def make_case(
    shape: tuple[int, ...], dtype: torch.dtype, axes: int = 1, *, weight: bool = True, bias: bool = True
) -> Case:
    normalized = shape[len(shape) - axes :]
    return Case(
        (torch.randn(shape) * 2 + 0.7).to(dtype),
        axes,
        weight=(1 + 0.3 * torch.randn(normalized)).to(dtype) if weight else None,
        bias=(0.3 * torch.randn(normalized)).to(dtype) if bias else None,
    )


def terms(case: Case, dy: Tensor) -> dict[str, Tensor]:
    """The size of the terms that each result sums up; x̂ counts as the difference that it is.

    A parameter's terms count twice: each is a rounded product itself.
    """
    case, dy = case.converted(torch.float64), dy.double()
    width = math.prod(case.shape)
    x, dy = case.x.reshape(-1, width), dy.reshape(-1, width)
    mean = x.mean(1, keepdim=True)
    rstd = (x.var(1, correction=0, keepdim=True) + case.eps).rsqrt()
    size = (x.abs() + mean.abs()) * rstd
    xhat = (x - mean) * rstd
    weight = torch.ones(width) if case.weight is None else case.weight.reshape(-1).abs()
    bias = torch.zeros(width) if case.bias is None else case.bias.reshape(-1).abs()
    return {
        "y": size * weight + bias,
        "x": dy.abs() * weight * rstd * (1 + size * xhat.abs()),
        "weight": 2 * (dy.abs() * size).sum(0),
        "bias": 2 * dy.abs().sum(0),
    }


def check(case: Case, backend: str = "cpu") -> None:
    """Forward and backward of one case stay within the budget, and y and dx are contiguous."""
    exact_case = case.converted(torch.float64)
    y = case.run(backend)
    dy = torch.randn_like(y)
    sizes = terms(case, dy)
    assert_within_budget(y, case.run("torch"), exact_case.run("torch"), magnitude=sizes["y"], what="y")
    actual, eager = case.gradients(backend, dy), case.gradients("torch", dy)
    exact = exact_case.gradients("torch", dy.double())
    for name, value in actual.items():
        assert value.shape == getattr(case, name).shape
        assert_within_budget(value, eager[name], exact[name], magnitude=sizes[name], what=f"d{name}")
    if backend == "cpu":
        assert y.is_contiguous() and actual["x"].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_fp64(backend: str, dtype: torch.dtype) -> None:
    for shape, axes in [
        ((2, 77, 768), 1),
        ((2, 300, 64), 1),
        ((3, 5, 7, 12), 2),
        ((2, 3, 4, 5), 4),
        ((9,), 1),
    ]:
        check(make_case(shape, dtype, axes), backend)
        check(make_case(shape, dtype, axes, weight=False, bias=False), backend)
        check(make_case(shape, dtype, axes, bias=False), backend)
        check(make_case(shape, dtype, axes, weight=False), backend)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_are_merged(dtype: torch.dtype) -> None:
    """Several blocks of rows for dweight and dbias, the last one shorter, and several strips of a row."""
    check(make_case((2, 391, 320), dtype))
    check(make_case((37, 5003), dtype))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_shapes(dtype: torch.dtype) -> None:
    for width in range(1, 71):
        check(make_case((1 + width % 7, width), dtype))


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    case = make_case(shape, torch.float32)
    gradients = case.gradients("cpu", torch.empty(shape))
    assert case.run("cpu").shape == gradients["x"].shape == shape
    assert all(not gradients[name].any() for name in NAMES)


@st.composite
def strided_cases(draw: st.DrawFn) -> Case:
    """Any rank from 1 to 4, memory in any order of the axes, cut out of a larger tensor full of NaN."""
    rank = draw(st.integers(1, 4))
    shape = [draw(st.integers(1, 6)) for _ in range(rank - 1)] + [draw(st.integers(2, 40))]
    order = draw(st.permutations(range(rank)))
    margins = [draw(st.integers(0, 2)) for _ in range(rank)]
    steps = [draw(st.integers(1, 2)) for _ in range(rank)]
    dtype = draw(st.sampled_from(DTYPES))
    memory = torch.full([margins[a] + shape[a] * steps[a] for a in order], float("nan"), dtype=dtype)
    box = memory.permute([order.index(a) for a in range(rank)])
    x = box[tuple(slice(margins[a], margins[a] + shape[a] * steps[a], steps[a]) for a in range(rank))]
    torch.manual_seed(draw(st.integers(0, 1000)))
    x.copy_(torch.randn(shape) * 2 + 1)
    flags = {name: draw(st.booleans()) for name in ("weight", "bias")}
    return dataclasses.replace(make_case(tuple(shape), dtype, draw(st.integers(1, rank)), **flags), x=x)


@needs_kernel
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=strided_cases())
def test_any_shape_and_strides(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_mean(backend: str) -> None:
    """As if the mean were not there: the budget takes 1e4 for the size of the terms."""
    case = make_case((40, 640), torch.float32)
    case.x += 1e4
    error = relative_error(case.run(backend), case.converted(torch.float64).run("torch"))
    assert error < (4e-7 if backend == "cpu" else 1e-3)


@needs_kernel
def test_outliers_among_the_first_elements() -> None:
    """The first elements, which center the sums, say nothing about the others."""
    case = make_case((12, 320), torch.float32)
    case.x[:, :5] = 3e4 * (1 + torch.rand(12, 5))
    check(case)
    case.x[:] = 123.456  # constant: the variance is zero, and never below
    assert torch.allclose(case.run("cpu"), case.bias.expand(case.x.shape), atol=1e-2)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_stay_in_their_row(value: float, dtype: torch.dtype) -> None:
    for column in (0, 17, 69):
        case = make_case((6, 70), dtype)
        case.x[4, column] = value
        y = case.run("cpu")
        assert torch.equal(y.isnan(), case.run("torch").isnan())
        assert y[4].isnan().all() and int(y.isnan().sum()) == 70


@needs_kernel
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_is_written(dtype: torch.dtype) -> None:
    for shape in [(7, 33), (300, 320), (5, 4099)]:
        check(make_case(shape, dtype))
        case = make_case(shape, dtype)
        check(dataclasses.replace(case, x=strided(case.x)))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_and_guarded(dtype: torch.dtype) -> None:
    """Views one element off any alignment; what lies beside them is NaN and is neither read nor written."""
    case = make_case((5, 83), dtype)
    memory = torch.full((case.x.numel() + 2,), float("nan"), dtype=dtype)
    x = memory[1:-1].view(case.x.shape)
    x.copy_(case.x)
    guarded = dataclasses.replace(case, x=x)
    check(guarded)
    assert torch.equal(guarded.run("cpu"), case.run("cpu"))
    assert memory[[0, -1]].isnan().all()


@needs_kernel
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_fp32_parameters_with_a_half_precision_input(dtype: torch.dtype) -> None:
    case = make_case((9, 96), dtype)
    check(dataclasses.replace(case, weight=torch.randn(96), bias=torch.randn(96)))
    mixed = dataclasses.replace(case, weight=torch.randn(96))
    for backend in ("reference", "torch", "cpu"):
        assert mixed.run(backend).dtype == dtype


@needs_kernel
@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("given", ["weight", "bias", "both", "neither"])
def test_gradients_of_any_parameters(given: str, backend: str | None) -> None:
    """torch does not find those of an fp32 bias alone."""
    x = torch.randn(6, 64).bfloat16().requires_grad_()
    names = {"both": ("weight", "bias"), "neither": ()}.get(given, (given,))
    parameters = {name: torch.randn(64, requires_grad=True) for name in names}
    dy = torch.randn(6, 64).bfloat16()
    layer_norm(x, (64,), **parameters, backend=backend).backward(dy)

    wide = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    exact = x.detach().double().requires_grad_()
    layer_norm_torch(exact, (64,), **wide).backward(dy.double())
    for actual, expected in ((x, exact), *((parameters[name], wide[name]) for name in names)):
        assert relative_error(actual.grad, expected.grad) < 1e-2


def test_threads_do_not_change_a_bit() -> None:
    for shape in [(2, 1024, 320), (70, 1280), (3, 70000)]:
        case = make_case(shape, torch.float32)
        dy = torch.randn_like(case.x)
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append([case.run("cpu"), *case.gradients("cpu", dy).values()])
        torch.set_num_threads(1)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernel
def test_opcheck() -> None:
    for dtype, present in [(torch.float32, True), (torch.bfloat16, False)]:
        case = make_case((4, 5, 12), dtype, 2, weight=present, bias=present)
        for x in (case.x, strided(case.x)):
            forward = (x, 2, case.weight, case.bias, 1e-5)
            torch.library.opcheck(torch.ops.sdfast.layer_norm, forward)
            torch.library.opcheck(torch.ops.sdfast.layer_norm_forward, forward)
            y, mean, rstd = torch.ops.sdfast.layer_norm_forward(*forward)
            assert torch.equal(torch.ops.sdfast.layer_norm(*forward), y)
            backward = (torch.randn_like(y), x, mean, rstd, 2, case.weight, case.bias)
            torch.library.opcheck(torch.ops.sdfast.layer_norm_backward, backward)


@needs_kernel
def test_what_is_unsafe_is_refused_by_the_operation_itself() -> None:
    x, op = torch.randn(2, 8), torch.ops.sdfast.layer_norm
    for arguments in [(x, 0), (x, 3), (x.double(), 1), (x, 1, torch.ones(7)), (x, 1, torch.ones(2, 8))]:
        with pytest.raises(RuntimeError):
            op(*arguments, *(None,) * (4 - len(arguments)), 1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch", None])
def test_gradcheck_in_fp64(backend: str | None) -> None:
    inputs = [torch.randn(shape).double().requires_grad_() for shape in [(3, 2, 4), (2, 4), (2, 4)]]

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x, (2, 4), weight, bias, backend=backend)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@needs_kernel
def test_compiles_to_one_graph() -> None:
    case = make_case((1100, 256), torch.float32)  # large enough for the kernel to serve its training
    torch._dynamo.reset()

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return layer_norm(x * 2, (256,), weight, case.bias) + 1

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = []
    for function in (call, compiled):
        x, weight = case.x.detach().requires_grad_(), case.weight.detach().requires_grad_()
        y = function(x, weight)
        results.append((y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    with torch.no_grad():
        assert torch.equal(compiled(case.x, case.weight), results[0][0])


@needs_kernel
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa: str) -> None:
    """The libraries of lesser CPUs, on this one."""
    code = """
        import test_layer_norm as t
        t.test_large_mean("cpu")
        t.test_outliers_among_the_first_elements()
        for dtype in t.DTYPES:
            t.test_odd_shapes(dtype)
            t.test_blocks_are_merged(dtype)
            for value in (float("nan"), float("inf")):
                t.test_non_finite_values_stay_in_their_row(value, dtype)
    """
    run_with_library(isa, code)


def test_errors_name_the_argument() -> None:
    x, half = torch.randn(2, 8), torch.ones(8, dtype=torch.bfloat16)
    wrong: list[tuple[type[Exception], str, tuple[object, ...], dict[str, object]]] = [
        (TypeError, "x: got list", ([1.0], (8,)), {}),
        (TypeError, "x: got dtype torch.int64", (torch.ones(2, 8, dtype=torch.int64), (8,)), {}),
        (ValueError, r"normalized_shape: got \(4,\), expected the last sizes of x", (x, (4,)), {}),
        (ValueError, r"normalized_shape: got \(\)", (x, ()), {}),
        (ValueError, r"weight: got shape \(4,\), expected \(8,\)", (x, (8,), torch.ones(4)), {}),
        (TypeError, "weight: got dtype torch.bfloat16, expected torch.float32", (x, (8,), half), {}),
        (
            TypeError, "bias: got dtype torch.float16, expected torch.bfloat16 or torch.float32",
            (x.bfloat16(), (8,), None, half.half()), {},
        ),
        (TypeError, "bias: got dtype torch.float32, expected torch.float64", (x.double(), (8,), None, x[0]), {}),
        (ValueError, "weight: is on meta, expected cpu", (x, (8,), torch.ones(8, device="meta")), {}),
        (ValueError, "backend: got 'fast'", (x, (8,)), {"backend": "fast"}),
        (ValueError, "backend 'cpu' cannot run: x is float64", (x.double(), (8,)), {"backend": "cpu"}),
        (ValueError, "layer_norm: backend 'cuda' cannot run: ", (x, (8,)), {"backend": "cuda"}),
    ]  # fmt: skip
    if not has_kernel:
        wrong = [entry for entry in wrong if entry[3].get("backend") != "cpu"]
    for error, message, args, kwargs in wrong:
        with pytest.raises(error, match=message):
            layer_norm(*args, **kwargs)  # type: ignore[arg-type]


def test_defaults_to_the_formula_of_torch() -> None:
    x = torch.randn(2, 64, dtype=torch.float64)
    assert torch.equal(layer_norm(x, (64,)), F.layer_norm(x, (64,)))
    assert torch.equal(layer_norm_reference(x, (64,)), F.layer_norm(x, (64,)))
    with dispatch.use_backend("reference"):
        assert torch.equal(layer_norm(x, (64,)), layer_norm_torch(x, (64,)))


def test_transforms_get_the_gradient_of_torch() -> None:
    """torch.func and forward-mode AD cannot see through a compiled kernel: torch has to serve them."""
    x, tangent = torch.randn(2, 64), torch.randn(2, 64)

    def normalise(x: Tensor, backend: str | None = None) -> Tensor:
        return layer_norm(x, (64,), backend=backend)

    expected = torch.func.jvp(lambda x: normalise(x, "torch"), (x,), (tangent,))[1]
    assert torch.equal(torch.func.jvp(normalise, (x,), (tangent,))[1], expected)
    gradient = torch.func.grad(lambda x: normalise(x).pow(3).sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: normalise(x, "torch").pow(3).sum())(x))
