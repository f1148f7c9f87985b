"""conv2d against eager torch at the convolutions of Stable Diffusion 1.5 (U-Net, VAE decoder), fp32 and bf16.

    python benchmarks/bench_conv2d.py [--output FILE] [--rounds N] [--threads N]
    pytest benchmarks/bench_conv2d.py

Channels last on both sides. Every result is checked before it is timed: the direct kernel within the budget
of `sdfast.testing`, Winograd's error against fp64 within 5e-5. "sdfast" is what a model gets, "exact" what
`sdfast.use_numerics("exact")` gives. Rates count the direct algorithm's operations. The process keeps freed
memory (`sdfast.memory.keep_freed_memory`): both sides are faster so.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sdfast
import sdfast.ops as ops
from sdfast.memory import keep_freed_memory
from sdfast.ops.conv2d import conv2d_torch
from sdfast.testing import assert_within_budget, relative_error

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from _beside_eager import PRODUCT_COLUMNS, measure_products  # noqa: E402
from _record import results_path, table, write_json  # noqa: E402

# N, C_in, size, C_out, kernel, stride, and whether a nearest-2x upsample comes before.
UNET = (
    *((2, channels, 64, 320, 3, 1, False) for channels in (320, 640, 960)),
    (2, 320, 64, 320, 3, 2, False), (2, 960, 64, 320, 1, 1, False),
    *((2, channels, 32, 640, 3, 1, False) for channels in (320, 640, 960, 1280, 1920)),
    (2, 640, 32, 640, 3, 2, False), (2, 640, 32, 640, 3, 1, True),
    *((2, channels, 16, 1280, 3, 1, False) for channels in (640, 1280, 1920, 2560)),
    (2, 1280, 16, 1280, 3, 1, True),
    *((2, channels, 8, 1280, 3, 1, False) for channels in (1280, 2560)), (2, 1280, 8, 1280, 3, 1, True),
)  # fmt: skip
VAE = (
    (1, 512, 64, 512, 3, 1, False), (1, 512, 64, 512, 3, 1, True), (1, 512, 128, 512, 3, 1, False),
    (1, 512, 128, 512, 3, 1, True), (1, 512, 256, 256, 3, 1, False), (1, 256, 256, 256, 3, 1, False),
    (1, 256, 256, 256, 3, 1, True), (1, 256, 512, 128, 3, 1, False), (1, 128, 512, 128, 3, 1, False),
)  # fmt: skip

Setting = tuple[int, int, int, int, int, int, bool]


class Call:
    """The arguments of one setting, and the ways to compute it."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        images, channels, size, out_channels, kernel, self.stride, self.upsample = setting
        last = torch.channels_last
        self.x = torch.randn(images, channels, size, size).to(dtype).to(memory_format=last)
        weight = torch.randn(out_channels, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
        self.weight, self.bias = weight.to(dtype).to(memory_format=last), torch.randn(out_channels).to(dtype)
        self.padding = kernel // 2

    @property
    def flops(self) -> int:
        side = self.x.shape[2] * (2 if self.upsample else 1) // self.stride
        return 2 * self.x.shape[0] * side**2 * self.weight.numel()

    def eager(self) -> Tensor:
        sides = (self.padding,) * 4
        return conv2d_torch(self.x, self.weight, self.bias, self.stride, sides, upsample=self.upsample)

    def sdfast(self) -> Tensor:
        y = ops.conv2d(self.x, self.weight, self.bias, self.stride, self.padding, upsample=self.upsample)
        assert isinstance(y, Tensor)
        return y

    def exact(self) -> Tensor:
        with sdfast.use_numerics("exact"):
            return self.sdfast()

    def check(self) -> None:
        """A corner of the picture and a few of its channels, at fp64, decide for all."""
        part = Call.__new__(Call)
        few = slice(0, 16)
        wide = {"x": self.x[:1, :, :8, :8].double(), "weight": self.weight[few].double()}
        part.__dict__ = {**self.__dict__, **wide, "bias": self.bias[few].double()}
        corner = (slice(0, 1), few, slice(0, 3), slice(0, 3))
        exact, eager = part.eager()[corner], self.eager()[corner]
        assert_within_budget(self.exact()[corner], eager, exact)
        half = 1.5 * relative_error(eager, exact)
        allowed = 5e-5 if self.x.dtype == torch.float32 else half
        assert relative_error(self.sdfast()[corner], exact) <= allowed


def measure(setting: Setting, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """Check and time one setting."""
    call = Call(setting, dtype)
    call.check()
    ways = {"eager": call.eager, "sdfast": call.sdfast, "exact": call.exact}
    times = measure_products(ways, flops=call.flops, dtype=dtype, rounds=rounds)
    images, channels, size, out_channels, kernel, stride, upsample = setting
    return {
        "shape": f"{images}x{channels}x{size}x{size} to {out_channels}",
        "kernel": f"{kernel}x{kernel}" + (f" stride {stride}" if stride > 1 else ""),
        "upsample": upsample,
        "dtype": str(dtype).removeprefix("torch."),
        **times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=results_path("conv2d"))
    parser.add_argument("--rounds", type=int, default=20, help="of 8 GFLOP; smaller settings take more")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows: list[dict[str, object]] = []
    for title, settings in (("U-Net", UNET), ("VAE", VAE)):
        part = [
            measure(setting, dtype, options.rounds)
            for dtype in (torch.float32, torch.bfloat16)
            for setting in settings
        ]
        columns = {"shape": "", "kernel": "", "upsample": "", "exact_ms": ".3f", **PRODUCT_COLUMNS}
        print(f"\n{title}\n{table(part, columns)}", flush=True)
        rows += [{"model": title, **row} for row in part]
    write_json(options.output, rows)
    print(f"\nwritten to {options.output}")


@pytest.mark.parametrize("way", ["eager", "sdfast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", [UNET[0], UNET[13], VAE[0]], ids=str)
def test_conv2d(benchmark: Callable[..., object], setting: Setting, dtype: torch.dtype, way: str) -> None:
    call = Call(setting, dtype)
    call.check()
    with torch.no_grad():
        benchmark(getattr(call, way))


if __name__ == "__main__":
    main()
