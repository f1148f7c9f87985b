"""Which backends are asked first on a GPU: where that was measured, and where it was not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sdfast import _library, dispatch, ops, use_backend, use_memory
from sdfast.ops._cuda_order import of_attention, of_convolution, of_linear, of_norm
from sdfast.ops._triton import recording

KERNELS = ("triton", "cuda", "torch")
OF_TILES = ("cuda", "triton", "torch")


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def convolution(
    channels: int, size: int, kernel: int = 3, *, stride: int = 1, upsample: bool = False, **kind: torch.dtype
) -> tuple[str, ...]:
    x, weight = tensor(2, channels, size, size, **kind), tensor(64, channels, kernel, kernel, **kind)
    return of_convolution(x, weight, stride, upsample)


def linear(activation: str | None, **kind: torch.dtype) -> tuple[str, ...]:
    return of_linear(tensor(2, 64, 32, **kind), tensor(64, 32, **kind), activation, None, None)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA library that was built for 9.0a."""
    monkeypatch.setattr(_library, "_kernels", {*_library._kernels, ("hopper_units", "cuda")})


def attention(keys: int, head_dim: int, **kind: torch.dtype) -> tuple[str, ...]:
    k = tensor(2, 8, keys, head_dim, **kind)
    return of_attention(tensor(2, 8, 4096, head_dim, **kind), k, k)


def test_on_hopper_half_precision_goes_where_it_was_fastest() -> None:
    with recording(90), FakeTensorMode(), torch.no_grad():
        for channels, size, kernel in ((320, 64, 3), (1280, 16, 3), (960, 64, 1), (4, 64, 3)):
            assert convolution(channels, size, kernel)[0] == "triton"
        for channels, size in ((512, 32), (1920, 32), (512, 128)):
            assert convolution(channels, size) == ("torch",)
            assert convolution(channels, size, stride=2)[0] == "triton"
        assert convolution(512, 64, upsample=True)[0] == "triton"
        assert convolution(512, 32, upsample=True) == ("torch",)
        with use_memory("low"):
            assert convolution(512, 64, upsample=True) == ("torch",)
        assert linear("geglu") == ("cuda", "triton", "torch")
        assert linear(None) == linear("silu") == ("torch",)
        assert attention(77, 40) == attention(4096, 512) == KERNELS
        assert attention(4096, 40) == attention(77, 520) == ("torch",)
        assert of_norm(tensor(2, 320, 64, 64), None) == KERNELS
        assert attention(77, 40, dtype=torch.float16) == KERNELS


@pytest.mark.usefixtures("tiles")
def test_hoppers_own_units_serve_where_the_library_holds_them() -> None:
    with recording(90), FakeTensorMode(), torch.no_grad():
        for channels, size, kernel in ((320, 64, 3), (1280, 16, 3), (960, 64, 1), (512, 128, 3)):
            assert convolution(channels, size, kernel) == OF_TILES
        assert convolution(512, 32, upsample=True) == convolution(320, 64, stride=2) == OF_TILES
        assert convolution(4, 64)[0] == "triton"
        with use_memory("low"):
            assert convolution(512, 64, upsample=True) == ("torch",)
        assert attention(4096, 40) == OF_TILES
        assert attention(4096, 64) == ("torch",)
        q = tensor(2, 8, 4096, 40)
        assert of_attention(q, q, q, True) == of_attention(*[tensor(1, 1, 4096, 40)] * 3) == ("torch",)
        x, weight = tensor(2, 320, 64, 64), tensor(320, 320, 3, 3)
        assert of_convolution(x, weight, 1, False, plain=False)[0] == "triton"
        uneven = tensor(1, 12, 64, 64), tensor(64, 24, 3, 3)
        assert of_convolution(*uneven, 1, False)[0] == "triton"
        assert attention(77, 40) == attention(4096, 512) == KERNELS
        x, weight, bias, residual = tensor(2, 4096, 320), tensor(320, 320), tensor(320), tensor(2, 4096, 320)
        assert of_linear(x, weight, None, bias, residual) == OF_TILES
        assert of_linear(x, weight, None, bias, None) == ("torch",)
        few = tensor(2, 512, 320)
        assert of_linear(few, weight, None, bias, few) == ("torch",)
        one_round = tensor(2, 1024, 640), tensor(640, 640), None, tensor(640), tensor(2, 1024, 640)
        assert of_linear(*one_round) == OF_TILES
        wider = tensor(640, 320), None, tensor(640), tensor(2, 4096, 640)
        assert of_linear(x, *wider) == ("torch",)


