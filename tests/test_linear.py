"""linear on CPU against fp64: shapes, strides, activations, threads, instruction sets; copies that follow the weight."""

from __future__ import annotations

import pytest
import torch
from processes import run_with_library
from torch import Tensor
from weight_changes import CHANGES, change_weight

from sdfast import _library, ops
from sdfast.ops.linear import ACTIVATIONS, linear_torch
from sdfast.testing import assert_within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 2, 1), (5, 6, 3), (13, 34, 7), (77, 40, 33), (100, 64, 320), (60, 96, 1300), (30, 48, 5200))
FEW_TOKENS = ((3, 52, 4101), (6, 98, 64), (8, 34, 70))  # the first in several chains of additions
CROWDED = ((40, 54, 1024), (33, 34, 4096), (20, 1024, 40))  # rows that are a way of the L1 cache apart
needs_kernel = pytest.mark.skipif(
    not _library.has_kernel("linear_rows", "cpu"), reason=_library.load_cpu_library().detail
)
pytestmark = [needs_kernel, pytest.mark.usefixtures("exact_numerics")]


def make(tokens: int, rows: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and residual."""
    weight = torch.randn(rows, k) / k**0.5
    values = (torch.randn(tokens, k), weight, torch.randn(rows), torch.randn(tokens, rows))
    return tuple(value.to(dtype) for value in values)  # type: ignore[return-value]


def many_tokens(dtype: torch.dtype) -> tuple[int, int, int]:
    """So many that the weight is packed for all of them, here in two blocks; K is odd."""
    return (2900, 1090, 2001) if dtype is torch.bfloat16 else (2900, 1090, 1001)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None):
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    exact = linear_torch(*wide[:3], activation=activation, residual=wide[3])
    eager = linear_torch(x, weight, bias, activation=activation, residual=residual)
    actual = ops.linear(x, weight, bias, activation=activation, residual=residual, backend="cpu")
    assert actual.shape == eager.shape and actual.is_contiguous()
    assert_within_budget(actual, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shapes(activation: str | None, dtype: torch.dtype) -> None:
    for tokens, rows, k in (*SHAPES, *FEW_TOKENS, *CROWDED):
        x, weight, bias, residual = make(tokens, rows, k, dtype)
        check(x, weight, bias, residual, activation)
        check(x, weight, None, None, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "geglu"])
def test_many_tokens(activation: str | None, dtype: torch.dtype) -> None:
    check(*make(*many_tokens(dtype), dtype), activation)
    check(*make(262144 if dtype is torch.float32 else 524288, 64, 6, dtype), activation)  # past the caches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype) -> None:
    x, weight, bias, residual = make(24, 34, 18, dtype)
    padded = torch.full((24, 21), float("nan"), dtype=dtype)
    padded[:, 1:19] = x
    check(padded[:, 1:19], weight, bias, residual, None)  # misaligned rows, an odd stride apart
    check(x.t().contiguous().t(), weight.t().contiguous().t(), bias, residual, None)
    check(x.view(2, 3, 4, 18), weight[:, :, None, None], bias, residual.view(2, 3, 4, 34), "silu")
    check(x.view(4, 6, 18).transpose(0, 1), weight, bias, residual.view(4, 6, 34).transpose(0, 1), None)
    check(x[:1].expand(24, 18), weight, bias[:1].expand(34), residual[:1].expand(24, 34), "gelu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_left_unwritten(dtype: torch.dtype, poisoned_memory: None) -> None:
    for tokens, rows, k in SHAPES[:5]:
        x, weight, bias, _ = make(tokens, rows, k, dtype)
        assert ops.linear(x, weight, bias, backend="cpu").isfinite().all()
        assert ops.linear(x, weight, bias, activation="geglu", backend="cpu").isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_row(value: float, dtype: torch.dtype) -> None:
    for tokens in (6, 9):
        x, weight, bias, _ = make(tokens, 34, 7, dtype)
        clean = ops.linear(x, weight, bias, backend="cpu")
        x[4, 6] = value
        y = ops.linear(x, weight, bias, backend="cpu")
        assert not y[4].isfinite().any()
        assert torch.equal(y[:4], clean[:4]) and torch.equal(y[5:], clean[5:])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    for tokens, rows, k in ((300, 96, 64), (100, 640, 320), (7, 320, 2700), many_tokens(dtype)):
        x, weight, bias, residual = make(tokens, rows, k, dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.linear(x, weight, bias, activation="geglu", residual=residual, backend="cpu"))
        torch.set_num_threads(1)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_activations_far_from_zero() -> None:
    values = torch.cat([torch.linspace(-30, 30, 20001), torch.tensor([-1e30, 1e30, float("inf")])])[:, None]
    for activation, function in (
        ("silu", torch.nn.functional.silu),
        ("gelu", torch.nn.functional.gelu),
        ("quick_gelu", lambda v: v * torch.sigmoid(1.702 * v)),
    ):
        y = ops.linear(values, torch.ones(1, 1), activation=activation, backend="cpu")
        exact = function(values.double())
        assert y[-1].item() == float("inf")
        torch.testing.assert_close(y[:-1].double(), exact[:-1], rtol=5e-7, atol=1e-6)


@pytest.mark.parametrize("change", CHANGES)
def test_the_copy_follows_the_weight(change: str) -> None:
    layer = torch.nn.Linear(40, 36)
    x = torch.randn(8, 40)

    def run() -> Tensor:
        with torch.no_grad():
            return ops.linear(x, layer.weight, layer.bias, backend="cpu")

    before = run()
    assert torch.equal(before, run())
    change_weight(layer, change, x)
    assert not torch.allclose(before, run())
    torch.testing.assert_close(run(), layer(x).detach())


def test_compiles_whole() -> None:
    x, weight, bias, residual = make(20, 36, 24, torch.float32)

    def run(x: Tensor) -> Tensor:
        return ops.linear(x.view(4, 5, 24), weight, bias, activation="geglu") * 2

    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        assert torch.equal(torch.compile(run, fullgraph=True, backend=keep)(x), run(x))
    assert any(node.target is torch.ops.sdfast.linear_rows.default for node in graphs[0].graph.nodes)


def test_opcheck() -> None:
    x, weight, bias, residual = make(6, 34, 7, torch.float32)
    torch.library.opcheck(torch.ops.sdfast.linear_rows, (x, weight, bias, residual, 1))
    wide = (x[None], weight[:, :, None, None], bias, residual[None], 1)
    torch.library.opcheck(torch.ops.sdfast.linear_rows, wide)


def test_unavailable_says_why() -> None:
    x, weight, bias, _ = make(6, 34, 7, torch.float32)
    with pytest.raises(ValueError, match="empty"):
        ops.linear(x[:0], weight, bias, backend="cpu")
    with pytest.raises(ValueError, match="float64"):
        ops.linear(x.double(), weight.double(), bias.double(), backend="cpu")


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa: str) -> None:
    run_with_library(isa, """
        import test_linear as t
        for dtype in t.DTYPES:
            for activation in t.ACTIVATIONS:
                t.test_shapes(activation, dtype)
            t.test_many_tokens(None, dtype)
            t.test_strides(dtype)
            t.test_non_finite_values_stay_in_their_row(float("nan"), dtype)
        t.test_activations_far_from_zero()
    """)  # fmt: skip
