"""group_norm as torch sees it: its operations, its compiler, its transforms, and what is refused."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from processes import run_python
from test_group_norm import NAMES, has_kernel, make_case, needs_kernel
from torch import Tensor

from sdfast import _library, dispatch
from sdfast.ops import group_norm
from sdfast.ops.group_norm import group_norm_reference, group_norm_torch
from sdfast.testing import relative_error


@needs_kernel
@pytest.mark.parametrize("layout", ["first", "last", "strided"])
def test_opcheck(layout: str) -> None:
    for dtype, optional in [(torch.float32, True), (torch.bfloat16, False)]:
        case = make_case((2, 12, 5, 3), 3, dtype, layout, affine=optional, scale_shift=optional)
        last = (case.scale, case.shift)
        forward = (case.x, 3, case.weight, case.bias, 1e-5, True, *last)
        torch.library.opcheck(torch.ops.sdfast.group_norm, forward)
        torch.library.opcheck(torch.ops.sdfast.group_norm_forward, forward)
        y, mean, rstd = torch.ops.sdfast.group_norm_forward(*forward)
        assert torch.equal(torch.ops.sdfast.group_norm(*forward), y)
        backward = (torch.randn_like(y), case.x, mean, rstd, 3, case.weight, case.bias, True, *last)
        torch.library.opcheck(torch.ops.sdfast.group_norm_backward, backward)


def test_gradcheck_in_fp64() -> None:
    case = make_case((2, 6, 3, 2), 3, torch.float64)
    inputs = [getattr(case, name).double().requires_grad_() for name in NAMES]

    def call(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return group_norm(x, 3, weight, bias, activation="silu", scale=scale, shift=shift)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def backend_of_compiler() -> list[object]:
    compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
    return ["aot_eager", pytest.param("inductor", marks=compiler)]


@needs_kernel
@pytest.mark.parametrize("compiler", backend_of_compiler())
def test_compiles_to_one_graph(compiler: str) -> None:
    case = make_case((2, 16, 6, 5), 4, torch.float32)
    torch._dynamo.reset()

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return (
            group_norm(x * 2, 4, weight, case.bias, activation="silu", scale=case.scale, shift=case.shift) + 1
        )

    compiled = torch.compile(call, backend=compiler, fullgraph=True)
    results = []
    for function in (call, compiled):
        x, weight = case.x.detach().requires_grad_(), case.weight.detach().requires_grad_()
        y = function(x, weight)
        results.append((y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(case.x, case.weight), results[0][0])


def test_without_the_compiled_library() -> None:
    output = run_python("""
        import pathlib, torch
        from sdfast import _library
        _library._PACKAGE_DIR = pathlib.Path("nowhere")
        from sdfast.ops import group_norm
        x = torch.randn(2, 8, 4, 4)
        expected = torch.nn.functional.group_norm(x, 2)
        assert torch.equal(group_norm(x, 2), expected)
        compiled = torch.compile(lambda x: group_norm(x, 2), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        try:
            group_norm(x, 2, backend="cpu")
        except ValueError as error:
            print(error)
    """)
    assert "backend 'cpu' cannot run" in output and "was not built" in output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_a_bias_alone_by_torch(dtype: torch.dtype) -> None:
    x, bias = (
        torch.randn(2, 8, 16).bfloat16().requires_grad_(),
        torch.randn(8, dtype=dtype, requires_grad=True),
    )
    dy = torch.randn(2, 8, 16).bfloat16()
    group_norm(x, 2, None, bias, backend="torch").backward(dy)

    exact, wide = (t.detach().double().requires_grad_() for t in (x, bias))
    (F.group_norm(exact, 2) + wide[:, None]).backward(dy.double())
    for actual, expected in ((x, exact), (bias, wide)):
        assert relative_error(actual.grad, expected.grad) < 1e-2


def test_errors_name_the_argument() -> None:
    x = torch.randn(2, 8, 4, 4)
    half = torch.randn(8, dtype=torch.bfloat16)
    wrong: list[tuple[type[Exception], str, tuple[object, ...], dict[str, object]]] = [
        (TypeError, "x: got list", ([1.0], 2), {}),
        (TypeError, "x: got dtype torch.int64", (torch.ones(2, 8, dtype=torch.int64), 2), {}),
        (ValueError, r"x: got shape \(8,\), expected \(N, C, \*\)", (torch.ones(8), 2), {}),
        (ValueError, "num_groups: got 3, expected a divisor of the 8 channels", (x, 3), {}),
        (ValueError, "num_groups: got 0", (x, 0), {}),
        (ValueError, r"weight: got shape \(4,\), expected \(8,\)", (x, 2, torch.ones(4)), {}),
        (TypeError, "weight: got dtype torch.bfloat16, expected torch.float32", (x, 2, half), {}),
        (TypeError, "bias: got dtype torch.float64", (x, 2, None, torch.ones(8, dtype=torch.float64)), {}),
        (ValueError, "weight: is on meta, expected cpu", (x, 2, torch.ones(8, device="meta")), {}),
        (ValueError, r"scale: got shape \(8,\), expected \(2, 8\)", (x, 2), {"scale": torch.ones(8)}),
        (ValueError, "activation: got 'gelu', expected None or 'silu'", (x, 2), {"activation": "gelu"}),
        (ValueError, "backend: got 'fast'", (x, 2), {"backend": "fast"}),
        (ValueError, "backend 'cpu' cannot run: x is float64", (x.double(), 2), {"backend": "cpu"}),
        (ValueError, "backend 'cuda' cannot run", (x, 2), {"backend": "cuda"}),
    ]
    if not has_kernel:
        wrong = [entry for entry in wrong if entry[3].get("backend") != "cpu"]
    for error, message, args, kwargs in wrong:
        with pytest.raises(error, match=message):
            group_norm(*args, **kwargs)  # type: ignore[arg-type]


def test_defaults_to_the_formula_of_torch() -> None:
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(group_norm(x, 2), F.group_norm(x, 2))
    torch.testing.assert_close(group_norm_reference(x, 2, silu=True), F.silu(F.group_norm(x, 2)))
    with dispatch.use_backend("reference"):
        assert torch.equal(group_norm(x, 2), group_norm_torch(x, 2))


def test_transforms_get_the_gradient_of_torch():
    """torch.func and forward-mode AD cannot see through a compiled kernel: torch has to serve them."""
    x, tangent = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)

    def normalise(x, backend=None):
        return group_norm(x, 4, activation="silu", backend=backend)

    expected = torch.func.jvp(lambda x: normalise(x, "torch"), (x,), (tangent,))[1]
    assert torch.equal(torch.func.jvp(normalise, (x,), (tangent,))[1], expected)
    gradient = torch.func.grad(lambda x: normalise(x).square().sum())(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: normalise(x, "torch").square().sum())(x))


def test_the_library_is_there_where_it_is_required():
    if os.environ.get("SDFAST_REQUIRE_NATIVE") != "1":
        pytest.skip("SDFAST_REQUIRE_NATIVE=1 asks for it")
    status = _library.load_cpu_library()
    assert status.loaded, status.detail
