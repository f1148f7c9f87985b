"""conv2d's CUDA kernels against fp64: kernels, strides, two sources, statistics, prologue, splits of K, tiles."""

from __future__ import annotations

from unittest import mock

import conv2d_checks as checks
import pytest
import torch
import torch.nn.functional as F
from conv2d_checks import LAYOUT
from conv2d_checks import references as eager_and_exact
from emulated_cuda import device, thread_order
from torch import Tensor

from sdfast import dispatch, ops
from sdfast.ops.conv2d import NormPrologue, group_statistics, reads_skip
from sdfast.testing import assert_within_budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (N, C_in, H, W, C_out, kernel, stride, padding)
ODD = (
    (1, 3, 7, 9, 5, 3, 1, 1),
    (2, 4, 1, 1, 40, 3, 1, 1),
    (2, 33, 6, 7, 34, 3, 1, 1),
    (3, 1, 5, 4, 1, 1, 1, 0),
    (2, 17, 9, 8, 3, 3, 2, 1),
    (1, 8, 8, 8, 16, 3, 2, (0, 1, 0, 1)),
    (2, 32, 6, 7, 24, 3, 1, 0),
    (1, 16, 6, 5, 4, 2, 2, 1),
    (2, 32, 5, 6, 72, 3, 1, (2, 0, 1, 3)),
    (1, 9, 1, 150, 11, 1, 1, 1),
)
SPLIT = (2, 128, 3, 5, 24, 3, 1, 1)  # one tile an image
# Layers of Stable Diffusion, on a few pixels: a convolution of each kind, and each tile of the kernels.
REAL = (
    (1, 320, 8, 8, 320, 3, 1, 1),
    (2, 640, 4, 4, 1280, 1, 1, 0),
    (1, 128, 9, 17, 128, 3, 1, 1),
    (1, 128, 16, 16, 3, 3, 1, 1),
    (1, 4, 16, 16, 320, 3, 1, 1),
    (1, 320, 8, 8, 64, 3, 2, 1),
)
pytestmark = pytest.mark.usefixtures("cuda_kernels")


