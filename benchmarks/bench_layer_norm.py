"""layer_norm against eager torch at the LayerNorms of Stable Diffusion 1.5, fp32 and bf16.

    python benchmarks/bench_layer_norm.py [--output FILE] [--rounds N] [--threads N]
    pytest benchmarks/bench_layer_norm.py

Every result is checked against fp64 before it is timed. Eager and sdfast take turns in one process, and with
them a copy of x: the time that reading x once and writing y once takes in this moment (`of_copy`).
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
from sdfast.testing import assert_within_budget, copy_gb_per_s

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from _beside_eager import measure_beside_eager  # noqa: E402
from _record import results_path, table, write_json  # noqa: E402

# (N, L, C): the transformer blocks of the U-Net (64x64 latent, guided batch of 2) and of the text encoder.
SHAPES = ((2, 4096, 320), (2, 1024, 640), (2, 256, 1280), (2, 64, 1280), (2, 77, 768))


class Call:
    """The arguments of one setting, and the two ways to compute it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.width = shape[-1]
        self.x = (torch.randn(shape) * 2 + 0.5).to(dtype)
        self.weight, self.bias = torch.randn(self.width).to(dtype), torch.randn(self.width).to(dtype)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.weight, self.bias

    def eager(self) -> Tensor:
        return F.layer_norm(self.x, (self.width,), self.weight, self.bias)

    def sdfast(self) -> Tensor:
        return ops.layer_norm(self.x, (self.width,), self.weight, self.bias)

    def check(self) -> None:
        x, weight, bias = (t.detach().double() for t in self.leaves)
        with torch.no_grad():
            exact = F.layer_norm(x, (self.width,), weight, bias)
            assert_within_budget(self.sdfast(), self.eager(), exact)


def measure(
    shape: tuple[int, ...], dtype: torch.dtype, rounds: int, training: bool = False
) -> dict[str, object]:
    """Check and time one setting. Bytes: forward x and y once; training, forward and then x, dy and dx."""
    call = Call(shape, dtype)
    call.check()
    eager: Callable[[], object] = call.eager
    fast: Callable[[], object] = call.sdfast
    if training:
        dy = torch.randn_like(call.x)
        for leaf in call.leaves:
            leaf.requires_grad_()
        eager = lambda: torch.autograd.grad(call.eager(), call.leaves, dy)  # noqa: E731
        fast = lambda: torch.autograd.grad(call.sdfast(), call.leaves, dy)  # noqa: E731
    times = measure_beside_eager(
        eager, fast, like=call.x, passes=5 if training else 2, rounds=rounds, training=training
    )
    return {
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "training": training,
        **times,
    }


COLUMNS = {
    "shape": "", "dtype": "", "training": "", "eager_ms": ".3f", "sdfast_ms": ".3f", "sdfast_p20_ms": ".3f",
    "sdfast_p80_ms": ".3f", "ratio": ".2f", "ratio_p20": ".2f", "gb_per_s": ".1f", "of_copy": ".0%",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=results_path("layer_norm"))
    parser.add_argument(
        "--rounds", type=int, default=30, help="of a setting of 64 MiB; smaller ones take more"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bandwidth = copy_gb_per_s(2**27)
    print(f"{options.threads} threads, copy {bandwidth:.1f} GB/s (128 MiB)")
    rows = [
        measure(shape, dtype, options.rounds, training)
        for training in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
        for shape in SHAPES
    ]
    print(table(rows, COLUMNS))
    write_json(options.output, rows, copy_gb_per_s=bandwidth)
    print(f"\nwritten to {options.output}")


@pytest.mark.parametrize("way", ["eager", "sdfast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_layer_norm(
    benchmark: Callable[..., object], shape: tuple[int, ...], dtype: torch.dtype, way: str
) -> None:
    call = Call(shape, dtype)
    call.check()
    with torch.no_grad():
        benchmark(getattr(call, way))


if __name__ == "__main__":
    main()
