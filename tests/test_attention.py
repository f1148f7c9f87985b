"""attention: every backend against the formula in fp64, and what the compiled kernel promises beyond it."""

from __future__ import annotations

import dataclasses
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from processes import run_with_library
from torch import Tensor

from sdfast import _library
from sdfast.ops import attention
from sdfast.testing import assert_within_budget, error_budget, relative_error

HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF_DTYPES)
HEAD_DIMS = (1, 8, 40, 64, 72, 80, 160, 512)
LENGTHS = (1, 7, 64, 77, 130, 300)

has_kernel = _library.has_kernel("attention_forward", "cpu")
needs_kernel = pytest.mark.skipif(not has_kernel, reason=_library.load_cpu_library().detail)
# What test_tiles.py tests is another kernel, and less exact.
pytestmark = pytest.mark.usefixtures("exact_numerics")
BACKENDS = ("reference", "torch", pytest.param("cpu", marks=needs_kernel))


@dataclasses.dataclass
class Case:
    """Arguments of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    is_causal: bool = False
    scale: float | None = None

    def converted(self, dtype: torch.dtype) -> Case:
        return dataclasses.replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def run(self, backend: str) -> Tensor:
        return attention(
            self.q, self.k, self.v, is_causal=self.is_causal, scale=self.scale, backend=backend
        )  # fmt: skip

    def gradients(self, backend: str, do: Tensor) -> tuple[Tensor, ...]:
        """dq, dk and dv."""
        leaves = [t.detach().requires_grad_() for t in (self.q, self.k, self.v)]
        o = dataclasses.replace(self, **dict(zip("qkv", leaves, strict=True))).run(backend)
        return torch.autograd.grad(o, leaves, do.to(o.dtype))


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x: (B, heads, L, D)."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = x.new_full((*x.shape[:2], 2 * x.shape[2] + 1, x.shape[3] + 3), float("nan"))
    if layout == "odd":  # rows an odd number of elements apart, their beginnings off any alignment
        view = wide[:, :, 1::2, 1 : 1 + x.shape[3]]
    else:
        assert layout == "scattered"  # no unit stride in D
        view = wide.mT.contiguous().mT[:, :, 1::2, 1 : 1 + x.shape[3]]
    return view.copy_(x)


def make_case(
    queries: int, keys: int, head_dim: int, dtype: torch.dtype, layout: str = "transposed", *,
    batch: int = 1, heads: int = 2, is_causal: bool = False, scale: float | None = None,
) -> Case:  # fmt: skip
    def tensor(rows: int) -> Tensor:
        return in_layout(torch.randn(batch, heads, rows, head_dim).to(dtype), layout)

    return Case(tensor(queries), tensor(keys), tensor(keys), is_causal, scale)


def check(case: Case, backend: str = "cpu") -> None:
    """One case stays within the budget. The terms that each result sums up are weight times |value|."""
    exact_case = case.converted(torch.float64)
    size = dataclasses.replace(exact_case, v=exact_case.v.abs()).run("torch")
    actual, eager = case.run(backend), case.run("torch")
    assert_within_budget(actual, eager, exact_case.run("torch"), magnitude=size, what="o")


def gradient_terms(case: Case, do: Tensor) -> tuple[Tensor, ...]:
    """The size of the terms that each element of dq, dk and dv sums up, in fp64."""
    case = case.converted(torch.float64)
    q, k, v, do = case.q, case.k, case.v, do.double()
    scale = q.shape[-1] ** -0.5 if case.scale is None else case.scale
    scores = scale * q @ k.mT
    if case.is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -float("inf"))
    weights = scores.softmax(-1)
    d_weights = do.abs() @ v.abs().mT
    d_scores = abs(scale) * weights * (d_weights + (weights * d_weights).sum(-1, keepdim=True))
    return d_scores @ k.abs(), d_scores.mT @ q.abs(), weights.mT @ do.abs()


def check_gradients(case: Case, backend: str = "cpu", do: Tensor | None = None) -> None:
    """As `check`, of dq, dk and dv."""
    do = torch.randn(case.q.shape).to(case.q.dtype) if do is None else do
    exact = case.converted(torch.float64).gradients("torch", do)
    results = zip("qkv", case.gradients(backend, do), case.gradients("torch", do), exact, strict=True)
    for (name, actual, eager, wanted), size in zip(results, gradient_terms(case, do), strict=True):
        assert actual.shape == getattr(case, name).shape
        if actual.dtype is torch.float32:  # the worst element follows the rounding of one lse: chance
            assert relative_error(actual, wanted, magnitude=size) <= error_budget(
                eager, wanted, magnitude=size
            )
        else:
            assert_within_budget(actual, eager, wanted, magnitude=size, what=f"d{name}")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_fp64(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    for queries in LENGTHS:
        for keys in LENGTHS:
            check(make_case(queries, keys, head_dim, dtype), backend)


@needs_kernel
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "odd", "scattered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    for head_dim in (*range(1, 19), 31, 33, 40, 41, 72):
        case = make_case(35, 79, head_dim, dtype, layout, batch=2)
        check(case)
        dense = Case(case.q.contiguous(), case.k.contiguous(), case.v.contiguous())
        assert torch.equal(case.run("cpu"), dense.run("cpu"))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal(dtype: torch.dtype) -> None:
    """As in torch query i sees the keys up to i; with more queries than keys the last ones see all."""
    for queries, keys in [(77, 77), (1, 5), (130, 300), (300, 130), (64, 64), (7, 1), (520, 520)]:
        check(make_case(queries, keys, 64, dtype, is_causal=True))
        check(make_case(queries, keys, 41, dtype, is_causal=True))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.02, 1.0, -0.3])
def test_scale(dtype: torch.dtype, scale: float) -> None:
    case = make_case(70, 301, 40, dtype, scale=scale)
    check(case)
    check_gradients(case)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded(dtype: torch.dtype) -> None:
    """One key and value for all heads, without a copy."""
    case = make_case(40, 50, 40, dtype, heads=4)
    check(dataclasses.replace(case, k=case.k[:, :1].expand_as(case.k), v=case.v[:, :1].expand_as(case.v)))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype: torch.dtype) -> None:
    """Scores of some thousands; and ones that grow along the keys, so that every block brings a new maximum."""
    case = make_case(70, 500, 40, dtype, scale=1.0)
    case.q *= 8
    case.k *= 16
    o = case.run("cpu")
    assert o.isfinite().all()
    # The largest score takes all; which one it is survives rounding for nearly all queries.
    exact = case.converted(torch.float64).run("torch")
    close = (o.double() - exact).abs().amax(-1) < 0.05
    assert close.double().mean() > 0.95
    for sign in (1, -1):
        ramp = torch.linspace(-sign, sign, 500)[:, None].expand(500, 40).to(dtype)
        case = dataclasses.replace(case, q=torch.ones_like(case.q), k=ramp.expand_as(case.k), scale=25.0)
        o, exact = case.run("cpu"), case.converted(torch.float64).run("torch")
        assert o.isfinite().all()
        torch.testing.assert_close(o.double(), exact, rtol=0.02, atol=0.02)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [-300.0, 20.0, 40.0, 60.0, 300.0])
def test_later_keys_outgrow_the_first(largest: float, dtype: torch.dtype) -> None:
    """Scores of 0 at first, then to `largest`: on AMX more keys than one block, beyond a tile's range or not."""
    case = make_case(70, 2100, 40, dtype, scale=1.0)
    case.q /= 8
    case.q[:, :, :60, 0] = 1  # the others keep scores near 0
    case.k /= 8
    case.k[:, :, 40:, 0] = torch.linspace(0, largest, 2060).to(dtype)
    check(case)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values(value: float, dtype: torch.dtype) -> None:
    """A query's stay with it, a value's with its column, a key's reach every query of the head."""
    plain = make_case(40, 230, 40, dtype)
    for name, row in (("q", 3), ("k", 200), ("v", 200)):
        case = dataclasses.replace(plain, **{name: getattr(plain, name).clone()})
        getattr(case, name)[0, 1, row, 5] = value
        o = case.run("cpu")
        assert torch.equal(o[0, 0], plain.run("cpu")[0, 0])
        if name == "v":
            expected = case.converted(torch.float64).run("torch")
            assert torch.equal(o.isnan(), expected.isnan()) and torch.equal(o.isinf(), expected.isinf())
        elif name == "q":
            assert o[0, 1, row].isnan().all() and int(o.isnan().sum()) == 40
        elif value != value:
            assert o[0, 1].isnan().all()


