"""group_norm against eager torch at every GroupNorm of Stable Diffusion 1.5, channels last, fp32 and bf16.

    python benchmarks/bench_group_norm.py [--output FILE] [--rounds N] [--threads N]
    pytest benchmarks/bench_group_norm.py

Every result is checked against fp64 before it is timed. Eager and sdfast take turns in one process, and with
them a copy of x: the time that reading x once and writing y once takes in this moment (`of_copy`). Copy
writes to memory it has; eager and sdfast allocate their result, as in a model.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sdfast.ops as ops
from sdfast.ops.group_norm import group_norm_torch
from sdfast.testing import assert_within_budget, copy_gb_per_s

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from _beside_eager import measure_beside_eager  # noqa: E402
from _record import results_path, table, write_json  # noqa: E402

# (N, C, H, W), eps and whether SiLU follows: the calls of diffusers' UNet2DConditionModel in its SD 1.5
# configuration (64x64 latent, guided batch of 2) ...
UNET = (
    *((shape, 1e-5, True) for shape in (
        (2, 320, 64, 64), (2, 640, 64, 64), (2, 960, 64, 64),
        (2, 320, 32, 32), (2, 640, 32, 32), (2, 960, 32, 32), (2, 1280, 32, 32), (2, 1920, 32, 32),
        (2, 640, 16, 16), (2, 1280, 16, 16), (2, 1920, 16, 16), (2, 2560, 16, 16),
        (2, 1280, 8, 8), (2, 2560, 8, 8),
    )),
    *((shape, 1e-6, False) for shape in (
        (2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (2, 1280, 8, 8),
    )),
)  # fmt: skip
# ... and of its AutoencoderKL, encoding and decoding 512x512. The last is the attention's.
VAE = (
    *((shape, 1e-6, True) for shape in (
        (1, 128, 512, 512), (1, 256, 512, 512), (1, 128, 256, 256), (1, 256, 256, 256), (1, 512, 256, 256),
        (1, 256, 128, 128), (1, 512, 128, 128), (1, 512, 64, 64),
    )),
    ((1, 512, 64, 64), 1e-6, False),
)  # fmt: skip
TRAINING = tuple(((shape, 1e-5, True)) for shape in ((2, 320, 64, 64), (2, 1280, 16, 16), (1, 256, 256, 256)))
GROUPS = 32

Setting = tuple[tuple[int, ...], float, bool]


class Call:
    """The arguments of one setting, and the two ways to compute it."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        self.shape, self.eps, self.silu = setting
        torch.manual_seed(0)
        channels = self.shape[1]
        self.x = (torch.randn(self.shape) * 2 + 0.5).to(dtype).to(memory_format=torch.channels_last)
        self.weight, self.bias = torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)

    def eager(self) -> Tensor:
        y = F.group_norm(self.x, GROUPS, self.weight, self.bias, self.eps)
        return F.silu(y) if self.silu else y

    def sdfast(self) -> Tensor:
        activation = "silu" if self.silu else None
        return ops.group_norm(self.x, GROUPS, self.weight, self.bias, self.eps, activation=activation)

    def gradients(self, forward: Callable[[], Tensor], dy: Tensor) -> tuple[Tensor, ...]:
        leaves = self.x, self.weight, self.bias
        return torch.autograd.grad(forward(), leaves, dy)

    def require_gradients(self) -> None:
        for tensor in (self.x, self.weight, self.bias):
            tensor.requires_grad_()

    def check(self) -> None:
        """The part of the image that fp64 can take in a moment decides for all of it."""
        rows = max(1, min(self.shape[2], 2**20 // (self.shape[1] * self.shape[3])))
        part = Call.__new__(Call)
        part.__dict__ = {**self.__dict__, "x": self.x.detach()[:, :, :rows]}
        arguments = (part.x.double(), GROUPS, part.weight.double(), part.bias.double(), self.eps)
        with torch.no_grad():
            exact = group_norm_torch(*arguments, silu=self.silu)
            assert_within_budget(part.sdfast(), part.eager(), exact)


def measure(setting: Setting, dtype: torch.dtype, rounds: int, training: bool = False) -> dict[str, object]:
    """Check and time one setting. Bytes: forward x and y once; training, forward and then x, dy and dx."""
    call = Call(setting, dtype)
    call.check()
    eager: Callable[[], object] = call.eager
    fast: Callable[[], object] = call.sdfast
    if training:
        dy = torch.randn_like(call.x)
        call.require_gradients()
        eager = lambda: call.gradients(call.eager, dy)  # noqa: E731
        fast = lambda: call.gradients(call.sdfast, dy)  # noqa: E731
    times = measure_beside_eager(
        eager, fast, like=call.x, passes=5 if training else 2, rounds=rounds, training=training
    )
    return {
        "shape": "x".join(map(str, call.shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "silu": call.silu,
        "training": training,
        **times,
    }


COLUMNS = {
    "shape": "", "dtype": "", "silu": "", "eager_ms": ".3f", "sdfast_ms": ".3f", "sdfast_p20_ms": ".3f",
    "sdfast_p80_ms": ".3f", "ratio": ".2f", "ratio_p20": ".2f", "gb_per_s": ".1f", "of_copy": ".0%",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=results_path("group_norm"))
    parser.add_argument(
        "--rounds", type=int, default=30, help="of a setting of 64 MiB; smaller ones take more"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bandwidth = copy_gb_per_s(2**27)
    print(f"{options.threads} threads, copy {bandwidth:.1f} GB/s (128 MiB)")
    rows: list[dict[str, object]] = []
    for title, settings, training in (
        ("U-Net", UNET, False),
        ("VAE", VAE, False),
        ("training", TRAINING, True),
    ):
        part = [
            measure(setting, dtype, options.rounds, training)
            for dtype in (torch.float32, torch.bfloat16)
            for setting in settings
        ]
        print(f"\n{title}\n{table(part, COLUMNS)}", flush=True)
        rows += [{"model": title, **row} for row in part]
    write_json(options.output, rows, copy_gb_per_s=bandwidth)
    print(f"\nwritten to {options.output}")


@pytest.mark.parametrize("way", ["eager", "sdfast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", [UNET[0], UNET[12], VAE[5]], ids=str)
def test_group_norm(benchmark: Callable[..., object], setting: Setting, dtype: torch.dtype, way: str) -> None:
    call = Call(setting, dtype)
    call.check()
    with torch.no_grad():
        benchmark(getattr(call, way))


if __name__ == "__main__":
    main()
