"""Which backends are asked first on a GPU: where that was measured, and where it was not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sdfast.ops._cuda_order import of_attention, of_convolution, of_linear
from sdfast.ops._triton import recording

KERNELS = ("triton", "cuda", "torch")


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def convolution(
    channels: int, size: int, kernel: int = 3, *, stride: int = 1, upsample: bool = False, **kind: torch.dtype
) -> tuple[str, ...]:
    x, weight = tensor(2, channels, size, size, **kind), tensor(64, channels, kernel, kernel, **kind)
    return of_convolution(x, weight, stride, upsample)


def linear(activation: str | None, **kind: torch.dtype) -> tuple[str, ...]:
    return of_linear(tensor(2, 64, 32, **kind), tensor(64, 32, **kind), activation)


def attention(keys: int, head_dim: int, **kind: torch.dtype) -> tuple[str, ...]:
    k = tensor(2, 8, keys, head_dim, **kind)
    return of_attention(tensor(2, 8, 4096, head_dim, **kind), k, k)


def test_on_hopper_half_precision_goes_where_it_was_fastest() -> None:
    with recording(90), FakeTensorMode(), torch.no_grad():
        for channels, size, kernel in ((320, 64, 3), (1280, 16, 3), (960, 64, 1), (4, 64, 3)):
            assert convolution(channels, size, kernel)[0] == "triton"
        for channels, size in ((512, 32), (1920, 32), (512, 128)):
            assert convolution(channels, size) == ("torch",)
            assert convolution(channels, size, upsample=True)[0] == "triton"
            assert convolution(channels, size, stride=2)[0] == "triton"
        assert linear("geglu") == ("cuda", "triton", "torch")
        assert linear(None) == linear("silu") == ("torch",)
        assert attention(77, 40) == attention(4096, 512) == KERNELS
        assert attention(4096, 40) == ("torch",)
        assert attention(77, 40, dtype=torch.float16) == KERNELS


@pytest.mark.parametrize(("architecture", "dtype"), [(80, torch.bfloat16), (90, torch.float32)])
def test_what_was_not_measured_is_torchs(architecture: int, dtype: torch.dtype) -> None:
    with recording(architecture), FakeTensorMode(), torch.no_grad():
        orders = (
            convolution(320, 64, dtype=dtype),
            linear("geglu", dtype=dtype),
            attention(77, 40, dtype=dtype),
        )
        assert orders == (("torch",),) * 3


def test_gradients_are_torchs() -> None:
    with recording(90), FakeTensorMode():
        x, weight, residual = tensor(2, 320, 8, 8), tensor(64, 320, 3, 3), tensor(2, 64, 8, 8)
        assert of_convolution(x, weight, 1, False, residual)[0] == "triton"
        assert of_convolution(x, weight, 1, False, residual.requires_grad_()) == ("torch",)
        with torch.no_grad():
            assert of_convolution(x, weight, 1, False, residual)[0] == "triton"
