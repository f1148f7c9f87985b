"""attention against torch at every shape of Stable Diffusion 1.5, fp32 and bf16.

    python benchmarks/bench_attention.py [--output FILE] [--rounds N] [--threads N]
    pytest benchmarks/bench_attention.py

Every result is checked against fp64 before it is timed; the two take turns in one process. Rates count
4 L S D operations, of forward and backward 14 L S D. q, k, v are transposed views, as in a model.
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
from sdfast.testing import assert_within_budget

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from _beside_eager import PRODUCT_COLUMNS, measure_products  # noqa: E402
from _record import results_path, table, write_json  # noqa: E402

# (B, heads, L, S, D) and whether it is causal: the U-Net at 512x512 with a guided batch of 2 ...
UNET = tuple(
    (2, 8, length, keys, head_dim)
    for length, head_dim in ((4096, 40), (1024, 80), (256, 160), (64, 160))
    for keys in (length, 77)
)
VAE = ((1, 1, 4096, 4096, 512),)
TEXT = ((1, 12, 77, 77, 64),)  # causal

Setting = tuple[int, int, int, int, int]


class Call:
    """The arguments of one setting, and the two ways to compute it."""

    def __init__(self, setting: Setting, dtype: torch.dtype, is_causal: bool = False) -> None:
        torch.manual_seed(0)
        batch, heads, length, keys, head_dim = setting
        self.setting, self.is_causal = setting, is_causal
        self.q, self.k, self.v = (
            torch.randn(batch, rows, heads, head_dim).to(dtype).transpose(1, 2)
            for rows in (length, keys, keys)
        )

    @property
    def flops(self) -> int:
        """Causal counts whole, too: half of it is skipped."""
        batch, heads, length, keys, head_dim = self.setting
        return 4 * batch * heads * length * keys * head_dim

    def train(self) -> None:
        """Let `eager` and `sdfast` be differentiated by `gradients`."""
        for leaf in (self.q, self.k, self.v):
            leaf.requires_grad_()
        self.do = torch.randn_like(self.q)

    def gradients(self, way: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(way(), (self.q, self.k, self.v), self.do)

    def eager(self) -> Tensor:
        return F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=self.is_causal)

    def sdfast(self) -> Tensor:
        return ops.attention(self.q, self.k, self.v, is_causal=self.is_causal)

    def check(self) -> None:
        """One head, and as many of its queries as fp64 can take in a moment, decide for all."""
        part = Call.__new__(Call)
        queries = self.q[:1, -1:, : max(1, 2**22 // (self.k.shape[2] * self.k.shape[3]))]
        part.__dict__ = {**self.__dict__, "q": queries, "k": self.k[:1, -1:], "v": self.v[:1, -1:]}
        q, k, v = part.q.double(), part.k.double(), part.v.double()

        def exact(values: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, values, is_causal=self.is_causal)

        assert_within_budget(part.sdfast(), part.eager(), exact(v), magnitude=exact(v.abs()))

    def check_gradients(self) -> None:
        """As `check`, of one head with all its queries: each of them is a term of dk and dv."""
        part, exact = Call.__new__(Call), Call.__new__(Call)
        tensors = {name: getattr(self, name).detach()[:1, -1:] for name in ("q", "k", "v", "do")}
        for call, dtype in ((part, self.q.dtype), (exact, torch.float64)):
            call.__dict__ = {**self.__dict__, **{name: t.to(dtype) for name, t in tensors.items()}}
            for leaf in (call.q, call.k, call.v):
                leaf.requires_grad_()
        for actual, eager, wanted in zip(
            part.gradients(part.sdfast), part.gradients(part.eager), exact.gradients(exact.eager), strict=True
        ):
            assert_within_budget(actual, eager, wanted)


def measure(
    setting: Setting, dtype: torch.dtype, rounds: int, is_causal: bool = False, training: bool = False
) -> dict[str, object]:
    """Check and time one setting; with `training` forward and backward."""
    call = Call(setting, dtype, is_causal)
    call.check()
    ways: dict[str, Callable[[], object]] = {"eager": call.eager, "sdfast": call.sdfast}
    flops = call.flops
    if training:
        call.train()
        call.check_gradients()
        ways = {"eager": lambda: call.gradients(call.eager), "sdfast": lambda: call.gradients(call.sdfast)}
        flops = flops // 2 * 7  # two products forward, five backward
    times = measure_products(ways, flops=flops, dtype=dtype, rounds=rounds)
    return {
        "shape": "x".join(map(str, setting)),
        "dtype": str(dtype).removeprefix("torch."),
        "is_causal": is_causal,
        "training": training,
        **times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=results_path("attention"))
    parser.add_argument(
        "--rounds", type=int, default=30, help="of a setting of 8 GFLOP; smaller ones take more"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for title, settings, is_causal, training in (
        ("U-Net", UNET, False, False),
        ("VAE", VAE, False, False),
        ("text encoder", TEXT, True, False),
        ("U-Net, forward and backward", UNET, False, True),
        ("VAE, forward and backward", VAE, False, True),
        ("text encoder, forward and backward", TEXT, True, True),
    ):
        with torch.no_grad():
            part = [
                measure(setting, dtype, options.rounds, is_causal, training)
                for dtype in (torch.float32, torch.bfloat16)
                for setting in settings
            ]
        columns = {"shape": "", **PRODUCT_COLUMNS}
        print(f"\n{title}, {options.threads} threads\n{table(part, columns)}", flush=True)
        rows += [{"model": title, **row} for row in part]
    write_json(options.output, rows)
    print(f"\nwritten to {options.output}")


@pytest.mark.parametrize("way", ["eager", "sdfast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", [UNET[2], UNET[3], UNET[7]], ids=str)
def test_attention(benchmark: Callable[..., object], setting: Setting, dtype: torch.dtype, way: str) -> None:
    call = Call(setting, dtype)
    call.check()
    with torch.no_grad():
        benchmark(getattr(call, way))


if __name__ == "__main__":
    main()
