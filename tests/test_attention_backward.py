"""Gradients of attention on CPU and in torch against fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from processes import run_with_library
from test_attention import (
    BACKENDS,
    DTYPES,
    HEAD_DIMS,
    Case,
    check_gradients,
    in_layout,
    make_case,
    needs_kernel,
)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_against_fp64(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    for queries in (1, 7, 77, 130):
        for keys in (1, 7, 77, 300):
            heads = max(2, 64 // queries)  # of few queries the rounding of each one's lse would be chance
            check_gradients(make_case(queries, keys, head_dim, dtype, heads=heads), backend)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_over_several_ranges(dtype: torch.dtype) -> None:
    """Lengths at which a head's keys and queries are cut, and the cuts are no multiples of the blocks."""
    for queries, keys in [(600, 780), (1100, 515)]:
        for is_causal in (False, True):
            check_gradients(make_case(queries, keys, 24, dtype, heads=1, is_causal=is_causal))


@needs_kernel
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "odd", "scattered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_in_layouts(dtype: torch.dtype, layout: str) -> None:
    for head_dim in (*range(1, 19), 33, 40, 41):
        case = make_case(35, 79, head_dim, dtype, layout, batch=2)
        do = in_layout(torch.randn(case.q.shape).to(dtype), layout)
        check_gradients(case, do=do)
        dense = Case(case.q.contiguous(), case.k.contiguous(), case.v.contiguous())
        for actual, expected in zip(
            case.gradients("cpu", do), dense.gradients("cpu", do.contiguous()), strict=True
        ):
            assert torch.equal(actual, expected)
            assert actual.transpose(1, 2).is_contiguous()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_gradients(dtype: torch.dtype) -> None:
    """What sums and means send back, and one key and value for all heads."""
    case = make_case(40, 50, 40, dtype, heads=4)
    for one in (torch.ones((), dtype=dtype), torch.randn(1, 1, 40, 1).to(dtype), torch.randn(40).to(dtype)):
        check_gradients(case, do=one.expand(case.q.shape))
    check_gradients(
        dataclasses.replace(case, k=case.k[:, :1].expand_as(case.k), v=case.v[:, :1].expand_as(case.v))
    )


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_gradients(dtype: torch.dtype) -> None:
    for queries, keys in [(77, 77), (1, 5), (130, 300), (300, 130), (64, 64), (7, 1), (520, 520)]:
        check_gradients(make_case(queries, keys, 64, dtype, is_causal=True))
        check_gradients(make_case(queries, keys, 41, dtype, is_causal=True))


@needs_kernel
@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_gradients_of_a_scale_that_is_not_positive(dtype: torch.dtype, scale: float) -> None:
    """For which torch's kernel gives NaN: against the formula."""
    case = make_case(70, 70, 16, dtype, is_causal=True, scale=scale)
    do = torch.randn(case.q.shape).to(dtype)
    q, k, v = (t.double().requires_grad_() for t in (case.q, case.k, case.v))
    scores = (q @ k.mT * scale).masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf)
    expected = torch.autograd.grad(scores.softmax(-1) @ v, (q, k, v), do.double())
    rtol = 100 * torch.finfo(dtype).eps
    for actual, wanted in zip(case.gradients("cpu", do), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=rtol)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_have_gradients(dtype: torch.dtype) -> None:
    """Weights that are almost one and almost zero: everything stays finite and where it belongs."""
    case = make_case(70, 300, 40, dtype, scale=1.0)
    case.k *= 16
    do = torch.randn(case.q.shape).to(dtype)
    for actual, eager in zip(case.gradients("cpu", do), case.gradients("torch", do), strict=True):
        assert actual.isfinite().all()
        assert (actual - eager).double().norm() < 0.05 * eager.double().norm()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_nan_gradients(dtype: torch.dtype, name: str) -> None:
    """It stays in its head, and is not lost there."""
    plain = make_case(40, 50, 40, dtype)
    tensors = {"q": plain.q, "k": plain.k, "v": plain.v, "do": torch.randn(plain.q.shape).to(dtype)}
    expected = plain.gradients("cpu", tensors["do"])
    tensors[name] = tensors[name].clone()
    tensors[name][0, 1, 20, 5] = float("nan")
    do = tensors.pop("do")
    gradients = dataclasses.replace(plain, **tensors).gradients("cpu", do)
    for actual, before in zip(gradients, expected, strict=True):
        assert torch.equal(actual[0, 0], before[0, 0])
    assert gradients[0][0, 1, 20].isnan().all() and gradients[1][0, 1].isnan().any(-1).all()


@needs_kernel
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa: str) -> None:
    """The libraries of lesser CPUs, on this one."""
    code = """
        import test_attention_backward as t
        for dtype in t.DTYPES:
            for head_dim in (1, 8, 40, 160):
                t.test_gradients_against_fp64("cpu", dtype, head_dim)
            t.test_gradients_in_layouts(dtype, "odd")
            t.test_gradients_over_several_ranges(dtype)
            t.test_causal_gradients(dtype)
    """
    run_with_library(isa, code)