@pytest.mark.usefixtures("tiles")
def test_other_gpus_have_no_such_units() -> None:
    with recording(80), FakeTensorMode(), torch.no_grad():
        assert convolution(320, 64) == attention(4096, 40) == linear("geglu") == ("torch",)


@pytest.mark.parametrize(("architecture", "dtype"), [(80, torch.bfloat16), (90, torch.float32)])
def test_what_was_not_measured_is_torchs(architecture: int, dtype: torch.dtype) -> None:
    with recording(architecture), FakeTensorMode(), torch.no_grad():
        orders = (
            convolution(320, 64, dtype=dtype),
            linear("geglu", dtype=dtype),
            attention(77, 40, dtype=dtype),
        )
        assert (*orders, of_norm(tensor(2, 32, dtype=dtype))) == (("torch",),) * 4


def test_gradients_are_torchs() -> None:
    with recording(90), FakeTensorMode():
        x, weight, residual = tensor(2, 320, 8, 8), tensor(64, 320, 3, 3), tensor(2, 64, 8, 8)
        assert of_convolution(x, weight, 1, False, residual)[0] == "triton"
        assert of_convolution(x, weight, 1, False, residual.requires_grad_()) == ("torch",)
        with torch.no_grad():
            assert of_convolution(x, weight, 1, False, residual)[0] == "triton"


def test_without_a_gpu_fake_tensors_are_torchs() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with FakeTensorMode(), torch.no_grad():
        assert convolution(320, 64) == linear("geglu") == of_norm(tensor(2, 320)) == ("torch",)
        y = ops.conv2d(tensor(1, 8, 4, 4), tensor(8, 8, 3, 3), padding=1)
        assert y.shape == (1, 8, 4, 4) and y.device.type == "cuda"


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...] | None]]:
    """The operations that ask who serves them, and the order that they ask in."""
    asked: list[tuple[str, tuple[str, ...] | None]] = []

    def choose(op: str, *_: object, order: tuple[str, ...] | None = None) -> str:
        asked.append((op, order))
        return "torch"

    monkeypatch.setattr(dispatch, "choose", choose)
    return asked


def test_operations_ask_in_this_order(choices: list[tuple[str, tuple[str, ...] | None]]) -> None:
    with recording(90), FakeTensorMode(), torch.no_grad():
        x, weight, tokens = tensor(2, 32, 8, 8), tensor(32, 32, 3, 3), tensor(2, 64, 32)
        q, k = tensor(2, 8, 64, 40), tensor(2, 8, 7, 40)
        ops.conv2d(x, weight, padding=1)
        assert not ops.reads_skip(x, weight)
        ops.group_norm(x, 4)
        ops.layer_norm(tokens, (32,))
        ops.linear(tokens, tensor(64, 32), activation="geglu")
        ops.attention(q, k, k)
        expected = [
            *[("conv2d", ("triton", "torch"))] * 3, ("group_norm", KERNELS), ("layer_norm", KERNELS),
            ("linear", ("cuda", "triton", "torch")), ("attention", KERNELS),
        ]  # fmt: skip
        assert choices == expected
        del choices[:]
        ops.conv2d(x, weight, padding=1, backend="torch")
        ops.group_norm(x, 4, backend="torch")
        with use_backend("torch"):
            ops.attention(q, k, k)
        assert {order for _, order in choices} == {None}
