"""attention's Triton kernels against fp64, forward and backward: head dimensions, lengths, splits, strides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from guarded import Guards
from test_attention import Case, check, check_gradients, gradient_terms, in_layout, make_case
from torch import Tensor

from sdfast import ops
from sdfast.ops import _attention_triton, _triton
from sdfast.testing import error_budget, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bf16 wrongly in tl.dot.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
HEAD_DIMS = (1, 7, 16, 40, 64, 80, 96, 160, 512, *((520,) if torch.cuda.is_available() else ()))
pytestmark = pytest.mark.skipif(
    _triton.why_not("q", DEVICE) is not None, reason=str(_triton.why_not("q", DEVICE))
)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_fp64(dtype: torch.dtype, head_dim: int) -> None:
    many = 77 if dtype.itemsize == 2 else 35  # fp32's blocks are of 16
    for queries, keys in ((37, many), (1, 33), (35, 1)):
        check(make_case(queries, keys, head_dim, dtype, heads=1), "triton")
    check(make_case(30, 20, head_dim, dtype, is_causal=True, heads=1), "triton")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_against_fp64(dtype: torch.dtype, head_dim: int) -> None:
    if dtype.itemsize == 2:
        check_gradients(make_case(70, 77, head_dim, dtype, heads=1), "triton")
    check_gradients(make_case(19, 17, head_dim, dtype, heads=1, is_causal=head_dim > 16), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(dtype: torch.dtype) -> None:
    """One row on either side, and blocks that end with the rows and just beyond them."""
    for queries, keys in ((1, 1), (7, 70), (64, 64), (65, 80)):
        case = make_case(queries, keys, 24, dtype, heads=max(1, 8 // queries))
        check(case, "triton")
        check_gradients(case, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal(dtype: torch.dtype) -> None:
    for queries, keys in ((7, 1), (65, 80), (80, 35), (64, 64)):
        case = make_case(queries, keys, 24, dtype, is_causal=True, heads=max(1, 16 // queries))
        check(case, "triton")
        check_gradients(case, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries, keys", [(35, 530), (530, 20)])
def test_splits(
    monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, is_causal: bool, dtype: torch.dtype
) -> None:
    """Few blocks whose walks are shared out: as right as what nobody shares, if not the same bits."""
    case = make_case(queries, keys, 16, dtype, heads=1, is_causal=is_causal)
    check(case, "triton")
    do = torch.randn(case.q.shape).to(dtype)
    check_gradients(case, "triton", do)
    split = (case.run("triton"), *case.gradients("triton", do))
    monkeypatch.setattr(_attention_triton, "multiprocessors", lambda device: 1)
    whole = (case.run("triton"), *case.gradients("triton", do))
    if dtype is torch.float32:  # half precision rounds most differences away
        o, dq, dk, dv = (torch.equal(a, b) for a, b in zip(split, whole, strict=True))
        are_keys_split = keys >= 512 and not is_causal
        assert o == dq == (not are_keys_split)
        assert dk == dv == (not are_keys_split and queries < 512)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse(dtype: torch.dtype) -> None:
    """Base 2, with and without splits, the forward's bits the same with it."""
    for queries, keys, is_causal, scale in ((20, 530, False, 0.3), (40, 77, True, -0.2), (3, 5, False, 0.0)):
        case = make_case(queries, keys, 16, dtype)
        arguments = (case.q, case.k, case.v, is_causal, scale)
        o, lse = torch.ops.sdfast.attention_with_lse_triton(*arguments)
        assert torch.equal(torch.ops.sdfast.attention_forward_triton(*arguments), o)
        scores = scale * case.q.double() @ case.k.double().mT
        if is_causal:
            scores = scores.masked_fill(torch.ones(queries, keys).tril() == 0, -float("inf"))
        expected = scores.logsumexp(-1) / math.log(2)
        assert lse.dtype is torch.float32 and lse.is_contiguous()
        torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "odd", "scattered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    for head_dim in (1, 13, 40):
        case = make_case(19, 23, head_dim, dtype, batch=2)
        do = torch.randn(case.q.shape).to(dtype)
        other = Case(*(in_layout(t, layout) for t in (case.q, case.k, case.v)))
        expected = (case.run("triton"), *case.gradients("triton", do))
        actual = (other.run("triton"), *other.gradients("triton", in_layout(do, layout)))
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b) and a.transpose(1, 2).is_contiguous()


