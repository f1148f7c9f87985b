"""Every call of an operation that models make, by each backend and each plan: what should serve it on a GPU.

    python benchmarks/bench_gpu_calls.py [--work sd15 sdxl ...] [--only conv2d ...] [--processes 10]
                                         [--minutes 8] [--no-plans] [--output FOLDER] [--tiny]

The calls are recorded from the models themselves, on tensors without values, and made again on random ones.
Processes side by side first make each once by every candidate: that compiles the kernels, and compares the
result with fp64. What was right is then timed, with the GPU to itself, as a model runs it: in a CUDA graph of
many calls that follow each other, each with weights of its own, more than fit in the L2 cache.
Candidates are torch, cuDNN's attention, CUDA C++, and Triton by its own rule and by each of its plans; and
" +statistics": a convolution that gathers them for the next norm, a norm that is given them. Writes
FOLDER/calls.json; --table also the plans that were faster than the rule's, as tune_launches.py does.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from _gpu_recorded import GROUPS, OPERATIONS, RecordedCall, TensorOf, record
from _gpu_timing import Timer, card, ceilings, versions
from _gpu_works import TINY_WORKS, WORKS
from _record import error_text, output_path, write_json
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from tune_launches import Record

from sdfast import ops, use_backend
from sdfast.ops._launch_table import exploring, preferring
from sdfast.ops._triton import architecture
from sdfast.testing import relative_error, spread

_WEIGHTED = ("conv2d", "linear")  # whose second argument is a weight
_LARGEST_ERROR = {torch.float32: 5e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # TF32's, of fp32
_CACHE_BYTES = 64 << 20  # more than the L2 of any GPU we know
_REPLAYS = 5


class _Call:
    """A recorded call on tensors.

    Args:
        copies: of the weights, used in turn.
    """

    def __init__(self, recorded: RecordedCall, device: str, copies: int = 1) -> None:
        self.op, self.recorded = recorded.op, recorded
        leaves, self.tree = pytree.tree_flatten(
            (recorded.arguments, recorded.keywords), is_leaf=lambda x: isinstance(x, TensorOf)
        )
        first = [leaf.make(device) if isinstance(leaf, TensorOf) else leaf for leaf in leaves]
        self.sets: list[list[Any]] = [first]
        self.statistics: tuple[Tensor, Tensor] | None = None
        if self.op in _WEIGHTED:
            weights = [leaves[1].make(device) for _ in range(copies)]
            self.sets = [[first[0], w.div_(math.sqrt(w[0].numel())), *first[2:]] for w in weights]

    def __call__(
        self, copy: int = 0, *, statistics: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        leaves = self.sets[copy % len(self.sets)]
        if dtype is not None:
            leaves = [leaf.to(dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments, keywords = pytree.tree_unflatten(leaves, self.tree)
        if statistics:
            known = self.op == "group_norm"
            more = {"statistics": self._statistics(*arguments[:2])} if known else {"stats_groups": GROUPS}
            keywords = {**keywords, **more}
        result = getattr(ops, self.op)(*arguments, **keywords)
        return result[0] if isinstance(result, tuple) else result

    def _statistics(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """True ones, made once: of a call with values of its own nobody asks."""
        if self.statistics is None:
            var, mean = torch.var_mean(x.double().unflatten(1, (groups, -1)).flatten(2), -1, correction=0)
            self.statistics = mean.float(), torch.rsqrt(var + 1e-5).float()
        return self.statistics


class Candidate(NamedTuple):
    """A way to make a call; `plan` is (key, name) of `_launch_table`."""

    backend: str
    statistics: bool = False
    plan: tuple[tuple[str, str], str] | None = None

    @property
    def name(self) -> str:
        plan = "" if self.plan is None else f" [{self.plan[1]}]"
        return f"{self.backend}{' +statistics' if self.statistics else ''}{plan}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(use_backend("torch" if self.backend == "cudnn" else self.backend))
            if self.backend == "cudnn":
                stack.enter_context(sdpa_kernel([SDPBackend.CUDNN_ATTENTION]))
            if self.plan is not None:
                stack.enter_context(preferring(*self.plan))
            yield


def candidates(call: _Call, plans: bool) -> list[Candidate]:
    """Torch first; plans as a run of the call meets them."""
    ways = [Candidate("torch")]
    if call.op == "attention":
        ways.append(Candidate("cudnn"))
    ways += [Candidate("cuda"), Candidate("triton")]
    if call.recorded.may_have_statistics:
        ways.append(Candidate("triton", statistics=True))
    if plans and torch.cuda.is_available():
        with contextlib.suppress(Exception), exploring() as met, Candidate("triton").serving():
            call()
        ways += [Candidate("triton", plan=(key, name)) for key, names in met.items() for name in names]
    return ways


def check(call: _Call, ways: Sequence[Candidate]) -> dict[str, Any]:
    """Errors by candidate, or why there is none."""
    with Candidate("torch").serving():
        exact = call(dtype=torch.float64)
    errors: dict[str, Any] = {}
    for way in ways:
        try:
            with way.serving():
                y = call(statistics=way.statistics)
            errors[way.name] = relative_error(y, exact)
        except Exception as error:
            errors[way.name] = error_text(error)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return errors


def milliseconds(call: _Call, way: Candidate, copies: int) -> float:
    """Of one call among many in a CUDA graph."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        with way.serving():
            call(statistics=way.statistics)
        return 1e3 * (time.perf_counter() - began)
    stream = torch.cuda.Stream()
    with way.serving(), torch.cuda.stream(stream):
        for copy in [*range(copies)] * 2:  # some weights' copies are kept from the second call on
            call(copy, statistics=way.statistics)
        graph = torch.cuda.CUDAGraph()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for copy in range(copies):
                call(copy, statistics=way.statistics)
        graph.replay()
        times = []
        for _ in range(_REPLAYS):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record(stream)
            graph.replay()
            last.record(stream)
            last.synchronize()
            times.append(first.elapsed_time(last) / copies)
    return spread(times)[1]


