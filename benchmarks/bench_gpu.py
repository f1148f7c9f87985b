"""Operations on a GPU at the sizes of Stable Diffusion 1.5, SDXL and their VAE: Triton beside torch.

    python benchmarks/bench_gpu.py [--dtype bfloat16] [--rounds 20] [--only group_norm ...] [--minutes 10]
                                   [--no-compiled] [--output FOLDER] [--tiny]

Our Triton kernel and the same formula in eager torch take turns, of all cases first; then, while there is
time, both with that formula under torch.compile (max-autotune, fullgraph). Each result is checked against
fp64 before it is timed, by the error budget that the tests use. Times are medians of CUDA events around a
call whose launches are queued behind a filler, so that Python's own time is not in them; the L2 cache is
flushed before each. Shares are of a device-to-device copy and of a large matrix product, measured in the
same run. An operation has a process of its own (`_gpu_process.py`), so that one kernel's illegal address
hides no other's time. Writes FOLDER/operations.json, by default in results/<device>, after every case: one
that fails is recorded as "failed", and the exit status says so; those after the last minute as not measured.
`--tiny` tries it out on whatever device there is, and records only to --output.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from _gpu_process import OutOfTime, Worker, WorkerError, synchronize
from _gpu_timing import KERNELS, Timer, card, ceilings, versions
from _record import output_path, write_json
from torch import Tensor

from sdfast import _library, ops
from sdfast.testing import assert_within_budget, spread

Call = Callable[..., Tensor]
Row = dict[str, Any]
_CASE_MINUTES = 2.0  # of one request, compiling included


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


def measure(case: Case, dtype: torch.dtype, device: str, rounds: int, timer: Timer, compiled: bool) -> Row:
    """Checks the result, then what the row of the record has of it."""
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


class Server:
    """What an operation's process can be asked."""

    def __init__(self, dtype: str, rounds: int, tiny: bool) -> None:
        self.cases, self.rounds = TINY if tiny else CASES, rounds
        self.dtype = getattr(torch, dtype)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.benchmark = True
        self.timer = Timer(self.device)

    @torch.inference_mode()
    def measure(self, index: int, compiled: bool) -> Row:
        case = self.cases[index]
        times = measure(case, self.dtype, self.device, self.rounds, self.timer, compiled)
        self.unload()
        return times

    def unload(self) -> None:
        if self.timer.on_gpu:
            torch.cuda.empty_cache()

    def settle(self) -> None:
        synchronize()


class Run:
    """The rows that there are, and a process for each operation.

    Args:
        cases: in their order.
        workers: by operation, of a `Server` of these cases.
        ceilings: GB/s and TFLOP/s.
        write: keeps rows.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        workers: dict[str, Worker],
        ceilings: tuple[float, float],
        write: Callable[[list[Row]], None],
    ) -> None:
        self.cases, self.workers, self.ceilings, self.write = cases, workers, ceilings, write
        self.rows: list[Row] = []

    def measure(self, indices: Iterable[int], dtype: str, deadline: float) -> None:
        """Beside eager."""
        for index in indices:
            case = self.cases[index]
            row: Row = {"op": case.op, "shape": case.what, "dtype": dtype, "index": index}
            self.rows.append(row)
            if not _library.has_kernel(KERNELS[case.op], "triton"):
                row["not_measured"] = "no Triton kernel yet"
            else:
                self.ask(row, compiled=False, deadline=deadline)
            self.keep(row)

    def measure_compiled(self, deadline: float) -> None:
        """Beside eager and compiled, what was measured; that is kept where this fails."""
        for row in [row for row in self.rows if "ratio" in row]:
            if time.monotonic() > deadline:
                return
            self.ask(row, compiled=True, deadline=deadline)
            self.keep(row)

    def ask(self, row: Row, *, compiled: bool, deadline: float) -> None:
        """Times into the row, or why there are none."""
        seconds = min(60 * _CASE_MINUTES, deadline - time.monotonic())
        what = "compiled_" if compiled else ""
        try:
            row.update(self.workers[row["op"]].ask(seconds, "measure", row["index"], compiled))
        except OutOfTime as error:
            row[f"{what}not_measured"] = str(error)
        except WorkerError as error:  # one kernel's fault is to hide no other's time
            row[f"{what}failed"] = str(error)

    def keep(self, row: Row) -> None:
        if "ratio" in row:
            copy, product = self.ceilings
            row["of_ceiling"] = max(row["gb_per_s"] / copy, row["tflop_per_s"] / product)
        print(line(row), flush=True)
        self.write([{key: value for key, value in row.items() if key != "index"} for row in self.rows])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line a case, write operations.json; fail where a case did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20, help="of each side (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=sorted({case.op for case in CASES}))
    parser.add_argument("--minutes", type=float, default=60, help="of the whole run (%(default)s)")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="without torch.compile")
    parser.add_argument("--output", help="folder of the record")
    parser.add_argument("--tiny", action="store_true", help="try it out; records only to --output")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("there is no CUDA device; --tiny tries the benchmark out in Triton's interpreter")
    deadline = time.monotonic() + 60 * options.minutes
    timer, dtype = Timer(device), getattr(torch, options.dtype)
    reached = ceilings(timer, dtype, device)
    print(f"copy {reached[0]:.0f} GB/s, matrix product {reached[1]:.0f} TFLOP/s", flush=True)
    machine = {
        "ceilings": {"copy_gb_per_s": reached[0], "matrix_tflop_per_s": reached[1]},
        "card": card(), "versions": versions(),
    }  # fmt: skip
    del timer
    if device == "cuda":
        torch.cuda.empty_cache()
    path = output_path("operations", options)

    def write(rows: list[Row]) -> None:
        if path is not None:
            write_json(path, rows, **machine)

    cases = TINY if options.tiny else CASES
    chosen = [i for i, case in enumerate(cases) if case.op in (options.only or KERNELS)]
    server = (options.dtype, options.rounds, options.tiny)
    workers = {case.op: Worker(Server, server) for case in cases}
    run = Run(cases, workers, reached, write)
    try:
        run.measure(chosen, options.dtype, deadline)
        if device == "cuda" and options.compiled:
            run.measure_compiled(deadline)
    finally:
        for worker in workers.values():
            worker.end()
    failed = [row for row in run.rows if "failed" in row or "compiled_failed" in row]
    if failed:
        parser.exit(1, "\n".join(map(line, failed)) + "\n")


def line(row: Row) -> str:
    """A row for the terminal."""
    title = f"{row['op']}, {row['shape']}: "
    if "ratio" not in row:
        return title + str(row.get("failed") or row["not_measured"])
    compiled = f", compiled {row['compiled_ms']:.4f}" if "compiled_ms" in row else ""
    why = row.get("compiled_failed") or row.get("compiled_not_measured")
    absent = f"; compiled: {why}" if why else ""
    return (
        f"{title}eager {row['eager_ms']:.4f} ms{compiled}, triton {row['triton_ms']:.4f},"
        f" {row['ratio']:.2f}x, {row['of_ceiling']:.0%} of the ceiling{absent}"
    )


if __name__ == "__main__":
    main()
