"""reparameterize's CUDA kernels against fp64: layouts, outliers, gradients, any order of threads."""

import pytest
import torch
from elementwise import ARRANGEMENTS, DTYPES, SHAPES, arranged, check_results
from emulated_cuda import thread_order
from test_reparameterize import randn

from sdfast.ops import reparameterize
from sdfast.testing import assert_within_budget


def sampled(tensors, backend):
    return [reparameterize(*tensors, backend=backend)]


def gradients(tensors, backend):
    mean, logvar = (t.detach().requires_grad_() for t in tensors[:2])
    z = reparameterize(mean, logvar, tensors[2], backend=backend)
    return torch.autograd.grad(z, (mean, logvar), tensors[2] + 1)


CALLS = (sampled, gradients)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_fp64(call, dtype, cuda_kernels):
    for seed, shape in enumerate((*SHAPES, (), (2,), (2, 4, 64, 64))):
        tensors = [randn(*shape, seed=i, dtype=dtype).to(cuda_kernels) for i in range(3)]
        results = check_results(call, tensors, "cuda")
        with thread_order(seed):
            again = call(tensors, "cuda")
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


@pytest.mark.parametrize("call", CALLS)
def test_layouts_give_the_same_bits(call, cuda_kernels):
    for dtype in (torch.float32, torch.float16):
        tensors = [randn(2, 4, 9, 8, seed=i, dtype=dtype).to(cuda_kernels) for i in range(3)]
        expected = call(tensors, "cuda")
        for arrangement in ARRANGEMENTS:
            for mixed in (slice(None), slice(1), slice(1, None)):
                given = list(tensors)
                given[mixed] = [arranged(t, arrangement) for t in tensors[mixed]]
                for a, b in zip(call(given, "cuda"), expected, strict=True):
                    assert torch.equal(a, b)
        given = [tensors[0], *(t[:1].expand(2, 4, 9, 8) for t in tensors[1:])]
        for a, b in zip(call(given, "cuda"), call([t.contiguous() for t in given], "cuda"), strict=True):
            assert torch.equal(a, b)


def test_outliers_of_logvar(cuda_kernels):
    """Clamped: they neither overflow nor have a gradient, and NaN is kept."""
    values = [-1e4, -30.001, -30.0, -29.9, 0.0, 19.9, 20.0, 20.001, 1e4, *map(float, ("inf", "-inf", "nan"))]
    logvar = torch.tensor(values, device=cuda_kernels)
    tensors = [torch.ones_like(logvar), logvar, torch.full_like(logvar, 0.5)]
    for call in CALLS:
        exact, eager = call([t.double() for t in tensors], "torch"), call(tensors, "torch")
        for result, by_torch, right in zip(call(tensors, "cuda"), eager, exact, strict=True):
            assert_within_budget(result, by_torch, right)
            assert torch.equal(result == 0, by_torch == 0)


def test_opcheck(cuda_kernels):
    image = torch.randn(2, 3, 4, 5, device=cuda_kernels)
    for x in (image, image.to(memory_format=torch.channels_last), image[..., ::2], image[0, 0, 0, 0]):
        for name in ("reparameterize_cuda", "reparameterize_backward_cuda"):
            torch.library.opcheck(getattr(torch.ops.sdfast, name).default, (x, x, x))


def test_what_is_unsafe_is_refused_by_the_operation_itself(cuda_kernels):
    x = torch.randn(2, 3, device=cuda_kernels)
    for name in ("reparameterize_cuda", "reparameterize_backward_cuda"):
        for args in [(x, x[:1], x), (x, x, x[0]), (x, x.half(), x), (x.double(),) * 3]:
            with pytest.raises(RuntimeError):
                getattr(torch.ops.sdfast, name)(*args)
