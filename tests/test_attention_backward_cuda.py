"""Gradients of attention's CUDA kernels against fp64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import emulated_cuda
import pytest
import torch
from emulated_cuda import thread_order
from test_attention import Case, check_gradients, gradient_terms, in_layout, make_case
from test_attention_cuda import DTYPES, packed
from torch import Tensor

from sdfast import ops
from sdfast.testing import error_budget, relative_error


@pytest.fixture(autouse=True)
def device(cuda_kernels: str) -> Iterator[None]:
    with torch.device(cuda_kernels):
        yield


@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 128, 160])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_fp64(dtype: torch.dtype, head_dim: int) -> None:
    for seed, (queries, keys, is_causal) in enumerate(((70, 77, False), (66, 70, True), (33, 1, False))):
        with thread_order(seed):
            check_gradients(make_case(queries, keys, head_dim, dtype, heads=1, is_causal=is_causal), "cuda")


@pytest.mark.parametrize("head_dim", [161, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_heads(dtype: torch.dtype, head_dim: int) -> None:
    """They fit the shared memory of every architecture."""
    with emulated_cuda.device(86, 4):
        for seed, (queries, keys, is_causal) in enumerate(((35, 66, True), (5, 33, False), (70, 7, True))):
            with thread_order(seed):
                case = make_case(queries, keys, head_dim, dtype, heads=1, is_causal=is_causal)
                check_gradients(case, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(dtype: torch.dtype) -> None:
    for seed, (queries, keys) in enumerate(((1, 1), (7, 70), (64, 64), (65, 80), (130, 33))):
        for is_causal in (False, True):
            with thread_order(seed):
                heads = max(1, 16 // queries)
                case = make_case(queries, keys, 24, dtype, heads=heads, is_causal=is_causal)
                check_gradients(case, "cuda")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries, keys", [(35, 530), (530, 20)])
def test_splits(queries: int, keys: int, is_causal: bool) -> None:
    """Few blocks whose walks are shared out: as right as what nobody shares, if not the same bits."""
    case = make_case(queries, keys, 13, torch.float16, heads=1, is_causal=is_causal)
    do = torch.randn(case.q.shape).half()
    with thread_order(2):
        check_gradients(case, "cuda", do)
    with emulated_cuda.device(80, 1):
        check_gradients(case, "cuda", do)


def test_splits_of_wide_heads() -> None:
    case = make_case(9, 520, 168, torch.bfloat16, heads=1)
    do = torch.randn(case.q.shape).bfloat16()
    check_gradients(case, "cuda", do)
    with emulated_cuda.device(80, 1):
        check_gradients(case, "cuda", do)


@pytest.mark.parametrize("layout", ["contiguous", "odd", "scattered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    for head_dim in (1, 13, 40):
        case = make_case(19, 23, head_dim, dtype, batch=2)
        do = torch.randn(case.q.shape).to(dtype)
        other = Case(*(in_layout(t, layout) for t in (case.q, case.k, case.v)))
        actual = other.gradients("cuda", in_layout(do, layout))
        for a, b in zip(actual, case.gradients("cuda", do), strict=True):
            assert torch.equal(a, b) and a.transpose(1, 2).is_contiguous()


def test_slices_and_expanded() -> None:
    case = make_case(20, 20, 40, torch.float16, batch=2)
    check_gradients(packed(case), "cuda")
    one = dataclasses.replace(case, k=case.k[:, :1].expand_as(case.k), v=case.v[:, :1].expand_as(case.v))
    check_gradients(one, "cuda", torch.ones((), dtype=torch.float16).expand(one.q.shape))


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale: float) -> None:
    check_gradients(make_case(40, 50, 24, torch.bfloat16, heads=1, scale=scale), "cuda")


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(sign: int) -> None:
    """They grow along the keys to a thousand, or fall: every weight carries the rounding of one lse."""
    ramp = torch.linspace(-sign, sign, 201)[:, None].expand(201, 40).half()
    v, do = torch.randn(1, 1, 201, 40).half(), torch.randn(1, 1, 7, 40).half()
    rounding = torch.finfo(torch.float32).eps * 1000 / math.log(2)
    for scale in (25.0, -25.0):
        case = Case(torch.ones(1, 1, 7, 40).half(), ramp[None, None], v, scale=scale)
        exact, eager = case.converted(torch.float64).gradients("torch", do), case.gradients("torch", do)
        sizes = gradient_terms(case, do)
        for a, b, c, size in zip(case.gradients("cuda", do), eager, exact, sizes, strict=True):
            assert relative_error(a, c, magnitude=size) <= error_budget(b, c, magnitude=size) + rounding


@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_nan(name: str) -> None:
    """It stays in its head, and is not lost there."""
    plain = make_case(40, 50, 40, torch.float16)
    tensors = {"q": plain.q, "k": plain.k, "v": plain.v, "do": torch.randn(plain.q.shape).half()}
    expected = plain.gradients("cuda", tensors["do"])
    tensors[name] = tensors[name].clone()
    tensors[name][0, 1, 20, 5] = float("nan")
    do = tensors.pop("do")
    gradients = dataclasses.replace(plain, **tensors).gradients("cuda", do)
    for actual, before in zip(gradients, expected, strict=True):
        assert torch.equal(actual[0, 0], before[0, 0])
    assert gradients[0][0, 1, 20].isnan().all() and gradients[1][0, 1].isnan().any(-1).all()


@pytest.mark.usefixtures("unwritten_is_nan")
def test_any_order_of_threads_gives_the_same_bits() -> None:
    for queries, keys, is_causal in ((5, 520, False), (70, 77, True)):
        case = make_case(queries, keys, 16, torch.bfloat16, heads=1, is_causal=is_causal)
        do = torch.randn(case.q.shape).bfloat16()
        expected = case.gradients("cuda", do)
        assert all(t.isfinite().all() for t in expected)
        for seed in range(1, 5):
            with thread_order(seed):
                actual = case.gradients("cuda", do)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("layout", ["transposed", "odd"])
def test_opcheck(layout: str) -> None:
    case = make_case(5, 7, 8, torch.float16, layout)
    arguments = (case.q, case.k, case.v, True, 0.3)
    o, lse = torch.ops.sdfast.attention_with_lse_cuda(*arguments)
    backward = (torch.randn_like(o), *arguments[:3], o, lse, True, 0.3)
    torch.library.opcheck(torch.ops.sdfast.attention_backward_cuda, backward)


def test_what_is_unsafe_is_refused_by_the_operation_itself() -> None:
    case = make_case(5, 7, 8, torch.float16)
    q, k, v = case.q, case.k, case.v
    o, lse = torch.ops.sdfast.attention_with_lse_cuda(q, k, v, False, 0.3)
    for wrong in [
        (o[:, :, :4], q, k, v, o, lse), (o, q, k, v[:, :, :6], o, lse), (o, q, k, v, o[..., :7], lse),
        (o, q, k, v, o, lse[..., :4]), (o.bfloat16(), q, k, v, o, lse), (o, q, k[:, :1], v, o, lse),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError):
            torch.ops.sdfast.attention_backward_cuda(*wrong, False, 0.3)


def test_compiles_to_one_graph() -> None:
    case = make_case(20, 33, 8, torch.float16)
    torch._dynamo.reset()

    def call(q: Tensor) -> Tensor:
        return ops.attention(q * 2, case.k, case.v, backend="cuda").transpose(1, 2).flatten(2) + 1

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        q = case.q.detach().requires_grad_()
        y = function(q)
        results.append((y, *torch.autograd.grad(y, q, torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
