"""Products under autocast on CPU: what kernels make of the same tensors in autocast's dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from gradients import gradients
from test_linear import needs_kernel
from torch import Tensor

from sdfast import ops, packing
from sdfast.diffusion import NoiseSchedule
from sdfast.ops.conv2d import NormPrologue

pytestmark = needs_kernel
DTYPES = (torch.bfloat16, torch.float16)


def drawn(*shapes: Sequence[int]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.linear(x, weight, bias, activation="geglu", backend="cpu")


def conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = ops.conv2d(x, weight, bias, padding=1, upsample=True, backend="cpu")
    assert isinstance(y, Tensor)
    return y


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.attention(q, k, v, backend="cpu")


CALLS = {
    "linear": (linear, ((5, 7, 24), (34, 24), (34,)), (5, 7, 17)),
    "conv2d": (conv2d, ((2, 40, 6, 5), (36, 40, 3, 3), (36,)), (2, 36, 12, 10)),
    "attention": (attention, ((2, 3, 9, 16), (2, 3, 11, 16), (2, 3, 11, 16)), (2, 3, 9, 16)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_kernels_take_cast_tensors(name: str, dtype: torch.dtype) -> None:
    call, shapes, shape = CALLS[name]
    tensors, (dy,) = drawn(*shapes), drawn(shape)

    def autocast(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return call(*given)

    def cast(*given: Tensor) -> Tensor:
        return call(*(t.to(dtype) for t in given))

    found, expected = gradients(autocast, tensors, dy), gradients(cast, tensors, dy)
    assert found[0].dtype is dtype and all(g.dtype is torch.float32 for g in found[1:])
    assert all(map(torch.equal, found, expected))


def test_a_norm_in_front_keeps_its_parameters() -> None:
    x, weight, scale, shift = drawn((1, 64, 6, 5), (32, 64, 3, 3), (64,), (64,))

    def fused(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = ops.conv2d(x, weight, padding=1, norm=NormPrologue(32, scale, shift), backend="cpu")
        assert isinstance(y, Tensor)
        return y

    def apart(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normed = ops.group_norm(x, 32, scale, shift, 1e-5, activation="silu", backend="cpu")
        y = ops.conv2d(normed.bfloat16(), weight.bfloat16(), padding=1, backend="cpu")
        assert isinstance(y, Tensor)
        return y

    (dy,) = drawn((1, 32, 6, 5))
    results = (gradients(call, (x, weight, scale, shift), dy) for call in (fused, apart))
    assert all(map(torch.equal, *results))


def as_torch(call: Callable[..., Tensor], eager: Callable[..., Tensor], *tensors: Tensor) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = call(*tensors), eager(*tensors)
    assert found.dtype is expected.dtype and torch.equal(found, expected)


def test_what_decides_the_dtype_otherwise_is_torchs() -> None:
    """A residual in fp32, whose sum is; fp64, which autocast leaves alone."""
    x, weight, residual = drawn((5, 24), (34, 24), (5, 34))

    def eager(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight) + residual

    as_torch(lambda x, weight, residual: ops.linear(x, weight, residual=residual), eager, x, weight, residual)
    as_torch(ops.linear, torch.nn.functional.linear, x.double(), weight.double())


def test_inference_keeps_no_copy_of_a_cast_weight() -> None:
    x, weight = drawn((1, 64, 32, 32), (64, 64, 3, 3))
    packing.clear()

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, weight, padding=1)

    as_torch(lambda x, weight: ops.conv2d(x, weight, padding=1), eager, x, weight)
    assert packing.packed_bytes() == 0
    half = weight.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        served = ops.conv2d(x, half, padding=1, backend="cpu")
    assert isinstance(served, Tensor) and served.dtype is torch.bfloat16 and packing.packed_bytes() > 0


def test_a_norm_of_mixed_tensors_is_torchs() -> None:
    """x and skip of different dtypes, which autocast concatenates."""
    x, skip, weight, scale, shift = drawn((1, 32, 6, 5), (1, 32, 6, 5), (32, 64, 3, 3), (64,), (64,))
    x, half = x.bfloat16(), weight.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = ops.conv2d(x, half, padding=1, norm=NormPrologue(32, scale, shift), skip=skip)
        normed = torch.nn.functional.group_norm(torch.cat([x, skip], 1), 32, scale, shift)
        expected = torch.nn.functional.conv2d(torch.nn.functional.silu(normed), half, padding=1)
    assert isinstance(y, Tensor) and y.dtype is expected.dtype and torch.equal(y, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_training_compiles_whole(autocast: bool) -> None:
    """Weights of a size that kernels serve, in bf16, or in fp32 and cast."""
    x, wide, weight, dy = drawn((64, 1024), (2048, 1024), (64, 64, 3, 3), (1, 64, 32, 64))
    leaves = [t if autocast else t.bfloat16() for t in (x, wide, weight)]

    def step(x: Tensor, wide: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            image = ops.linear(x, wide).view(1, 64, 32, 64)
            y = ops.conv2d(image, weight, padding=1)
        assert isinstance(y, Tensor)
        return y

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = (gradients(call, leaves, dy) for call in (compiled, step))
    assert all(map(torch.equal, *results))


def test_formulas_cast_by_themselves() -> None:
    schedule = NoiseSchedule.linear()
    output, x_t, t = torch.randn(2, 4, 8, 8).bfloat16(), torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    with torch.autocast("cpu", torch.bfloat16):
        found = schedule.convert(output, x_t, t, to="sample")
    expected = schedule.convert(output.float(), x_t, t, to="sample")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


def test_operations_that_do_not_cast_say_so() -> None:
    x, alpha = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="noise: got dtype torch.bf"):
        ops.add_noise(x, x.bfloat16(), alpha, alpha)