def rounded_to_tf32(t: Tensor) -> Tensor:
    """Ties away from zero; the low 13 bits are gone."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def references(args: tuple, keywords: dict[str, object]) -> tuple[Tensor, Tensor]:
    """Eager, which multiplies fp32 rounded as cuDNN may by default, whatever kernel it takes; and in fp64."""
    eager, exact = eager_and_exact(args, keywords)
    if eager.dtype is torch.float32:
        plain = F.conv2d

        def conv2d(x: Tensor, weight: Tensor, *more: object) -> Tensor:
            if x.dtype is torch.float32:
                x, weight = rounded_to_tf32(x), rounded_to_tf32(weight)
            return plain(x, weight, *more)

        with mock.patch.object(F, "conv2d", conv2d):
            eager, _ = eager_and_exact(args, keywords)
    return eager, exact


cuda = checks.by("cuda")


def reordered(seed: int) -> checks.Run:
    """The same with its threads in another order."""
    return thread_order(seed)(cuda)


def on_device(
    case: tuple, dtype: torch.dtype, where: str, upsample: bool = False
) -> tuple[tuple, dict[str, object]]:
    return checks.make(case, dtype, upsample, where)


def check(args: tuple, keywords: dict[str, object], what: str, seed: int = 0) -> None:
    checks.within_budget(cuda, reordered(seed + 1), references, args, keywords, what)


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_shapes(dtype: torch.dtype, multiprocessors: int, cuda_kernels: str) -> None:
    """Whole, and where there are many multiprocessors with K split."""
    for seed, case in enumerate((*ODD, SPLIT)):
        args, keywords = on_device(case, dtype, cuda_kernels)
        with device(90, multiprocessors):
            check(args, keywords, str(case), seed)
            check((*args[:2], None, *args[3:]), {}, f"{case} alone", seed)


@pytest.mark.parametrize(
    "capability, multiprocessors, dtype",
    [(80, 108, torch.float16), (86, 4, torch.bfloat16), (90, 1, torch.float16), (120, 1, torch.float32)],
)
def test_layers(capability: int, multiprocessors: int, dtype: torch.dtype, cuda_kernels: str) -> None:
    for seed, case in enumerate(REAL):
        args, keywords = on_device(case, dtype, cuda_kernels)
        with device(capability, multiprocessors), thread_order(seed):
            actual = cuda(*args, **keywords)
        assert_within_budget(actual, *references(args, keywords), what=str(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upsample(dtype: torch.dtype, cuda_kernels: str) -> None:
    """Folded, and where the kernel is none that can be."""
    for seed, case in enumerate(
        (ODD[0], ODD[1], ODD[4], (1, 64, 3, 5, 24, 3, 1, 1), (2, 8, 3, 9, 72, 3, 1, 1))
    ):
        for multiprocessors in (1, 132):
            with device(90, multiprocessors):
                check(*on_device(case, dtype, cuda_kernels, upsample=True), str(case), seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_sources(dtype: torch.dtype, cuda_kernels: str) -> None:
    """With each kind of kernel."""
    cases = (
        *((case, first, upsample) for case, first in ((ODD[0], 1), (ODD[5], 7)) for upsample in (False, True)),
        (ODD[8], 16, False), (SPLIT, 72, False), ((2, 48, 5, 4, 20, 1, 1, 0), 32, False),
    )  # fmt: skip
    checks.two_sources(cuda, references, cases, dtype, cuda_kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_addition_alone(dtype: torch.dtype, cuda_kernels: str) -> None:
    for case in (ODD[2], SPLIT):
        args, keywords = on_device(case, dtype, cuda_kernels)
        bare = (*args[:2], None, *args[3:])
        for name in ("time_embedding", "residual"):
            check(bare, {name: keywords[name]}, name)
        check(args, {}, "bias")


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype: torch.dtype, offset: float, cuda_kernels: str) -> None:
    """Of one launch, of a split K, of four phases."""
    cases = (
        ((2, 16, 13, 11, 40, 1, 2, 0), 8, False),  # groups of 5 channels, tiles that are not full
        ((2, 16, 9, 11, 160, 1, 1, 0), 40, False),
        ((1, 8, 20, 17, 70, 1, 1, 0), 7, False),
        (SPLIT, 4, False),
        ((2, 9, 5, 7, 6, 3, 1, 1), 2, True),
    )
    checks.statistics(cuda, reordered(2), cases, dtype, cuda_kernels, offset)


def with_norm(case: tuple, dtype: torch.dtype, where: str, groups: int) -> tuple[tuple, dict[str, object]]:
    """Operands whose x has a mean, and the composite's keywords of a norm over it."""
    (x, *args), _ = on_device(case, dtype, where)
    norm_weight, norm_bias = (torch.randn(2, x.shape[1]) + 1).to(where, dtype).unbind()
    named = {"norm_groups": groups, "norm_weight": norm_weight, "norm_bias": norm_bias}
    return (x * 3 + 2, *args), named


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_prologue(dtype: torch.dtype, silu: bool, cuda_kernels: str) -> None:
    """While tiles are loaded, where statistics are known; else before. Where a pixel is padding it stays zero."""
    for case, first, groups in (
        ((2, 48, 7, 9, 20, 1, 1, 0), 48, 3), ((2, 30, 9, 8, 40, 1, 1, 0), 17, 3), (ODD[2], 33, 3), (ODD[2], 20, 3),
        (ODD[8], 16, 4), (SPLIT, 128, 32), ((1, 16, 4, 5, 328, 3, 1, 1), 16, 8),
    ):  # fmt: skip
        (x, *args), named = with_norm(case, dtype, cuda_kernels, groups)
        expected = references((x, *args), {**named, "norm_silu": silu})
        norm = NormPrologue(groups, named["norm_weight"], named["norm_bias"], silu=silu)
        skip = {} if first == x.shape[1] else {"skip": x[:, first:]}
        for known in (None, group_statistics(x, groups, 1e-5)):
            y = cuda(x[:, :first], *args, norm=norm._replace(statistics=known), **skip)
            assert_within_budget(y, *expected, what=f"{case}, {first} channels, known: {known is not None}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_the_kernel(dtype: torch.dtype, cuda_kernels: str) -> None:
    """Whatever Python would choose: through an upsample, of 320 channels, and of more than it takes for y."""
    for case, groups, upsample in (
        ((1, 320, 4, 4, 72, 3, 1, 1), 32, False),
        ((1, 24, 5, 7, 16, 3, 1, 1), 2, True),
    ):
        (x, weight, bias, stride, padding), named = with_norm(case, dtype, cuda_kernels, groups)
        mean, rstd = group_statistics(x, groups, 1e-5)
        values = ops._conv2d_cpu.fold(weight).to(dtype) if upsample else weight
        norm = [mean, rstd, named["norm_weight"], named["norm_bias"]]
        operands = (x, values, bias, stride, list(padding), upsample, None, None, None, norm, True)
        named |= {"norm_silu": True, "upsample": upsample}
        expected = references((x, weight, bias, stride, padding), named)
        for seed, multiprocessors in enumerate((1, 132)):
            with device(90, multiprocessors), thread_order(seed):
                actual = torch.ops.sdfast.conv2d_kernel_cuda(*operands)
            assert_within_budget(actual, *expected, what=str(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_strides(dtype: torch.dtype, cuda_kernels: str) -> None:
    checks.layouts_and_strides(cuda, (2, 40, 9, 8, 24, 3, 1, 1), dtype, cuda_kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stays_within_its_tensors(dtype: torch.dtype, cuda_kernels: str, poisoned_memory: None) -> None:
    """What is read at once where it is aligned, here is not."""
    for case in ((2, 24, 5, 7, 16, 3, 1, 1), SPLIT, (1, 20, 5, 7, 18, 3, 1, 1)):
        checks.stays_within_its_tensors(cuda, case, 2, dtype, cuda_kernels)


def test_a_nan_reaches_only_its_neighbours(cuda_kernels: str) -> None:
    checks.a_nan_reaches_only_its_neighbours(cuda, torch.float16, cuda_kernels)


def test_weights_are_read_where_they_lie(cuda_kernels: str) -> None:
    checks.weights_are_read_where_they_lie(cuda, ODD[2], torch.float16, cuda_kernels)


def test_opcheck(cuda_kernels: str) -> None:
    (x, weight, bias, stride, padding), keywords = on_device(
        (1, 20, 4, 5, 12, 3, 1, 1), torch.float16, cuda_kernels
    )
    added = (keywords["time_embedding"], keywords["residual"])
    norm = [*group_statistics(x, 2, 1e-5), x[0, :, 0, 0].clone(), x[0, :, 0, 1].clone()]
    operands = (x, weight, bias, stride, list(padding), False, *added, None, norm, False)
    torch.library.opcheck(torch.ops.sdfast.conv2d_statistics_cuda, (*operands, 3, 1e-5))
    sources = (t.clone(memory_format=LAYOUT) for t in (x[:, :12], x[:, 12:]))
    operands = (next(sources), weight, bias, stride, list(padding), False, *added, next(sources), [], False)
    torch.library.opcheck(torch.ops.sdfast.conv2d_kernel_cuda, operands)
    values = torch.randn(4, 12, 2, 2, 20, device=cuda_kernels, dtype=torch.float16)
    folded = (x, values, None, 1, [1] * 4, True, None, None, None, [], False)
    torch.library.opcheck(torch.ops.sdfast.conv2d_kernel_cuda, folded)


def test_compiles_whole(cuda_kernels: str) -> None:
    args, keywords = on_device((1, 32, 5, 4, 40, 3, 1, 1), torch.float16, cuda_kernels)

    def run(x: Tensor) -> Tensor:
        y, mean, _ = cuda(x[:, :20], *args[1:], **keywords, skip=x[:, 20:], stats_groups=4)
        return cuda(y * mean.sum(), args[1][:, :1].repeat(1, 40, 1, 1), padding=1, upsample=True)

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(args[0]), run(args[0]))


@torch.no_grad()
def test_who_is_served_by_it(cuda_kernels: str) -> None:
    x, weight = (torch.randn(8, 16, *size, device=cuda_kernels).half() for size in ((4, 4), (3, 3)))
    with dispatch.use_backend("cuda"):
        assert reads_skip(x, weight) and not reads_skip(x.double(), weight)
        named = ops.conv2d(x, weight, padding=1)
        large = weight.repeat(1, 1, 2, 2)
        assert torch.equal(ops.conv2d(x, large, padding=3), ops.conv2d(x, large, padding=3, backend="torch"))
        with torch.enable_grad():
            assert not reads_skip(x, weight)
            leaf = x.clone().requires_grad_()
            ops.conv2d(leaf, weight, padding=1).sum().backward()  # by torch
            assert leaf.grad is not None
    assert torch.equal(named, cuda(x, weight, padding=1))


def test_what_it_cannot_take_is_named(cuda_kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(1, 16, 6, 6, device=cuda_kernels), torch.randn(8, 16, 3, 3, device=cuda_kernels)
    for arguments, stride, reason in (
        ((x.double(), weight.double()), 1, "x is float64"),
        ((x[:0], weight), 1, "not empty"),
        ((x, weight.repeat(1, 1, 1, 2)), 1, "at most 3x3"),
        ((x, weight), 3, "stride 1 or 2"),
        ((x, weight.clone().requires_grad_()), 1, "give no gradient"),
    ):
        with pytest.raises(ValueError, match=reason):
            cuda(*arguments, None, stride, 2)
    monkeypatch.setattr("sdfast.ops._conv2d_cuda.product_precision", lambda *_: "ieee")
    with pytest.raises(ValueError, match="multiplies as tf32"):
        cuda(x, weight)
    operation = torch.ops.sdfast.conv2d_kernel_cuda
    more = ([1] * 4, False, None, None, None, [], False)
    for wrong in (
        (x, weight[:, :3], None, 1, *more),
        (x, weight.half(), None, 1, *more),
        (x, weight, x[0, 0, 0], 1, *more),
        (x, weight, None, 3, *more),
        (x, weight, None, 1, [1, 1, -1, 1], *more[1:]),
        (x, weight, None, 1, [0] * 4, True, *more[2:]),
    ):
        with pytest.raises(RuntimeError, match="expected|out of range|fit"):
            operation(*wrong)
