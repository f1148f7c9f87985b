"""Every CPU kernel on inputs of odd sizes, misaligned and between guards of NaN: the bits of the plain call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from guarded import Guards
from processes import run_with_library
from torch import Tensor

from sdfast import _library, dispatch, ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_kernels = pytest.mark.skipif(
    not _library.load_cpu_library().loaded, reason=_library.load_cpu_library().detail
)
pytestmark = needs_kernels

Results = Sequence[Tensor]
CALLS: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., Results]]] = {}


def on(*shapes: tuple[int, ...]) -> Callable[[Callable[..., Results]], Callable[..., Results]]:
    """The call below takes tensors of these shapes."""

    def add(call: Callable[..., Results]) -> Callable[..., Results]:
        CALLS[call.__name__] = shapes, call
        return call

    return add


def with_gradients(results: Callable[..., Tensor], *inputs: Tensor) -> Results:
    """The result and the gradient of every input, from an upstream gradient that is the first of them."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = results(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs[0])]


@on((3, 21, 5, 7), (21,), (21,), (3, 21), (3, 21))
def group_norm(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Results:
    def norm(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        more = {"activation": "silu", "scale": scale, "shift": shift}
        return ops.group_norm(x, 3, weight, bias, **more, backend="cpu")

    return with_gradients(norm, x, weight, bias, scale, shift)


@on((3, 21, 5, 7), (21,), (21,))
def group_norm_parts(x: Tensor, weight: Tensor, bias: Tensor) -> Results:
    moments = ops.group_norm_moments(x, 3, backend="cpu")
    y = ops.group_norm_apply(x, moments, 3, weight, bias, activation="silu", backend="cpu")
    return moments.mean, moments.squares, y


@on((5, 83), (83,), (83,))
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Results:
    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.layer_norm(x, (83,), weight, bias, backend="cpu")

    return with_gradients(norm, x, weight, bias)


@on((37, 45), (70, 45), (70,), (37, 70))
def linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Results:
    silu = ops.linear(x, weight, bias, activation="silu", residual=residual, backend="cpu")
    return silu, ops.linear(x, weight, bias, activation="geglu", residual=residual, backend="cpu")


@on((37, 45), (45, 45), (45,))
def linear_gradients(x: Tensor, weight: Tensor, bias: Tensor) -> Results:
    return with_gradients(
        lambda *tensors: ops.linear(*tensors, activation="gelu", backend="cpu"), x, weight, bias
    )


def convolve(stride: int, padding: int, x: Tensor, weight: Tensor, *added: Tensor) -> Results:
    names = ("bias", "time_embedding", "residual")
    keywords = dict(zip(names, added, strict=False))
    return [ops.conv2d(x, weight, stride=stride, padding=padding, **keywords, backend="cpu")]


# Exact: Winograd, called below, does not serve the views that guards make.
@on((2, 35, 7, 9), (37, 35, 3, 3), (37,), (2, 37), (2, 37, 7, 9))
def conv2d(x: Tensor, *others: Tensor) -> Results:
    with dispatch.use_numerics("exact"):
        upsampled = ops.conv2d(x, others[0], others[1], padding=1, upsample=True, backend="cpu")
        return [*convolve(1, 1, x, *others), *convolve(2, 1, x, *others[:3]), upsampled]


@on((2, 35, 7, 9), (35, 35, 3, 3), (35,))
def conv2d_gradients(x: Tensor, weight: Tensor, bias: Tensor) -> Results:
    with dispatch.use_numerics("exact"):
        return with_gradients(lambda *given: ops.conv2d(*given, padding=1, backend="cpu"), x, weight, bias)


@on((2, 35, 8, 9), (35, 35, 3, 3), (35,))
def conv2d_gradients_winograd(x: Tensor, weight: Tensor, bias: Tensor) -> Results:
    return with_gradients(lambda *tensors: ops.conv2d(*tensors, padding=1, backend="cpu"), x, weight, bias)


@on((2, 34, 7, 9), (37, 34, 1, 1), (37,), (2, 37), (2, 37, 7, 9))
def conv2d_1x1(*tensors: Tensor) -> Results:
    return convolve(1, 0, *tensors)


@on((2, 35, 7, 9), (7, 35, 3, 3), (7,), (2, 7), (2, 7, 7, 9))
def conv2d_to_few_channels(*tensors: Tensor) -> Results:
    return convolve(1, 1, *tensors)


@on((1, 33, 46, 47), (35, 33, 3, 3), (35,), (1, 35), (1, 35, 46, 47))
def conv2d_winograd(x: Tensor, weight: Tensor, *added: Tensor) -> Results:
    more = (added[0], 1, [1] * 4, False, *added[1:])
    algorithms = ("winograd4x4", "winograd4x4_unpacked")
    return [torch.ops.sdfast.conv2d_forward(x, weight, *more, algorithm) for algorithm in algorithms]


@on((2, 3, 35, 21), (2, 3, 43, 21), (2, 3, 43, 21))
def attention(q: Tensor, k: Tensor, v: Tensor) -> Results:
    causal = ops.attention(q, k, v, is_causal=True, backend="cpu")
    return causal, ops.attention(q, k, v, backend="cpu")


@on((3, 4, 5, 7), (6, 4, 5, 7), (3, 4, 5, 7), (3, 4, 5, 7))
def diffusion_step(sample: Tensor, model_output: Tensor, previous_x0: Tensor, noise: Tensor) -> Results:
    coefficients = torch.tensor([1.1, -0.9, 0.7, 0.2, 0.5, 0.3, 0.1])
    more = {"guidance_scale": 7.5, "previous_x0": previous_x0, "noise": noise, "clip": 1.5}
    return ops.diffusion_step(sample, model_output, coefficients, **more, backend="cpu")


@on((3, 4, 5, 7), (6, 4, 5, 7), (3, 4, 5, 7))
def diffusion_step_seeds(sample: Tensor, model_output: Tensor, previous_x0: Tensor) -> Results:
    coefficients = torch.tensor([1.1, -0.9, 0.7, 0.2, 0.5, 0.3, 0.1])
    more = {"guidance_scale": 7.5, "previous_x0": previous_x0, "seeds": torch.arange(3), "step": 2}
    return ops.diffusion_step(sample, model_output, coefficients, **more, backend="cpu")


@on((3, 4, 5, 7), (3, 4, 5, 7), (3, 4, 5, 7))
def reparameterize(mean: Tensor, logvar: Tensor, noise: Tensor) -> Results:
    def call(mean: Tensor, logvar: Tensor) -> Tensor:
        return ops.reparameterize(mean, logvar, noise, backend="cpu")

    return with_gradients(call, mean, logvar)


@on((3, 4, 5, 7), (3, 4, 5, 7), (3,), (3,))
def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Results:
    more = {"prediction": "v_prediction", "backend": "cpu"}
    return ops.add_noise(x0, noise, alpha.float(), sigma.float(), **more)


def arrangements(t: Tensor) -> dict[str, Tensor]:
    """The same values in memory otherwise."""
    last = t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t
    spread = t.new_empty((*t.shape[:-1], 2 * t.shape[-1] + 1))[..., 1::2].copy_(t)
    wider = t.new_empty((*t.shape[:-1], t.shape[-1] + 3))[..., : t.shape[-1]].copy_(t)
    return {"contiguous": t, "channels_last": last, "strided": spread, "wider": wider}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_reads_and_writes_nothing_beside(name: str, dtype: torch.dtype) -> None:
    shapes, call = CALLS[name]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    for arrangement in arrangements(tensors[0]):
        arranged = [arrangements(t)[arrangement] for t in tensors]
        expected = call(*arranged)
        for offset in (0, 1, 3):
            guards = Guards()
            results = call(*(guards.around(t, offset) for t in arranged))
            for actual, right in zip(results, expected, strict=True):
                assert actual.isfinite().all() and torch.equal(actual, right), (name, arrangement, offset)
            guards.check()


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa: str) -> None:
    run_with_library(isa, """
        import test_guarded as t
        for name in t.CALLS:
            for dtype in t.DTYPES:
                t.test_reads_and_writes_nothing_beside(name, dtype)
    """)  # fmt: skip
