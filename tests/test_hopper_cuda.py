"""The CUDA kernels for Hopper's own units against fp64: convolutions, products, attention, any order of threads."""

from __future__ import annotations

from collections.abc import Iterator

import conv2d_checks as checks
import emulated_cuda
import pytest
import torch
import torch.nn.functional as F
from emulated_cuda import hopper, thread_order
from test_attention import check, make_case
from torch import Tensor

from sdfast import _library, ops
from sdfast.ops import _linear_gate
from sdfast.ops.linear import ACTIVATIONS, linear_torch
from sdfast.testing import assert_within_budget

DTYPES = (torch.float16, torch.bfloat16)
GEGLU = ACTIVATIONS.index("geglu")
# (N, C_in, H, W, C_out, kernel, stride, padding), and multiprocessors, which decide tile and splits.
CASES = (
    ((1, 64, 8, 8, 80, 3, 1, 1), 1),  # a tile, 80 columns
    ((1, 64, 8, 8, 80, 3, 1, 1), 132),  # K split among a cluster
    ((2, 72, 5, 7, 88, 3, 1, 1), 132),  # two images in a tile, a part of 64 channels, of the columns
    ((1, 40, 9, 6, 160, 3, 2, 1), 132),
    ((3, 40, 9, 6, 128, 3, 2, (0, 1, 0, 1)), 1),
    ((1, 128, 4, 40, 256, 1, 1, 0), 1),
    ((2, 8, 1, 1, 8, 3, 1, 1), 4),
    ((1, 320, 4, 4, 320, 3, 1, 1), 2),
    ((1, 16, 3, 300, 24, 2, 1, (1, 0, 0, 1)), 8),
    ((1, 128, 4, 8, 256, 3, 1, 1), 1),  # 256 columns
)
# On a GPU the number of multiprocessors is its own: rounds of blocks with 160, 128 and 256 columns.
LARGE = ((2, 128, 64, 64, 320, 3, 1, 1), (1, 128, 160, 160, 128, 3, 1, 1), (1, 256, 128, 128, 256, 3, 1, 1))


@pytest.fixture(autouse=True)
def hoppers_units(cuda_kernels: str) -> Iterator[None]:
    if cuda_kernels == "cuda" and not (
        _library.has_kernel("hopper_units", "cuda") and torch.cuda.get_device_capability() == (9, 0)
    ):
        pytest.skip("needs a GPU of compute capability 9.0 and a library built for 9.0a")
    with hopper():
        yield


def tiles_copied(where: str) -> int:
    """By the emulation since it was asked before; a GPU does not say."""
    return 1 if where == "cuda" else emulated_cuda.tiles_copied()


cuda = checks.by("cuda")


def reordered(seed: int, multiprocessors: int) -> checks.Run:
    """The same with its threads in another order."""

    def run(*args: object, **keywords: object) -> Tensor:
        with hopper(multiprocessors), thread_order(seed):
            return cuda(*args, **keywords)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions(dtype: torch.dtype, cuda_kernels: str) -> None:
    large = LARGE if cuda_kernels == "cuda" else ()
    for seed, (case, multiprocessors) in enumerate((*CASES, *((case, 132) for case in large))):
        args, keywords = checks.make(case, dtype, where=cuda_kernels)
        run, again = (reordered(s, multiprocessors) for s in (seed, seed + 3))
        tiles_copied(cuda_kernels)
        checks.within_budget(run, again, checks.references, args, keywords, str(case))
        assert tiles_copied(cuda_kernels) > 0
        checks.within_budget(run, again, checks.references, (*args[:2], None, *args[3:]), {}, f"{case} alone")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upsample(dtype: torch.dtype, cuda_kernels: str) -> None:
    """Four phases, of a tile each and of several."""
    for case, multiprocessors in (((1, 64, 4, 4, 80, 3, 1, 1), 132), ((2, 24, 13, 11, 136, 3, 1, 1), 1)):
        args, keywords = checks.make(case, dtype, upsample=True, where=cuda_kernels)
        run, again = (reordered(s, multiprocessors) for s in (0, 5))
        tiles_copied(cuda_kernels)
        checks.within_budget(run, again, checks.references, args, keywords, str(case))
        assert tiles_copied(cuda_kernels) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_sources(dtype: torch.dtype, cuda_kernels: str) -> None:
    """Neither a multiple of 64, in one block and split in the middle of either."""
    for multiprocessors in (1, 132):
        cases = (
            ((1, 112, 5, 9, 40, 1, 1, 0), 40, False),
            ((2, 200, 6, 6, 24, 3, 1, 1), 88, False),
            ((1, 96, 4, 4, 16, 3, 1, 1), 24, True),
        )
        run = reordered(4, multiprocessors)
        tiles_copied(cuda_kernels)
        checks.two_sources(run, checks.references, cases, dtype, cuda_kernels)
        assert tiles_copied(cuda_kernels) > 0


