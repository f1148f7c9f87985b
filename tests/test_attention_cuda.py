"""attention's CUDA kernels against fp64: head dimensions, lengths, splits, strides, orders of threads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import emulated_cuda
import pytest
import torch
from emulated_cuda import thread_order
from test_attention import Case, check, in_layout, make_case
from torch import Tensor

from sdfast import ops

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (8, 40, 64, 72, 80, 128, 160, 512)


@pytest.fixture(autouse=True)
def device(cuda_kernels: str) -> Iterator[None]:
    with torch.device(cuda_kernels):
        yield


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_fp64(dtype: torch.dtype, head_dim: int) -> None:
    """One row on either side, the text's 77 keys, tiles that end with the rows and just beyond them."""
    for seed, (queries, keys) in enumerate(((70, 77), (1, 130), (33, 1), (64, 64), (65, 145))):
        with thread_order(seed):
            check(make_case(queries, keys, head_dim, dtype, heads=1 + (queries < 64)), "cuda")


@pytest.mark.parametrize("head_dim", [40, 64, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_queries_than_one_multiprocessor_takes(dtype: torch.dtype, head_dim: int) -> None:
    """Two tiles of queries a warp."""
    with emulated_cuda.device(80, 1):
        for seed, (queries, keys, is_causal) in enumerate(((150, 77, False), (140, 200, True))):
            with thread_order(seed + 2):
                check(make_case(queries, keys, head_dim, dtype, is_causal=is_causal), "cuda")


@pytest.mark.parametrize("capability", [80, 86, 90, 120])
def test_architectures(capability: int) -> None:
    """A head of 512 fits the shared memory of all, with 64 queries of some and 32 of others."""
    with emulated_cuda.device(capability, 4):
        for head_dim in (40, 160, 512):
            check(make_case(70, 90, head_dim, torch.float16, heads=1), "cuda")
        check(make_case(70, 70, 200, torch.bfloat16, heads=1, is_causal=True), "cuda")


@pytest.mark.parametrize("head_dim", [40, 128, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal(dtype: torch.dtype, head_dim: int) -> None:
    """As in torch query i sees the keys up to i; with more queries than keys the last ones see all."""
    for seed, (queries, keys) in enumerate(((7, 1), (1, 5), (77, 77), (64, 100), (130, 35))):
        with thread_order(seed):
            check(make_case(queries, keys, head_dim, dtype, is_causal=True, heads=1), "cuda")


@pytest.mark.parametrize("head_dim", [13, 40, 512])
@pytest.mark.parametrize("is_causal", [False, True])
def test_splits(head_dim: int, is_causal: bool) -> None:
    """Few blocks whose keys are shared out: as right as what nobody shares, if not the same bits."""
    dtype = torch.float16
    queries = 530 if is_causal and head_dim < 512 else 20
    case = make_case(queries, 530, head_dim, dtype, heads=1, is_causal=is_causal)
    with thread_order(3):
        check(case, "cuda")
    arguments = (case.q, case.k, case.v, is_causal, 0.3)
    _, split = torch.ops.sdfast.attention_with_lse_cuda(*arguments)
    with emulated_cuda.device(90, 1):
        check(case, "cuda")
        _, whole = torch.ops.sdfast.attention_with_lse_cuda(*arguments)
    torch.testing.assert_close(split, whole, rtol=1e-6, atol=1e-6)
    one_way = torch.cuda.is_available()  # a GPU's number of multiprocessors is its own
    assert torch.equal(split, whole) == (one_way or (is_causal and queries < 256))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse(dtype: torch.dtype) -> None:
    """Base 2, with and without splits, the forward's bits the same with it."""
    for head_dim in (16, 512):
        for queries, keys, is_causal, scale in (
            (20, 530, False, 0.3),
            (40, 77, True, -0.2),
            (3, 5, False, 0.0),
        ):
            case = make_case(queries, keys, head_dim, dtype, heads=2 if head_dim == 16 else 1)
            arguments = (case.q, case.k, case.v, is_causal, scale)
            o, lse = torch.ops.sdfast.attention_with_lse_cuda(*arguments)
            assert torch.equal(torch.ops.sdfast.attention_forward_cuda(*arguments), o)
            scores = scale * case.q.double() @ case.k.double().mT
            if is_causal:
                scores = scores.masked_fill(torch.ones(queries, keys).tril() == 0, -float("inf"))
            expected = scores.logsumexp(-1) / math.log(2)
            assert lse.dtype is torch.float32 and lse.is_contiguous()
            torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "odd", "scattered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    for head_dim in (*range(1, 18), 33, 40, 161):
        case = make_case(19, 23, head_dim, dtype, batch=2)
        other = Case(*(in_layout(t, layout) for t in (case.q, case.k, case.v)))
        actual = other.run("cuda")
        assert torch.equal(actual, case.run("cuda")) and actual.transpose(1, 2).is_contiguous()
        if layout == "odd":
            check(other, "cuda")


def packed(case: Case) -> Case:
    """q, k and v side by side, as one projection gives them."""
    qkv = torch.stack([case.q, case.k, case.v]).permute(1, 3, 0, 2, 4).contiguous()  # (B, L, 3, heads, D)
    return Case(*qkv.permute(2, 0, 3, 1, 4).unbind(0))


def test_slices_and_expanded() -> None:
    case = make_case(20, 20, 40, torch.float16, batch=2)
    assert torch.equal(packed(case).run("cuda"), case.run("cuda"))
    check(
        dataclasses.replace(case, k=case.k[:, :1].expand_as(case.k), v=case.v[:, :1].expand_as(case.v)),
        "cuda",
    )


@pytest.mark.parametrize("head_dim", [24, 512])
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale: float, head_dim: int) -> None:
    check(make_case(40, 70, head_dim, torch.bfloat16, heads=1, scale=scale), "cuda")


@pytest.mark.parametrize("head_dim", [40, 512])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(sign: int, head_dim: int) -> None:
    """They grow along the keys to a thousand, so that every tile brings a new maximum, or fall."""
    ramp = torch.linspace(-sign, sign, 201)[:, None].expand(201, head_dim).half()
    q, v = torch.ones(1, 1, 7, head_dim).half(), torch.randn(1, 1, 201, head_dim).half()
    for scale in (1000 / head_dim, -1000 / head_dim):
        check(Case(q, ramp[None, None], v, scale=scale), "cuda")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("head_dim", [40, 512])
def test_non_finite_values(head_dim: int, value: float) -> None:
    """A query's stay with it, a value's with its column, a NaN of a key reaches every query of the head."""
    plain = make_case(20, 90, head_dim, torch.bfloat16)
    expected = plain.run("cuda")
    for name, row in (("q", 3), ("k", 80), ("v", 80)):
        case = dataclasses.replace(plain, **{name: getattr(plain, name).clone()})
        getattr(case, name)[0, 1, row, 5] = value
        o = case.run("cuda")
        assert torch.equal(o[0, 0], expected[0, 0])
        if name == "v":
            exact = case.converted(torch.float64).run("torch")
            assert torch.equal(o.isnan(), exact.isnan()) and torch.equal(o.isinf(), exact.isinf())
        elif name == "q":
            assert o[0, 1, row].isnan().all() and int(o.isnan().sum()) == head_dim
        elif value != value:
            assert o[0, 1].isnan().all()


@pytest.mark.usefixtures("unwritten_is_nan")
def test_any_order_of_threads_gives_the_same_bits() -> None:
    for queries, keys, head_dim in ((5, 520, 16), (70, 77, 40), (33, 150, 512)):
        case = make_case(queries, keys, head_dim, torch.float16, heads=1)
        expected = case.run("cuda")
        assert expected.isfinite().all()
        for seed in range(1, 5):
            with thread_order(seed):
                assert torch.equal(case.run("cuda"), expected)


def test_empty() -> None:
    sdfast, some, none = torch.ops.sdfast, torch.randn(1, 2, 5, 8).half(), torch.randn(1, 2, 0, 8).half()
    o, lse = sdfast.attention_with_lse_cuda(none, some, some, False, 0.3)
    assert o.shape == (1, 2, 0, 8) and lse.shape == (1, 2, 0)
    assert sdfast.attention_forward_cuda(*[some[..., :0]] * 3, False, 0.3).shape == (1, 2, 5, 0)
    with pytest.raises(RuntimeError, match="at least one key"):
        sdfast.attention_forward_cuda(some, none, none, False, 0.3)


@pytest.mark.parametrize("layout", ["transposed", "odd"])
def test_opcheck(layout: str) -> None:
    case = make_case(5, 7, 8, torch.float16, layout)
    arguments = (case.q, case.k, case.v, True, 0.3)
    torch.library.opcheck(torch.ops.sdfast.attention_forward_cuda, arguments)
    torch.library.opcheck(torch.ops.sdfast.attention_with_lse_cuda, arguments)


def test_what_is_unsafe_is_refused_by_the_operation_itself() -> None:
    case = make_case(5, 7, 8, torch.float16)
    q, k, v = case.q, case.k, case.v
    wide = torch.randn(1, 2, 5, 520).half()
    for wrong in (
        (q, k, v[:, :, :6]), (q, k[:, :1], v), (q, k.bfloat16(), v), (q[0], k, v), (wide, wide, wide),
        (q.float(), k.float(), v.float()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            torch.ops.sdfast.attention_forward_cuda(*wrong, False, 0.3)


def test_what_the_kernel_leaves_to_others() -> None:
    case = make_case(4, 4, 8, torch.float16)
    mask = torch.ones(4, 4, dtype=torch.bool)
    single, wide = case.converted(torch.float32), make_case(4, 4, 520, torch.float16)

    def call(case: Case, mask: Tensor | None = None) -> Tensor:
        return ops.attention(case.q, case.k, case.v, mask=mask, backend="cuda")

    for arguments, reason in (
        ((case, mask), "takes no mask"),
        ((single,), "bfloat16 or float16"),
        ((wide,), "at most 512"),
        ((dataclasses.replace(case, q=case.q[:, :, :0]),), "is empty"),
    ):
        with pytest.raises(ValueError, match=reason):
            call(*arguments)