@needs_kernel
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_is_written(dtype: torch.dtype) -> None:
    for queries, keys, head_dim in [(1, 1, 1), (33, 77, 40), (64, 7, 41), (130, 300, 80), (5, 193, 15)]:
        for is_causal in (False, True):
            case = make_case(queries, keys, head_dim, dtype, "odd", is_causal=is_causal)
            check(case)
            check_gradients(case)


@needs_kernel
def test_result_is_a_view_of_tokens() -> None:
    o = make_case(6, 5, 8, torch.float32, batch=3).run("cpu")
    assert o.shape == (3, 2, 6, 8)
    assert o.transpose(1, 2).is_contiguous()


@needs_kernel
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    for case in (
        make_case(700, 1100, 40, dtype, heads=1),
        make_case(130, 77, 80, dtype, heads=3),
        make_case(300, 300, 64, dtype, heads=3, is_causal=True),
        make_case(1030, 520, 40, dtype, heads=5, is_causal=True),
    ):
        do = torch.randn_like(case.q)
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append((case.run("cpu"), *case.gradients("cpu", do)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernel
def test_more_heads_than_are_copied_at_a_time() -> None:
    case = make_case(2, 8192, 512, torch.float32, heads=3)
    o = case.run("cpu")
    for head in range(3):
        one = Case(*(t[:, head : head + 1] for t in (case.q, case.k, case.v)))
        assert torch.equal(o[:, head : head + 1], one.run("cpu"))


@needs_kernel
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "odd"])
def test_opcheck(layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(5, 7, 8, dtype, layout)
        for is_causal in (False, True):
            arguments = (case.q, case.k, case.v, is_causal, 0.3)
            torch.library.opcheck(torch.ops.sdfast.attention_forward, arguments)
            torch.library.opcheck(torch.ops.sdfast.attention_with_lse, arguments)
            o, lse = torch.ops.sdfast.attention_with_lse(*arguments)
            assert torch.equal(torch.ops.sdfast.attention_forward(*arguments), o)
            scores = 0.3 * case.q.double() @ case.k.double().mT
            if is_causal:
                scores = scores.masked_fill(torch.ones(5, 7).tril() == 0, -float("inf"))
            expected = scores.logsumexp(-1) / math.log(2)
            torch.testing.assert_close(lse.double(), expected, rtol=1e-4, atol=1e-4)
            backward = (torch.randn_like(o), *arguments[:3], o, lse, is_causal, 0.3)
            torch.library.opcheck(torch.ops.sdfast.attention_backward, backward)


@needs_kernel
def test_what_is_unsafe_is_refused_by_the_operation_itself() -> None:
    case = make_case(5, 7, 8, torch.float32)
    q, k, v = case.q, case.k, case.v
    o, lse = torch.ops.sdfast.attention_with_lse(q, k, v, False, 0.3)
    for wrong in [
        (o[:, :, :4], q, k, v, o, lse), (o, q, k, v[:, :, :6], o, lse), (o, q, k, v, o[..., :7], lse),
        (o, q, k, v, o, lse[..., :4]), (o.bfloat16(), q, k, v, o, lse), (o, q, k[:, :1], v, o, lse),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError):
            torch.ops.sdfast.attention_backward(*wrong, False, 0.3)


@needs_kernel
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, under vmap
def test_what_the_kernel_leaves_to_torch() -> None:
    case = make_case(4, 4, 8, torch.float32)
    mask = torch.ones(4, 4, dtype=torch.bool)
    leaf = case.q.detach().requires_grad_()
    wide = case.converted(torch.float64)
    none = case.q[:, :, :0]
    for call, reason in (
        (lambda backend: attention(case.q, case.k, case.v, mask=mask, backend=backend), "takes no mask"),
        (lambda backend: attention(wide.q, wide.k, wide.v, backend=backend), "float32, bfloat16"),
        (lambda backend: attention(none, case.k, case.v, backend=backend), "is empty"),
        (lambda backend: torch.vmap(lambda q: attention(q, case.k, case.v, backend=backend))(case.q[None]),
         "torch.func"),
    ):  # fmt: skip
        call(None)
        with pytest.raises(ValueError, match=reason):
            call("cpu")
    with torch.no_grad():
        assert torch.equal(attention(leaf, case.k, case.v, backend="cpu"), case.run("cpu"))


def backend_of_compiler() -> list[object]:
    compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
    return ["aot_eager", pytest.param("inductor", marks=compiler)]


@needs_kernel
@pytest.mark.parametrize("compiler", backend_of_compiler())
def test_compiles_to_one_graph(compiler: str) -> None:
    case = make_case(130, 77, 8, torch.float32)  # large enough for the kernel to serve its training
    torch._dynamo.reset()

    def call(q: Tensor) -> Tensor:
        return attention(q * 2, case.k, case.v).transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(call, backend=compiler, fullgraph=True)
    torch.testing.assert_close(compiled(case.q), call(case.q))
    results = []
    for function in (call, compiled):
        q = case.q.detach().requires_grad_()
        y = function(q)
        results.append((y, *torch.autograd.grad(y, q, torch.ones_like(y))))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@needs_kernel
def test_serves_the_call() -> None:
    case = make_case(12, 9, 8, torch.float32)
    assert torch.equal(attention(case.q, case.k, case.v), case.run("cpu"))
    expected = F.scaled_dot_product_attention(case.q, case.k, case.v)
    torch.testing.assert_close(case.run("cpu"), expected)


@needs_kernel
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa: str) -> None:
    """The libraries of lesser CPUs, on this one."""
    code = """
        import test_attention as t
        for dtype in t.DTYPES:
            for head_dim in (1, 8, 40, 160):
                t.test_against_fp64("cpu", dtype, head_dim)
            t.test_layouts(dtype, "odd")
            t.test_causal(dtype)
            t.test_large_logits(dtype)
            for value in (float("nan"), float("inf")):
                t.test_non_finite_values(value, dtype)
    """
    run_with_library(isa, code)
