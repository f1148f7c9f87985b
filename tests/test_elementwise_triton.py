"""add_noise and reparameterize in Triton: against fp64, their layouts and gradients."""

import pytest
import torch
from elementwise import arranged, check_results
from test_add_noise import levels, randn

from sdfast.ops import add_noise, reparameterize
from sdfast.ops._elementwise_triton import config
from sdfast.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((2, 4, 9, 7), (1, 17, 1, 1), (3, 5, 33), (2,), (2, 0, 4), (0, 3), (2, 4, 33, 40))


def noised(tensors, backend):
    alpha, sigma = (t.to(DEVICE) for t in levels(len(tensors[0])))
    return add_noise(*tensors[:2], alpha, sigma, prediction="v_prediction", backend=backend)


def noised_alone(tensors, backend):
    alpha, sigma = (t.to(DEVICE) for t in levels(2 * len(tensors[0]), torch.float64))
    return add_noise(*tensors[:2], alpha[::2], sigma[::2], backend=backend)[:1]


def sampled(tensors, backend):
    return [reparameterize(*tensors, backend=backend)]


def gradients(tensors, backend):
    mean, logvar = (t.detach().requires_grad_() for t in tensors[:2])
    z = reparameterize(mean, logvar, tensors[2], backend=backend)
    return torch.autograd.grad(z, (mean, logvar), tensors[2] + 1)


CALLS = (noised, noised_alone, sampled, gradients)


def make(shape, dtype):
    return [randn(*shape, seed=seed, dtype=dtype).to(DEVICE) for seed in range(3)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_fp64(call, dtype):
    for shape in SHAPES:
        tensors = make(shape, dtype)
        results = check_results(call, tensors, "triton")
        for a, b in zip(results, call(tensors, "triton"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("call", CALLS)
def test_layouts_give_the_same_bits(call):
    tensors = make((2, 4, 9, 7), torch.float32)
    expected = call(tensors, "triton")
    for arrangement in ("channels_last", "channel_slice", "strided", "transposed", "misaligned"):
        for mixed in (slice(None), slice(1), slice(1, None)):
            given = list(tensors)
            given[mixed] = [arranged(t, arrangement) for t in tensors[mixed]]
            for a, b in zip(call(given, "triton"), expected, strict=True):
                assert torch.equal(a, b)


def test_expanded_inputs():
    x, z = randn(1, 3, 5).to(DEVICE), randn(3, 3, 5, seed=1).to(DEVICE)
    given = [z, x.expand(3, 3, 5), x[:, :1].expand(3, 3, 5)]
    for call in CALLS:
        for a, b in zip(call(given, "triton"), call([t.contiguous() for t in given], "triton"), strict=True):
            assert torch.equal(a, b)


def test_outliers_of_logvar():
    """Clamped: they neither overflow nor have a gradient, and NaN is kept."""
    logvar = torch.tensor([-40.0, -30, 0, 20, 21, float("nan")], device=DEVICE)
    tensors = [torch.ones_like(logvar), logvar, torch.full_like(logvar, 0.5)]
    for call in (sampled, gradients):
        exact = call([t.double() for t in tensors], "torch")
        for a, b, c in zip(call(tensors, "triton"), call(tensors, "torch"), exact, strict=True):
            assert_within_budget(a, b, c)


def test_scalar():
    tensors = [torch.tensor(v, device=DEVICE) for v in (0.5, -1.0, 2.0)]
    for call in (sampled, gradients):
        check_results(call, tensors, "triton")


def test_opcheck():
    image = torch.randn(2, 3, 4, 5, device=DEVICE)
    alpha, sigma = (t.to(DEVICE) for t in levels(2))
    for x in (image, image.to(memory_format=torch.channels_last), image[..., ::2]):
        for name in ("add_noise_triton", "add_noise_velocity_triton"):
            torch.library.opcheck(getattr(torch.ops.sdfast, name).default, (x, x, alpha, sigma))
        for name in ("reparameterize_triton", "reparameterize_backward_triton"):
            torch.library.opcheck(getattr(torch.ops.sdfast, name).default, (x, x, x))


def test_one_program_for_all_resolutions():
    """A size of block for each would be compiled for each."""
    assert len({str(config(n, 4 * side * side)[1]) for n in (1, 8) for side in range(8, 257)}) == 1
    assert config(2, 257)[0] == (4,)