def test_layouts_and_strides(cuda_kernels: str) -> None:
    """Two images in a tile, and an image in several."""
    for case in ((2, 48, 6, 5, 40, 3, 1, 1), (2, 24, 13, 11, 136, 3, 1, 1)):
        checks.layouts_and_strides(cuda, case, torch.bfloat16, cuda_kernels)


def test_rows_of_time_that_are_not_aligned_go_another_way(cuda_kernels: str) -> None:
    args, keywords = checks.make((2, 48, 6, 5, 40, 3, 1, 1), torch.bfloat16, where=cuda_kernels)
    wide = torch.randn(2, 81).to(args[0])
    for time in (wide[:, :40], wide.flatten()[1:81].view(2, 40)):
        tiles_copied(cuda_kernels)
        more = {**keywords, "time_embedding": time}
        assert_within_budget(cuda(*args, **more), *checks.references(args, more), what=str(time.stride()))
        assert cuda_kernels == "cuda" or tiles_copied(cuda_kernels) == 0


def test_what_copies_cannot_read_goes_another_way(cuda_kernels: str) -> None:
    """Channels that are no multiple of 16 bytes, fp32, and statistics."""
    tiles_copied(cuda_kernels)
    for case, dtype, more in (
        ((1, 12, 6, 6, 16, 3, 1, 1), torch.float16, {}),
        ((1, 16, 6, 6, 12, 3, 1, 1), torch.bfloat16, {}),
        ((1, 16, 6, 6, 16, 3, 1, 1), torch.float16, {"stats_groups": 4}),
    ):
        args, keywords = checks.make(case, dtype, where=cuda_kernels)
        y = cuda(*args, **keywords, **more)
        actual = y[0] if more else y
        assert_within_budget(actual, *checks.references(args, keywords), what=str(case))
    assert cuda_kernels == "cuda" or tiles_copied(cuda_kernels) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype: torch.dtype, cuda_kernels: str) -> None:
    """Without anything, with bias and residual, with GEGLU; by tiles of each size, and split."""
    op = torch.ops.sdfast.linear_rows_cuda
    for tokens, k, rows in (
        (1, 8, 16), (77, 72, 160), (130, 64, 256), (300, 40, 1280), (128, 320, 80), (128, 1024, 256),
    ):  # fmt: skip
        x, weight = torch.randn(tokens, k).to(dtype), (torch.randn(rows, k) / k**0.5).to(dtype)
        bias, residual = torch.randn(rows).to(dtype), torch.randn(tokens, rows).to(dtype)
        x, weight, bias, residual = (t.to(cuda_kernels) for t in (x, weight, bias, residual))
        for activation, given in ((None, (None, None)), (None, (bias, residual)), ("geglu", (bias, None))):
            named = {"activation": activation, "residual": given[1]}
            wide = {"activation": activation, "residual": given[1] if given[1] is None else given[1].double()}
            exact = linear_torch(
                x.double(), weight.double(), None if given[0] is None else given[0].double(), **wide
            )
            eager = linear_torch(x, weight, given[0], **named)
            for multiprocessors in (1, 132):
                with hopper(multiprocessors), thread_order(tokens):
                    y = op(x, weight, *given, GEGLU if activation else 0)
                assert_within_budget(y, eager, exact, what=f"{tokens, k, rows, activation}")


