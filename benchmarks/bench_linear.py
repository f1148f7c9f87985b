"""linear against eager torch at the matrix products of Stable Diffusion 1.5's U-Net, fp32 and bf16.

    python benchmarks/bench_linear.py [--output FILE] [--rounds N] [--threads N]
    pytest benchmarks/bench_linear.py

Every result is checked against fp64 before it is timed; the two take turns in one process. Weights are
packed beforehand, as in every step of a model but the first.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sdfast.ops as ops
from sdfast.ops.linear import linear_torch
from sdfast.testing import assert_within_budget

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from _beside_eager import PRODUCT_COLUMNS, measure_products  # noqa: E402
from _record import results_path, table, write_json  # noqa: E402

# 64x64 latent, guided batch of 2: tokens and channels of each level ...
LEVELS = ((8192, 320), (2048, 640), (512, 1280), (128, 1280))
# ... and tokens, outputs, inputs, activation and whether a residual is added.
SETTINGS = (
    *((tokens, width, width, None, residual) for tokens, width in LEVELS for residual in (False, True)),
    *((tokens, 8 * width, width, "geglu", False) for tokens, width in LEVELS),
    *((tokens, width, 4 * width, None, True) for tokens, width in LEVELS),
    (154, 320, 768, None, False), (154, 1280, 768, None, False),  # the text's keys and values
    (2, 1280, 1280, None, False),  # the time embedding
)  # fmt: skip

Setting = tuple[int, int, int, str | None, bool]


class Call:
    """The arguments of one setting, and the two ways to compute it."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        tokens, rows, k, self.activation, residual = setting
        self.x = torch.randn(tokens, k).to(dtype)
        self.weight, self.bias = (torch.randn(rows, k) / k**0.5).to(dtype), torch.randn(rows).to(dtype)
        self.residual = torch.randn(tokens, rows).to(dtype) if residual else None

    def eager(self) -> Tensor:
        return linear_torch(
            self.x, self.weight, self.bias, activation=self.activation, residual=self.residual
        )

    def sdfast(self) -> Tensor:
        return ops.linear(self.x, self.weight, self.bias, activation=self.activation, residual=self.residual)

    def check(self) -> None:
        """A sample of the rows decides for all."""
        rows = slice(0, 64)
        wide = [None if t is None else t.double() for t in (self.x[rows], self.weight, self.bias)]
        residual = None if self.residual is None else self.residual[rows].double()
        exact = linear_torch(*wide, activation=self.activation, residual=residual)  # type: ignore[arg-type]
        assert_within_budget(self.sdfast()[rows], self.eager()[rows], exact)


def measure(setting: Setting, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """Check and time one setting."""
    call = Call(setting, dtype)
    call.check()
    tokens, rows, k, activation, residual = setting
    times = measure_products(
        {"eager": call.eager, "sdfast": call.sdfast}, flops=2 * tokens * rows * k, dtype=dtype, rounds=rounds
    )
    return {
        "shape": f"{tokens}x{k} to {rows}",
        "activation": activation or "",
        "residual": residual,
        "dtype": str(dtype).removeprefix("torch."),
        **times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=results_path("linear"))
    parser.add_argument("--rounds", type=int, default=20, help="of 8 GFLOP; smaller settings take more")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        measure(setting, dtype, options.rounds)
        for dtype in (torch.float32, torch.bfloat16)
        for setting in SETTINGS
    ]
    print(table(rows, {"shape": "", "activation": "", "residual": "", **PRODUCT_COLUMNS}))
    write_json(options.output, rows)
    print(f"\nwritten to {options.output}")


@pytest.mark.parametrize("way", ["eager", "sdfast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[9], SETTINGS[14]], ids=str)
def test_linear(benchmark: Callable[..., object], setting: Setting, dtype: torch.dtype, way: str) -> None:
    call = Call(setting, dtype)
    call.check()
    with torch.no_grad():
        benchmark(getattr(call, way))


if __name__ == "__main__":
    main()