def packed(case: Case) -> Case:
    """q, k and v side by side, as one projection gives them."""
    qkv = torch.stack([case.q, case.k, case.v]).permute(1, 3, 0, 2, 4).contiguous()  # (B, L, 3, heads, D)
    return Case(*qkv.permute(2, 0, 3, 1, 4).unbind(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_and_expanded(dtype: torch.dtype) -> None:
    case = make_case(20, 20, 40, dtype, batch=2)
    assert torch.equal(packed(case).run("triton"), case.run("triton"))
    one = dataclasses.replace(case, k=case.k[:, :1].expand_as(case.k), v=case.v[:, :1].expand_as(case.v))
    check(one, "triton")
    check_gradients(one, "triton", torch.ones((), dtype=dtype).expand(one.q.shape))


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(dtype: torch.dtype, scale: float) -> None:
    case = make_case(40, 50, 24, dtype, heads=1, scale=scale)
    check(case, "triton")
    check_gradients(case, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores(dtype: torch.dtype, sign: int) -> None:
    """They grow along the keys to a thousand, so that every block brings a new maximum, or fall."""
    ramp = torch.linspace(-sign, sign, 201)[:, None].expand(201, 40).to(dtype)
    case = Case(torch.ones(1, 1, 7, 40, dtype=dtype), ramp[None, None], torch.randn(1, 1, 201, 40).to(dtype))
    do = torch.randn(case.q.shape).to(dtype)
    for scale in (25.0, -25.0):
        case = dataclasses.replace(case, scale=scale)
        check(case, "triton")
        exact, eager = case.converted(torch.float64).gradients("torch", do), case.gradients("torch", do)
        # Every weight carries the rounding of one lse, whose magnitude the scores set.
        rounding = torch.finfo(torch.float32).eps * 1000 / math.log(2)
        sizes = gradient_terms(case, do)
        for a, b, c, size in zip(case.gradients("triton", do), eager, exact, sizes, strict=True):
            assert relative_error(a, c, magnitude=size) <= error_budget(b, c, magnitude=size) + rounding


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_values(dtype: torch.dtype, value: float) -> None:
    """A query's stay with it, a value's with its column, a NaN of a key reaches every query of the head."""
    plain = make_case(20, 90, 40, dtype)
    expected = plain.run("triton")
    for name, row in (("q", 3), ("k", 80), ("v", 80)):
        case = dataclasses.replace(plain, **{name: getattr(plain, name).clone()})
        getattr(case, name)[0, 1, row, 5] = value
        o = case.run("triton")
        assert torch.equal(o[0, 0], expected[0, 0])
        if name == "v":
            exact = case.converted(torch.float64).run("torch")
            assert torch.equal(o.isnan(), exact.isnan()) and torch.equal(o.isinf(), exact.isinf())
        elif name == "q":
            assert o[0, 1, row].isnan().all() and int(o.isnan().sum()) == 40
        elif value != value:
            assert o[0, 1].isnan().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="it is malloc that is poisoned")
@pytest.mark.usefixtures("poisoned_memory")
def test_everything_is_written() -> None:
    for queries, keys, head_dim in ((1, 1, 1), (33, 35, 40), (5, 520, 13), (520, 5, 13)):
        for is_causal in (False, True):
            case = make_case(queries, keys, head_dim, torch.float16, heads=1, is_causal=is_causal)
            do = torch.randn(case.q.shape).half()
            assert all(t.isfinite().all() for t in (case.run("triton"), *case.gradients("triton", do)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_nothing_beside(dtype: torch.dtype) -> None:
    for head_dim in (21, 40):
        case = make_case(17, 35, head_dim, dtype)
        do = torch.randn(case.q.shape).to(dtype)
        expected = (case.run("triton"), *case.gradients("triton", do))
        for offset in (0, 3):
            guards = Guards()
            guarded = Case(*(guards.around(t, offset) for t in (case.q, case.k, case.v)))
            actual = (guarded.run("triton"), *guarded.gradients("triton", guards.around(do, offset)))
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
            guards.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bit_for_bit(dtype: torch.dtype) -> None:
    for case in (make_case(5, 520, 16, dtype, heads=1), make_case(520, 5, 16, dtype, heads=1)):
        do = torch.randn(case.q.shape).to(dtype)
        once, again = ((case.run("triton"), *case.gradients("triton", do)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.fixture
def allow_tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.usefixtures("allow_tf32")
def test_tf32_where_it_is_allowed() -> None:
    """Its tiles are others; 10 bits of a factor's mantissa are kept, of the interpreter's all."""
    case = make_case(35, 40, 160, torch.float32, heads=1)
    do, exact = torch.randn(case.q.shape), case.converted(torch.float64)
    actual = (case.run("triton"), *case.gradients("triton", do))
    wanted = (exact.run("torch"), *exact.gradients("torch", do))
    for a, b in zip(actual, wanted, strict=True):
        assert relative_error(a, b) <= 2 * torch.finfo(torch.float16).eps


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is of one architecture")
def test_other_architectures_have_other_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of 512 streamed and not kept, smaller tiles of 160."""
    for architecture in (80, 89):
        monkeypatch.setattr(_triton, "_architecture", architecture)
        check(make_case(20, 40, 512, torch.float16, heads=1), "triton")
        check_gradients(make_case(20, 40, 160, torch.float16, heads=1), "triton")


def test_chunks() -> None:
    widths = {1: (16, 0), 16: (16, 0), 24: (32, 0), 40: (32, 16), 48: (32, 16), 77: (64, 16), 80: (64, 16),
              96: (64, 32), 112: (128, 0), 160: (128, 32), 333: (256, 128), 512: (512, 0)}  # fmt: skip
    assert {columns: _attention_triton.chunks(columns) for columns in widths} == widths
    assert _attention_triton.slices(512, 128) == (4, 128, 0)
    assert _attention_triton.slices(160, 128) == (2, 64, 16)


def test_empty() -> None:
    sdfast, some, none = torch.ops.sdfast, torch.randn(1, 2, 5, 8), torch.randn(1, 2, 0, 8)
    o, lse = sdfast.attention_with_lse_triton(none, some, some, False, 0.3)
    assert o.shape == (1, 2, 0, 8) and lse.shape == (1, 2, 0)
    dq, dk, dv = sdfast.attention_backward_triton(none, none, some, some, o, lse, False, 0.3)
    assert dq.shape == none.shape and not dk.any() and not dv.any()
    o, lse = sdfast.attention_with_lse_triton(some, none, none, False, 0.3)
    assert not o.any() and lse.isneginf().all()
    dq, dk, dv = sdfast.attention_backward_triton(some, some, none, none, o, lse, False, 0.3)
    assert not dq.any() and dk.shape == dv.shape == none.shape
    assert sdfast.attention_forward_triton(*[some[..., :0]] * 3, False, 0.3).shape == (1, 2, 5, 0)


@pytest.mark.parametrize("layout", ["transposed", "odd"])
def test_opcheck(layout: str) -> None:
    case = make_case(5, 7, 8, torch.float16 if layout == "odd" else torch.float32, layout)
    arguments = (case.q, case.k, case.v, True, 0.3)
    torch.library.opcheck(torch.ops.sdfast.attention_forward_triton, arguments)
    torch.library.opcheck(torch.ops.sdfast.attention_with_lse_triton, arguments)
    o, lse = torch.ops.sdfast.attention_with_lse_triton(*arguments)
    backward = (torch.randn_like(o), *arguments[:3], o, lse, True, 0.3)
    torch.library.opcheck(torch.ops.sdfast.attention_backward_triton, backward)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, under vmap
def test_what_the_kernel_leaves_to_torch() -> None:
    case = make_case(4, 4, 8, torch.float32)
    wide, none = case.converted(torch.float64), case.q[:, :, :0]
    mask = torch.ones(4, 4, dtype=torch.bool)

    def call(q: Tensor, k: Tensor = case.k, mask: Tensor | None = None) -> Tensor:
        return ops.attention(q, k, k, mask=mask, backend="triton")

    for arguments, reason in (
        ((case.q, case.k, mask), "takes no mask"),
        ((wide.q, wide.k), "float32, bfloat16"),
        ((none, case.k), "is empty"),
    ):
        with pytest.raises(ValueError, match=reason):
            call(*arguments)
    with pytest.raises(ValueError, match="torch.func"):
        torch.vmap(call)(case.q[None])
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(ValueError, match="float32, bfloat16"):
        call(wide.q, wide.k)  # fp64 is not cast


def test_autocast() -> None:
    case = make_case(4, 4, 8, torch.float32)
    half = case.converted(torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = ops.attention(case.q, case.k, case.v, backend="triton")
    assert torch.equal(found, ops.attention(half.q, half.k, half.v, backend="triton"))


def test_compiles_to_one_graph() -> None:
    case = make_case(20, 33, 8, torch.float32)
    torch._dynamo.reset()

    def call(q: Tensor) -> Tensor:
        return ops.attention(q * 2, case.k, case.v, backend="triton").transpose(1, 2).flatten(2) + 1

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        q = case.q.detach().requires_grad_()
        y = function(q)
        results.append((y, *torch.autograd.grad(y, q, torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