def test_linear_is_asked_for_by_the_operation(cuda_kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tokens of several axes, and a weight as a 1x1 convolution keeps it."""
    monkeypatch.setattr(_linear_gate, "has_hopper_units", lambda x, *sizes: True)
    shapes = ((2, 9, 24), (16, 24), (2, 9, 16))
    x, weight, residual = (torch.randn(shape).half().to(cuda_kernels) for shape in shapes)
    tiles_copied(cuda_kernels)
    y = ops.linear(x, weight[:, :, None, None], residual=residual, backend="cuda")
    expected = linear_torch(x.double(), weight.double(), residual=residual.double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-2)
    y = ops.linear(x.transpose(0, 1), weight, activation="geglu", backend="cuda")
    expected = linear_torch(x.double().transpose(0, 1), weight.double(), activation="geglu")
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-2)
    assert tiles_copied(cuda_kernels) > 0
    with pytest.raises(ValueError, match="products without activation"):
        ops.linear(x, weight, activation="silu", backend="cuda")


def test_opcheck(cuda_kernels: str) -> None:
    shapes = ((9, 24), (16, 24), (9, 16))
    x, weight, residual = (torch.randn(shape).half().to(cuda_kernels) for shape in shapes)
    op = torch.ops.sdfast.linear_rows_cuda.default
    torch.library.opcheck(op, (x, weight, weight[:, 0].contiguous(), residual, 0))
    torch.library.opcheck(op, (x, weight, None, None, GEGLU))


def test_linear_copies_what_is_not_aligned(cuda_kernels: str) -> None:
    op = torch.ops.sdfast.linear_rows_cuda
    x, weight = torch.randn(20, 24).half().to(cuda_kernels), torch.randn(16, 24).half().to(cuda_kernels)
    shifted = torch.empty(20 * 24 + 1, dtype=x.dtype, device=x.device)[1:].view(20, 24).copy_(x)
    expected = op(x, weight, None, None, 0)
    assert torch.equal(op(shifted, weight, None, None, 0), expected)
    assert torch.equal(op(x.t().contiguous().t(), weight, None, None, 0), expected)
    assert op(x[:0], weight, None, None, 0).shape == (0, 16)


def test_linear_refuses(cuda_kernels: str) -> None:
    op = torch.ops.sdfast.linear_rows_cuda
    x, weight = torch.randn(4, 24).half().to(cuda_kernels), torch.randn(16, 24).half().to(cuda_kernels)
    residual = torch.zeros(4, 16, dtype=x.dtype, device=x.device)
    for message, arguments in (
        ("activation", (x, weight, None, None, 1)),
        ("activation", (x, weight, None, residual, GEGLU)),
        ("multiples of 8", (x[:, :20], weight[:, :20], None, None, 0)),
        ("multiples of 8", (x, weight[:8], None, None, GEGLU)),
        ("the shape does not fit", (x, weight[:, :16], None, None, 0)),
        ("weight: expected the dtype", (x, weight.float(), None, None, 0)),
        ("bfloat16 or float16", (x.float(), weight.float(), None, None, 0)),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


@pytest.mark.parametrize("head_dim", [8, 40, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype: torch.dtype, head_dim: int, cuda_kernels: str) -> None:
    """Tiles of keys that are full and that are not, fewer than the ring holds and more."""
    with torch.device(cuda_kernels):
        for seed, (queries, keys) in enumerate(((70, 77), (128, 64), (1, 1), (300, 130), (65, 700))):
            # On a GPU so many that every multiprocessor has a block, of four groups or of two.
            heads = 3 if cuda_kernels == "cpu" else 140 if queries > 64 else 70
            case = make_case(queries, keys, head_dim, dtype, heads=heads)
            tiles_copied(cuda_kernels)
            with hopper(1), thread_order(seed):
                check(case, "cuda")
            assert tiles_copied(cuda_kernels) > 0


def test_attention_returns_lse(cuda_kernels: str) -> None:
    """Base 2, the result's bits the same with it; by blocks of two groups and of four."""
    with torch.device(cuda_kernels):
        heads = 2 if cuda_kernels == "cpu" else 40
        q, k, v = (torch.randn(2, heads, n, 40).half() for n in (300, 90, 90))
        exact = torch.logsumexp(0.3 * q.double() @ k.double().transpose(2, 3), 3) * 1.4426950408889634
        for multiprocessors in (1, 14):
            with hopper(multiprocessors):
                o, lse = torch.ops.sdfast.attention_with_lse_cuda(q, k, v, False, 0.3)
                assert torch.equal(o, torch.ops.sdfast.attention_forward_cuda(q, k, v, False, 0.3))
            torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-4)
            expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.3)
            torch.testing.assert_close(o.double(), expected, rtol=5e-3, atol=2e-3)


def test_attention_to_keys_that_are_infinitely_far(cuda_kernels: str) -> None:
    """All of the first tile: what follows decides."""
    heads = 3 if cuda_kernels == "cpu" else 140
    q, k, v = (torch.randn(1, heads, n, 16).half().to(cuda_kernels) for n in (70, 100, 100))
    q[..., 0], k[:, :, :64, 0] = 1.0, -float("inf")
    with hopper(1):
        o = ops.attention(q, k, v, backend="cuda")
    expected = F.scaled_dot_product_attention(q.double(), k[:, :, 64:].double(), v[:, :, 64:].double())
    torch.testing.assert_close(o.double(), expected, rtol=5e-3, atol=2e-3)


def test_attention_of_expanded_keys(cuda_kernels: str) -> None:
    """One row of keys for all heads, which no copy of a box can read."""
    q, k = (
        torch.randn(1, 4, 70, 16).half().to(cuda_kernels),
        torch.randn(1, 1, 30, 16).half().to(cuda_kernels),
    )
    tiles_copied(cuda_kernels)
    with hopper(1):
        o = ops.attention(q, k.expand(1, 4, 30, 16), k.expand(1, 4, 30, 16), backend="cuda")
    expected = F.scaled_dot_product_attention(q.double(), k.double(), k.double())
    torch.testing.assert_close(o.double(), expected, rtol=5e-3, atol=2e-3)
    assert cuda_kernels == "cuda" or tiles_copied(cuda_kernels) == 0
