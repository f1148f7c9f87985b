"""Products on AMX tiles (csrc/cpu_tiles.h): with and without a copy of the weight, few and many tokens, cut K,
and their gradients (csrc/cpu_tiles_gradient.h). fp32 as sums of two bf16, attention too.

test_amx.py runs the same on emulated tiles where the CPU has none.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gradients import check_gradients, gradients
from torch import Tensor
from weight_changes import CHANGES, change_weight

from sdfast import _library, dispatch, ops, packing
from sdfast.ops.attention import attention_torch
from sdfast.ops.conv2d import conv2d_torch
from sdfast.ops.linear import linear_torch
from sdfast.testing import assert_within_budget, relative_error

pytestmark = pytest.mark.skipif(
    not _library.has_kernel("bf16_tiles", "cpu"), reason="this CPU has no AMX, or its library was not built"
)

DTYPES = (torch.bfloat16, torch.float32)
# Tokens, rows, K.
LINEAR = (
    (16, 64, 32),
    (45, 70, 40),
    (64, 130, 2976),  # K in two chunks
    (200, 98, 6000),  # sums of several groups wait for the next
    (33, 34, 2048),  # rows that crowd a set of the cache
    (1040, 96, 64),  # many, in place
    (1040, 1212, 64),  # many, which meet several groups together
    (1031, 40, 96),  # the last block is copied
    (1028, 40, 72),  # all are
    (1030, 70, 3000),  # many, K in two chunks
    (8230, 128, 40),  # split, a result stored past the caches
)
# Images, channels, out_channels, height, width, kernel, stride, whether it upsamples.
CONV2D = (
    (2, 32, 40, 8, 8, 3, 1, False),  # rows that are half a tile: one line an image
    (1, 3, 17, 5, 20, 3, 1, False),
    (1, 40, 33, 16, 16, 3, 1, False),
    (2, 33, 18, 9, 18, 3, 2, False),
    (1, 352, 32, 4, 16, 3, 1, False),  # K in two chunks
    (1, 16, 70, 36, 32, 3, 1, False),  # many
    (1, 352, 40, 36, 32, 3, 1, False),  # many, K in two chunks
    (2, 16, 40, 70, 36, 3, 2, False),  # many
    (1, 8, 16, 12, 12, 11, 1, False),  # more taps than a chunk has steps
    (1, 24, 16, 6, 8, 3, 1, True),
    (1, 8, 16, 20, 16, 3, 1, True),  # many
    (2, 40, 24, 4, 8, 1, 1, False),
    (1, 64, 24, 8, 160, 1, 1, False),
)
# Tokens, rows, K. Of the gradient of the weight tokens are K.
LINEAR_GRADIENTS = (
    (1, 1, 1),
    (45, 70, 40),
    (40, 530, 512),  # a gradient stored past the caches
    (37, 600, 450),  # one as large, its rows no whole lines
    (1040, 96, 64),
    (3000, 200, 98),  # K in two chunks
    (2880, 160, 34),  # in blocks of rows
    (37, 2970, 40),  # K of dx in two chunks
)
CONV2D_GRADIENTS = (
    (2, 32, 40, 8, 8, 3, 1, False),
    (1, 3, 17, 5, 20, 3, 1, False),
    (2, 33, 70, 9, 18, 3, 2, False),
    (1, 16, 34, 12, 12, 4, 2, False),
    (1, 5, 6, 9, 7, 2, 3, False),  # a stride beyond the kernel
    (1, 8, 16, 12, 12, 11, 1, False),
    (1, 192, 176, 6, 5, 3, 1, False),  # a gradient stored past the caches
    (1, 224, 160, 6, 6, 3, 2, False),  # the same, of two parities, the last group half
    (1, 16, 70, 36, 32, 3, 1, False),  # many pixels
    (1, 16, 352, 6, 5, 3, 1, False),  # K of dx in two chunks
    (1, 8, 352, 36, 32, 3, 1, False),  # many pixels, K of dx in two chunks
    (2, 40, 24, 4, 8, 1, 1, False),
    (1, 24, 16, 6, 8, 3, 1, True),
)


def in_both_ways(run: Callable[[], Tensor], weight: Tensor, kept: bool = True) -> Tensor:
    """The result with a copy of the weight, the same to the bit without one, on one thread and on two."""
    results = []
    for memory in ("default", "low"):
        packing.clear()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with dispatch.use_memory(memory):
                results += [run(), run()]  # the first call makes no copy
        assert bool(packing.copies_of([weight])) == (kept and memory == "default")
    packing.clear()
    torch.set_num_threads(1)
    assert all(torch.equal(results[0], other) for other in results[1:])
    return results[0]


def assert_split(actual: Tensor, exact: Tensor) -> None:
    """Not as good as fp32, and a tenth or less of what bf16 would lose with the same sums."""
    assert actual.dtype is torch.float32
    assert 5e-7 < relative_error(actual, exact) < 1e-5
    assert float((actual - exact).abs().max()) < 1e-4 * float(exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "geglu"])
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear(case: tuple[int, int, int], activation: str | None, dtype: torch.dtype) -> None:
    tokens, rows, k = case
    values = (torch.randn(tokens, k), torch.randn(rows, k) / k**0.5, torch.randn(rows))
    x, weight, bias = (value.to(dtype) for value in values)
    residual = torch.randn(tokens, rows).to(dtype)
    more = {"activation": activation, "residual": residual}
    actual = in_both_ways(lambda: ops.linear(x, weight, bias, **more, backend="cpu"), weight)
    exact = linear_torch(
        x.double(), weight.double(), bias.double(), activation=activation, residual=residual.double()
    )
    if dtype is torch.float32:
        assert_split(actual, exact)
    else:
        assert_within_budget(actual, linear_torch(x, weight, bias, **more), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV2D, ids=str)
def test_conv2d(case: tuple[int, ...], dtype: torch.dtype) -> None:
    images, channels, out_channels, height, width, kernel, stride, upsample = case
    x = torch.randn(images, channels, height, width)
    weight = torch.randn(out_channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    values = (x, weight, torch.randn(out_channels), torch.randn(images, out_channels))
    x, weight, bias, embedding = (value.to(dtype) for value in values)
    geometry = (stride, (kernel // 2,) * 4)
    plain = conv2d_torch(x, weight, bias, *geometry, upsample=bool(upsample))
    residual = torch.randn_like(plain).contiguous(memory_format=torch.channels_last)
    more = {"upsample": bool(upsample), "time_embedding": embedding, "residual": residual}
    algorithm = "split" if dtype is torch.float32 else "direct"
    others = (*geometry, bool(upsample), embedding, residual, algorithm)
    actual = in_both_ways(lambda: torch.ops.sdfast.conv2d_forward(x, weight, bias, *others), weight)
    eager = conv2d_torch(x, weight, bias, *geometry, **more)
    wide = (x.double(), weight.double(), bias.double())
    exact = conv2d_torch(
        *wide,
        *geometry,
        upsample=bool(upsample),
        time_embedding=embedding.double(),
        residual=residual.double(),
    )
    if dtype is torch.float32:
        assert_split(actual, exact)
    else:
        assert_within_budget(actual, eager, exact)


@pytest.mark.parametrize("head_dim", [1, 40, 64, 80, 160])
def test_split_attention(head_dim: int) -> None:
    for queries, keys, is_causal in [(7, 130, False), (77, 300, False), (300, 1030, False), (300, 300, True)]:
        q, k, v = (torch.randn(1, 2, size, head_dim) for size in (queries, keys, keys))
        v += 1  # or the results would nearly cancel
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.attention(q, k, v, is_causal=is_causal, backend="cpu"))
        exact = attention_torch(q.double(), k.double(), v.double(), is_causal=is_causal)
        assert_split(results[0], exact)
        assert torch.equal(*results)


def test_split_attention_of_growing_scores() -> None:
    """Every block of keys brings a new maximum."""
    q, k, v = (torch.randn(1, 2, size, 40) for size in (70, 2100, 2100))
    q[..., 0], k[..., 0] = 1, torch.linspace(-200, 200, 2100)
    exact = attention_torch(q.double(), k.double(), v.double(), scale=1.0)
    o = ops.attention(q, k, v, scale=1.0, backend="cpu")
    assert float((o - exact).abs().max()) < 200 * 2**-14


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is_split(value: float) -> None:
    x, weight = torch.randn(20, 40), torch.randn(70, 40)
    clean = ops.linear(x, weight, backend="cpu")
    x[4, 6] = value
    y = ops.linear(x, weight, backend="cpu")
    assert not y[4].isfinite().any()
    assert torch.equal(y[:4], clean[:4]) and torch.equal(y[5:], clean[5:])
    q, k, v = (torch.randn(1, 1, 200, 40) for _ in range(3))
    clean = ops.attention(q, k, v, backend="cpu")
    q[0, 0, 3, 5] = v[0, 0, 7, 9] = value
    o = ops.attention(q, k, v, backend="cpu")
    assert not o[0, 0, 3].isfinite().any() and not o[..., 9].isfinite().any()
    o[0, 0, 3], o[..., 9] = clean[0, 0, 3], clean[..., 9]
    torch.testing.assert_close(o, clean)  # a tile with a NaN is done again, another maximum subtracted


def test_exact_numerics_do_not_split() -> None:
    x, weight = torch.randn(64, 320), torch.randn(64, 320)
    q = torch.randn(1, 2, 200, 40)
    image, kernel = torch.randn(1, 64, 8, 8), torch.randn(64, 64, 1, 1)
    for run, eager, given in (
        (ops.linear, linear_torch, (x, weight)),
        (ops.attention, attention_torch, (q, q, q)),
        (ops.conv2d, conv2d_torch, (image, kernel)),
    ):
        exact = eager(*(t.double() for t in given))
        with dispatch.use_numerics("exact"):
            assert_within_budget(run(*given, backend="cpu"), eager(*given), exact)
        assert_split(run(*given, backend="cpu"), exact)


def same_on_threads(run: Callable[[], list[Tensor]]) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run())
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEAR_GRADIENTS, ids=str)
def test_linear_gradients(case: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, rows, k = case
    values = (torch.randn(tokens, k), torch.randn(rows, k) / k**0.5, torch.randn(rows))
    tensors = [value.to(dtype) for value in values]
    dy = torch.randn(tokens, rows).to(dtype)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.linear(x, weight, bias, backend="cpu")

    if dtype is torch.float32:
        exact = gradients(linear_torch, [tensor.double() for tensor in tensors], dy.double())
        for actual, right in zip(gradients(ours, tensors, dy)[:3], exact, strict=False):  # y, dx, dW
            if min(case) > 1:
                assert_split(actual, right)
    else:
        check_gradients(ours, linear_torch, tensors, dy)
    same_on_threads(lambda: gradients(ours, tensors, dy))


@pytest.mark.parametrize("case", CONV2D_GRADIENTS, ids=str)
def test_conv2d_gradients(case: tuple[int, ...]) -> None:
    images, channels, out_channels, height, width, kernel, stride, upsample = case
    x = torch.randn(images, channels, height, width)
    weight = torch.randn(out_channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    tensors = [value.bfloat16() for value in (x, weight, torch.randn(out_channels))]
    geometry = (stride, ((kernel - 1) // 2,) * 4)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.conv2d(x, weight, bias, *geometry, upsample=bool(upsample), backend="cpu")

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv2d_torch(x, weight, bias, *geometry, upsample=bool(upsample))

    dy = torch.randn_like(eager(*tensors))
    check_gradients(ours, eager, tensors, dy)
    same_on_threads(lambda: gradients(ours, tensors, dy))


def test_gradients_leave_nothing_unwritten(poisoned_memory: None) -> None:
    for dtype in DTYPES:
        test_linear_gradients(LINEAR_GRADIENTS[1], dtype)
    for case in CONV2D_GRADIENTS[:4]:
        test_conv2d_gradients(case)


def test_few_tokens_keep_no_copy() -> None:
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(70, 64).bfloat16()
    in_both_ways(lambda: ops.linear(x, weight, backend="cpu"), weight, kept=False)


def test_weights_made_for_a_call_keep_no_copy() -> None:
    x, weight = torch.randn(32, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    for _ in range(2):
        temporary = weight * 2
        ops.linear(x, temporary, backend="cpu")
        assert not packing.copies_of([temporary])


@pytest.mark.parametrize("change", CHANGES)
def test_the_copy_follows_the_weight(change: str) -> None:
    layer = torch.nn.Linear(64, 96).bfloat16()
    x = torch.randn(32, 64).bfloat16()

    def run() -> Tensor:
        with torch.no_grad():
            return ops.linear(x, layer.weight, layer.bias, backend="cpu")

    run()
    before = run()
    assert packing.copies_of([layer.weight])
    change_weight(layer, change, x)
    assert not torch.allclose(before, run())
    torch.testing.assert_close(run(), layer(x).detach())


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.randn(32, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    packed = torch.ops.sdfast.pack_tiles(weight[None, :, None, None], False)
    torch.ops.sdfast.linear_packed(x, packed, 96, None, None, 0)
    with pytest.raises(RuntimeError, match="packed: expected pack_tiles of a weight that fits x"):
        torch.ops.sdfast.linear_packed(x, packed, 160, None, None, 0)
    with pytest.raises(RuntimeError, match="weight: expected bf16 or fp32"):
        torch.ops.sdfast.pack_tiles(weight.half()[None, :, None, None], False)
    with pytest.raises(RuntimeError, match="x: expected fp32"):
        torch.ops.sdfast.linear_split(x, weight, None, None, 0)
    with pytest.raises(RuntimeError, match="x: expected fp32"):
        torch.ops.sdfast.linear_gradients(x @ weight.t(), x, weight, True, True, True, True)
    with pytest.raises(RuntimeError, match="q: expected fp32"):
        torch.ops.sdfast.attention_split(*[x[None, None]] * 3, False, 1.0)
