"""Operations on a GPU at the sizes of Stable Diffusion 1.5, SDXL and their VAE: Triton beside torch.

    python benchmarks/bench_gpu.py [--dtype bfloat16] [--rounds 20] [--only group_norm ...] [--minutes 10]
                                   [--no-compiled] [--tiny]

Three sides take turns: our Triton kernel, the same formula in eager torch, and that under torch.compile
(max-autotune, fullgraph). Each result is checked against fp64 before it is timed, by the error budget that
the tests use. Times are medians of CUDA events around a call whose launches are queued behind a filler, so
that Python's own time is not in them; the L2 cache is flushed before each. Shares are of a device-to-device
copy and of a large matrix product, measured in the same run. Writes results/<device>/operations.json after
every case: one that fails is recorded as such, and those after the last minute as not measured.
`--tiny` tries it out on whatever device there is and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import torch
from _gpu_timing import KERNELS, Timer, card, ceilings, versions
from _record import error_text, results_path, write_json
from torch import Tensor

from sdfast import _library, ops
from sdfast.testing import assert_within_budget, spread

Call = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Args:
        op, what: names it.
        shapes: of its tensors.
        call: takes them and the backend.
        flops: of the formula.
        results: elements it writes.
    """

    op: str
    what: str
    shapes: tuple[tuple[int, ...], ...]
    call: Call
    flops: float
    results: int

    def nbytes(self, dtype: torch.dtype) -> int:
        """The least that has to be moved."""
        return dtype.itemsize * (sum(map(math.prod, self.shapes)) + self.results)

    def tensors(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Images and convolutions' weights are channels_last; products keep the size of x."""
        generator = torch.Generator().manual_seed(0)
        made = []
        for shape in self.shapes:
            fan = math.prod(shape[1:]) if self.op in ("conv2d", "linear") and len(made) == 1 else 1
            t = (torch.randn(shape, generator=generator) / math.sqrt(fan)).to(device, dtype)
            made.append(
                t.to(memory_format=torch.channels_last) if t.dim() == 4 and self.op != "attention" else t
            )
        return made


def group_norm(n: int, c: int, size: int) -> Case:
    def call(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return ops.group_norm(x, 32, weight, bias, activation="silu", backend=backend)

    image = (n, c, size, size)
    return Case("group_norm", f"{n}x{c}x{size}x{size}", (image, (c,), (c,)), call, 0, math.prod(image))


def layer_norm(rows: int, c: int) -> Case:
    def call(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return ops.layer_norm(x, (c,), weight, bias, backend=backend)

    return Case("layer_norm", f"{rows}x{c}", ((rows, c), (c,), (c,)), call, 0, rows * c)


def linear(rows: int, k: int, m: int, activation: str | None = None) -> Case:
    def call(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return ops.linear(x, weight, bias, activation=activation, backend=backend)

    what = f"{rows}x{k} to {m}" + (f", {activation}" if activation else "")
    written = rows * (m // 2 if activation == "geglu" else m)
    return Case("linear", what, ((rows, k), (m, k), (m,)), call, 2 * rows * k * m, written)


def attention(batch: int, heads: int, queries: int, keys: int, dim: int) -> Case:
    def call(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return ops.attention(*(t.transpose(1, 2) for t in (q, k, v)), backend=backend)

    q, kv = (batch, queries, heads, dim), (batch, keys, heads, dim)
    what = f"{batch}x{heads}, {queries} by {keys}, D {dim}"
    return Case("attention", what, (q, kv, kv), call, 4 * math.prod(q) * keys, math.prod(q))


def conv2d(n: int, c: int, size: int, out: int, *, upsample: bool = False) -> Case:
    def call(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        y = ops.conv2d(x, weight, bias, 1, 1, upsample=upsample, backend=backend)
        assert isinstance(y, Tensor)
        return y

    pixels = n * size * size * (4 if upsample else 1)
    what = f"{n}x{c}x{size}x{size} to {out}" + (", upsampled" if upsample else "")
    shapes = ((n, c, size, size), (out, c, 3, 3), (out,))
    return Case("conv2d", what, shapes, call, 18 * pixels * c * out, pixels * out)


CASES = (
    group_norm(2, 320, 64), group_norm(2, 1280, 16), group_norm(2, 2560, 8), group_norm(1, 512, 128),
    group_norm(1, 128, 512),
    layer_norm(8192, 320), layer_norm(2048, 640), layer_norm(8192, 1280),
    linear(8192, 320, 320), linear(2048, 2560, 640), linear(128, 1280, 1280),
    linear(8192, 320, 2560, "geglu"), linear(512, 1280, 10240, "geglu"),
    attention(2, 8, 4096, 4096, 40), attention(2, 8, 4096, 77, 40), attention(2, 8, 1024, 1024, 80),
    attention(2, 8, 256, 256, 160), attention(2, 10, 4096, 4096, 64), attention(1, 1, 4096, 4096, 512),
    conv2d(2, 320, 64, 320), conv2d(2, 640, 32, 640), conv2d(2, 1280, 16, 1280), conv2d(2, 2560, 8, 1280),
    conv2d(1, 512, 64, 512), conv2d(1, 128, 512, 128), conv2d(1, 512, 64, 512, upsample=True),
)  # fmt: skip
TINY = (
    group_norm(2, 64, 4), layer_norm(8, 64), linear(8, 32, 64, "geglu"), attention(1, 2, 16, 16, 16),
    conv2d(1, 32, 4, 32),
)  # fmt: skip


def measure(
    case: Case, dtype: torch.dtype, device: str, rounds: int, timer: Timer, compiled: bool
) -> dict[str, object]:
    """Checks the result, then the row of the record."""
    tensors = case.tensors(dtype, device)
    exact = case.call(*(t.double() for t in tensors), backend="reference")
    sides = {
        "eager": lambda: case.call(*tensors, backend="torch"),
        "triton": lambda: case.call(*tensors, backend="triton"),
    }
    if compiled:
        torch._dynamo.reset()  # it counts the cases before as recompilations, and allows eight
        function = torch.compile(
            lambda *t: case.call(*t, backend="torch"),
            mode="max-autotune-no-cudagraphs",
            fullgraph=True,
            dynamic=False,
        )
        sides["compiled"] = lambda: function(*tensors)
    assert_within_budget(sides["triton"](), sides["eager"](), exact, what=f"{case.op}, {case.what}")
    del exact
    for _ in range(3):
        for side in sides.values():
            side()
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            samples[name].append(timer(side))
    times = {name: spread(each) for name, each in samples.items()}
    parts = ("p20_ms", "ms", "p80_ms")
    best = min(median for name, (_, median, _) in times.items() if name != "triton")
    ours = times["triton"][1]
    return {
        "rounds": rounds,
        **{f"{name}_{part}": ms for name in times for part, ms in zip(parts, times[name], strict=True)},
        "ratio": best / ours,
        "gb_per_s": case.nbytes(dtype) / ours / 1e6, "tflop_per_s": case.flops / ours / 1e9,
    }  # fmt: skip


def attempt(case: Case, options: argparse.Namespace, timer: Timer, deadline: float) -> dict[str, object]:
    """The row of a case; where there is nothing to time it says why."""
    row: dict[str, object] = {"op": case.op, "shape": case.what, "dtype": options.dtype}
    if not _library.has_kernel(KERNELS[case.op], "triton"):
        return {**row, "not_measured": "no Triton kernel yet"}
    if time.monotonic() > deadline:
        return {**row, "not_measured": f"the {options.minutes:g} minutes of the run were over"}
    device = "cuda" if timer.on_gpu else "cpu"
    compiled = timer.on_gpu and options.compiled
    try:
        times = measure(case, getattr(torch, options.dtype), device, options.rounds, timer, compiled)
    except Exception as error:  # one kernel's fault is to hide no other's time
        return {**row, "not_measured": error_text(error)}
    return {**row, **times}


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line a case, write results/<device>/operations.json; fail where a case did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20, help="of each side (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=sorted({case.op for case in CASES}))
    parser.add_argument("--minutes", type=float, default=60, help="no case begins later (%(default)s)")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="without torch.compile")
    parser.add_argument("--tiny", action="store_true", help="try it out; writes nothing")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("there is no CUDA device; --tiny tries the benchmark out in Triton's interpreter")
    deadline = time.monotonic() + 60 * options.minutes
    torch.backends.cudnn.benchmark = True
    timer, rows = Timer(device), []
    copy, product = ceilings(timer, getattr(torch, options.dtype), device)
    print(f"copy {copy:.0f} GB/s, matrix product {product:.0f} TFLOP/s", flush=True)
    machine = {
        "ceilings": {"copy_gb_per_s": copy, "matrix_tflop_per_s": product},
        "card": card(), "versions": versions(),
    }  # fmt: skip
    for case in TINY if options.tiny else CASES:
        if options.only and case.op not in options.only:
            continue
        row = attempt(case, options, timer, deadline)
        if "ratio" in row:
            row["of_ceiling"] = max(row["gb_per_s"] / copy, row["tflop_per_s"] / product)  # type: ignore[operator]
        rows.append(row)
        print(line(row), flush=True)
        if not options.tiny:
            write_json(results_path("operations", "cuda"), rows, **machine)
    failed = [row for row in rows if "Error" in str(row.get("not_measured"))]
    if failed:
        parser.exit(1, "\n".join(map(line, failed)) + "\n")


def line(row: dict[str, object]) -> str:
    """A row for the terminal."""
    title = f"{row['op']}, {row['shape']}: "
    if "not_measured" in row:
        return title + str(row["not_measured"])
    compiled = f", compiled {row['compiled_ms']:.4f}" if "compiled_ms" in row else ""
    return (
        f"{title}eager {row['eager_ms']:.4f} ms{compiled}, triton {row['triton_ms']:.4f},"
        f" {row['ratio']:.2f}x, {row['of_ceiling']:.0%} of the ceiling"
    )


if __name__ == "__main__":
    main()
