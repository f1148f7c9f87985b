"""What every kernel of layer_norm for a GPU has to do, `backend` on the device `where`."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from test_layer_norm import NAMES, Case, make_case, strided, terms
from torch import Tensor

from sdfast.ops import layer_norm
from sdfast.testing import assert_within_budget

OPS = torch.ops.sdfast


def on_device(case: Case, where: str) -> Case:
    return dataclasses.replace(
        case, **{n: None if (t := getattr(case, n)) is None else t.to(where) for n in NAMES}
    )


def within_budget(
    case: Case, backend: str, where: str, otherwise: contextlib.AbstractContextManager[None] | None = None
) -> None:
    """Within the budget of eager on the CPU, contiguous, and the same bits again, even `otherwise`."""
    given, exact_case = on_device(case, where), case.converted(torch.float64)
    y = given.run(backend)
    dy = torch.randn(y.shape).to(y.dtype)
    sizes = terms(case, dy)
    assert_within_budget(y.cpu(), case.run("torch"), exact_case.run("torch"), magnitude=sizes["y"], what="y")
    actual = given.gradients(backend, dy.to(where))
    with otherwise or contextlib.nullcontext():
        again = given.gradients(backend, dy.to(where))
        assert torch.equal(given.run(backend), y)
    eager, exact = case.gradients("torch", dy), exact_case.gradients("torch", dy.double())
    for name, value in actual.items():
        assert value.shape == getattr(case, name).shape and torch.equal(value, again[name])
        assert_within_budget(value.cpu(), eager[name], exact[name], magnitude=sizes[name], what=f"d{name}")
    assert y.is_contiguous() and actual["x"].is_contiguous()


def non_finite_values_stay_in_their_row(value: float, width: int, backend: str, where: str) -> None:
    case = on_device(make_case((5, width), torch.float16), where)
    case.x[3, 7] = value
    y = case.run(backend)
    assert y[3].isnan().all() and int(y.isnan().sum()) == width


def empty(shape: tuple[int, ...], backend: str, where: str) -> None:
    """An empty result, and gradients of zero."""
    case = on_device(make_case(shape, torch.float32), where)
    gradients = case.gradients(backend, torch.empty(shape, device=where))
    assert case.run(backend).shape == gradients["x"].shape == shape
    assert all(not gradients[name].any() for name in NAMES)


def opcheck(backend: str, where: str) -> None:
    """Every operator of it by torch.library.opcheck; training's forward gives the same y, and right statistics."""
    for dtype, parameters, view in [(torch.float32, True, False), (torch.bfloat16, False, True)]:
        case = on_device(make_case((2, 3, 8), dtype, 2, weight=parameters, bias=parameters), where)
        x = strided(case.x) if view else case.x
        plain, training, gradient = (
            getattr(OPS, f"layer_norm{name}_{backend}") for name in ("", "_forward", "_backward")
        )
        forward = (x, 2, case.weight, case.bias, 1e-5)
        torch.library.opcheck(plain, forward)
        torch.library.opcheck(training, forward)
        y, mean, rstd = training(*forward)
        assert torch.equal(plain(*forward), y)
        rows = x.reshape(2, 24).double()
        torch.testing.assert_close(mean, rows.mean(1).float())
        torch.testing.assert_close(rstd, (rows.var(1, correction=0) + 1e-5).rsqrt().float())
        torch.library.opcheck(gradient, (torch.randn_like(y), x, mean, rstd, 2, case.weight, case.bias))


def compiles_to_one_graph(backend: str, where: str) -> None:
    torch._dynamo.reset()

    def call(x: Tensor) -> Tensor:
        return layer_norm(x * 2, (24,), backend=backend) + 1

    x = torch.randn(3, 24, device=where)
    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(x), call(x))