def copies_of(recorded: RecordedCall) -> int:
    """As many as exceed the cache by their weights, at least enough that a graph's start is little."""
    tensors = [a for a in recorded.arguments if isinstance(a, TensorOf)]
    weight = math.prod(tensors[1].shape) * 2 if recorded.op in _WEIGHTED else _CACHE_BYTES
    return max(6, min(24, -(-_CACHE_BYTES // weight)))


def worker(recorded: list[RecordedCall], share: tuple[int, int], plans: bool, results: pathlib.Path) -> None:
    """Errors of its share of the calls, written after each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors: dict[int, Any] = {}
    for i in range(share[0], len(recorded), share[1]):
        torch.manual_seed(i)
        try:
            call = _Call(recorded[i], device)
            ways = candidates(call, plans)
            errors[i] = (ways, check(call, ways))
        except Exception as error:
            errors[i] = ([], {"all": error_text(error)})
        torch.save(errors, results)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, time, write; a line a call."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=8.0, help="of checking, and again of timing")
    parser.add_argument("--no-plans", dest="plans", action="store_false", help="Triton's own rule alone")
    parser.add_argument("--folder", type=pathlib.Path, help="keep the calls and what was checked here")
    parser.add_argument("--phase", choices=("record", "check", "time"), help="one of the three alone")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", help="folder of the record")
    parser.add_argument("--table", type=pathlib.Path, help="folder of launch tables to add the best plans to")
    parser.add_argument("--tiny", action="store_true", help="try it out; records only to --output")
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or options.tiny or options.share or options.phase == "record"):
        parser.error("there is no CUDA device; --tiny tries the benchmark out in Triton's interpreter")
    torch.backends.cudnn.benchmark = True
    folder = options.folder or pathlib.Path(tempfile.mkdtemp())
    calls_file = folder / "calls.pt"
    if options.phase in ("check", "time") and not calls_file.exists():
        parser.error(f"--folder: {folder} holds no calls; run --phase record there first")
    folder.mkdir(parents=True, exist_ok=True)
    if options.phase in (None, "record") and not options.share:
        every = TINY_WORKS if options.tiny else {name: WORKS[name] for name in options.work}
        torch.save(record(every, getattr(torch, options.dtype)), calls_file)
    if options.phase == "record":
        return
    recorded = [r for r in torch.load(calls_file, weights_only=False) if r.op in options.only]
    if options.share:
        worker(recorded, tuple(options.share), options.plans, folder / f"checked{options.share[0]}.pt")
        return
    if options.phase in (None, "check"):
        check_side_by_side(options, folder)
    if options.phase in (None, "time"):
        time_all(options, recorded, folder)


def check_side_by_side(options: argparse.Namespace, folder: pathlib.Path) -> None:
    """All calls by all candidates, in processes; those that are not done in time are left out."""
    deadline = time.monotonic() + 60 * options.minutes
    command = [sys.executable, __file__, "--folder", str(folder), "--only", *options.only]
    command += [] if options.plans else ["--no-plans"]
    processes = [
        subprocess.Popen([*command, "--share", str(i), str(options.processes)])
        for i in range(options.processes)
    ]
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def time_all(options: argparse.Namespace, recorded: list[RecordedCall], folder: pathlib.Path) -> None:
    """Rows of the record, the calls that matter most first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    deadline = time.monotonic() + 60 * options.minutes
    checked: dict[int, Any] = {}
    for file in folder.glob("checked*.pt"):
        checked.update(torch.load(file, weights_only=False))
    timer = Timer(device)
    copy, product = ceilings(timer, getattr(torch, options.dtype), device)
    del timer
    more = {
        "ceilings": {"copy_gb_per_s": copy, "matrix_tflop_per_s": product},
        "card": card(), "versions": versions(),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    path = output_path("calls", options)
    for i, call_of in enumerate(recorded):
        ways, errors = checked.get(i, ([], {"all": "was not checked in time"}))
        row: dict[str, Any] = {
            "op": call_of.op, "call": call_of.name, "counts": call_of.counts, "errors": errors, "ms": {},
            "choices": {way.name: way.plan for way in ways if way.plan is not None},
        }  # fmt: skip
        rows.append(row)
        if time.monotonic() > deadline:
            row["not_timed"] = "the time of the run was over"
            continue
        copies = copies_of(call_of) if device == "cuda" else 1
        torch.manual_seed(i)
        call = _Call(call_of, device, copies)
        for way in ways:
            error = errors.get(way.name)
            if not isinstance(error, float) or not error <= _LARGEST_ERROR[getattr(torch, options.dtype)]:
                continue
            try:
                row["ms"][way.name] = float(f"{milliseconds(call, way, copies):.4g}")
            except Exception as failure:
                row["errors"][way.name] = error_text(failure)
        print(described_row(row), flush=True)
        if path is not None and i % 10 == 0:
            write_json(path, rows, **more)
    if path is not None:
        write_json(path, rows, **more)
    if options.table:
        write_table(rows, Record(options.table, architecture(torch.device(device))))


def write_table(rows: list[dict[str, Any]], table: Record) -> None:
    """Of each choice the plan that was fastest, in the mean over the calls that make it."""
    by_choice: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        for name, (key, plan) in row["choices"].items():
            times = by_choice.setdefault(tuple(key), {}).setdefault(plan, [])  # the rule's plan first
            times += [row["ms"][name]] if name in row["ms"] else []
    for key, times in by_choice.items():
        calls = max(map(len, times.values()))
        whole = {plan: each for plan, each in times.items() if each and len(each) == calls}
        ms = {plan: statistics.geometric_mean(each) for plan, each in whole.items()}
        table.add(key, {plan: float(f"{mean:.4g}") for plan, mean in ms.items()}, next(iter(times)))
    table.save()


def described_row(row: dict[str, Any]) -> str:
    """Its fastest candidates."""
    fastest = sorted(row["ms"].items(), key=lambda item: item[1])[:4]
    return f"{row['call']}: " + ", ".join(f"{name} {1e3 * ms:.1f} us" for name, ms in fastest)


if __name__ == "__main__":
    main()
