"""add_noise's CUDA kernels: torch's bits, whatever the layout and the order of threads."""

import pytest
import torch
from elementwise import ARRANGEMENTS, SHAPES, arranged
from emulated_cuda import thread_order
from test_add_noise import levels, randn

from sdfast.ops import add_noise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_torchs(dtype, prediction, cuda_kernels):
    for shape in (*SHAPES, (2, 4, 64, 64)):
        x0, noise = (randn(*shape, seed=seed, dtype=dtype).to(cuda_kernels) for seed in range(2))
        alpha, sigma = (t.to(cuda_kernels) for t in levels(shape[0]))
        expected = add_noise(x0, noise, alpha, sigma, prediction=prediction, backend="torch")
        for seed, arrangement in enumerate(ARRANGEMENTS if len(shape) == 4 else ("contiguous",)):
            with thread_order(seed):
                given = arranged(x0, arrangement), arranged(noise, arrangement)
                results = add_noise(*given, alpha, sigma, prediction=prediction, backend="cuda")
            for a, b in zip(results, expected, strict=True):
                assert torch.equal(a, b)


def test_opcheck(cuda_kernels):
    image = torch.randn(2, 3, 4, 5, device=cuda_kernels)
    alpha, sigma = (t.to(cuda_kernels) for t in levels(2))
    for x in (image, image.to(memory_format=torch.channels_last), image[..., ::2]):
        for name in ("add_noise_cuda", "add_noise_velocity_cuda"):
            torch.library.opcheck(getattr(torch.ops.sdfast, name).default, (x, x, alpha, sigma))
