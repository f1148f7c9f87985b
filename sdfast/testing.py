"""The error budget and the timing that tests and benchmarks share.

A result is right when its error against fp64 stays within twice that of eager torch in the same dtype, plus
one rounding band: one unit in the last place of that dtype, `torch.finfo(dtype).eps`.
"""

from __future__ import annotations

import datetime
import math
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sdfast import _library


def relative_error(actual: Tensor, expected: Tensor, *, magnitude: Tensor | None = None) -> float:
    """‖actual − expected‖ / ‖expected‖ in fp64; inf where one is finite and the other is not.

    Args:
        magnitude: for a result that cancels to almost nothing, the size of the terms whose sum each element
            is; its norm divides where that of `expected` is smaller.
    """
    return _error(actual, expected, magnitude, lambda t: float(torch.linalg.vector_norm(t)))


def _error(
    actual: Tensor, expected: Tensor, magnitude: Tensor | None, norm: Callable[[Tensor], float]
) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.shape != expected.shape:
        raise ValueError(f"actual: got shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    finite = expected.isfinite()
    if not torch.equal(actual.isnan(), expected.isnan()) or not torch.equal(actual.isfinite(), finite):
        return float("inf")
    difference = torch.where(finite, actual - expected, 0.0)
    scale = norm(torch.where(finite, expected, 0.0))
    if magnitude is not None:
        scale = max(scale, norm(magnitude.detach().double()))
    error = norm(difference)
    return error / scale if scale else (0.0 if error == 0.0 else float("inf"))


def error_budget(eager: Tensor, exact: Tensor, *, magnitude: Tensor | None = None) -> float:
    """The relative error allowed to a result of eager's dtype."""
    return 2 * relative_error(eager, exact, magnitude=magnitude) + torch.finfo(eager.dtype).eps


def assert_within_budget(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    magnitude: Tensor | None = None,
    factor: float = 2.0,
    what: str = "result",
) -> None:
    """Raise AssertionError unless `actual` is within the budget of `exact`, as a whole and at its worst.

    The worst of a few elements is chance, for eager as for the other; it is judged from 256 elements on.

    Args:
        actual: what is judged.
        eager: the same from eager torch, in the same dtype.
        exact: the same in fp64.
        magnitude: see `relative_error`.
        factor: of eager's error.
        what: names the result in the error.
    """
    if actual.dtype != eager.dtype:
        raise AssertionError(f"{what}: got dtype {actual.dtype}, expected {eager.dtype}")
    norms: tuple[tuple[str, Callable[[Tensor], float]], ...] = (
        ("error", lambda t: float(torch.linalg.vector_norm(t))),
        ("worst element's error", lambda t: float(t.abs().max())),
    )
    for name, norm in norms if exact.numel() >= 256 else norms[:1]:
        error = _error(actual, exact, magnitude, norm)
        eager_error = _error(eager, exact, magnitude, norm)
        budget = factor * eager_error + torch.finfo(eager.dtype).eps
        if not error <= budget:
            raise AssertionError(
                f"{what}: {name} {error:.2e} exceeds {budget:.2e} (eager has {eager_error:.2e})"
            )


def time_alternating(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 2,
    limit_seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns, so that all meet the same disturbances.

    Args:
        rounds: how often each is timed.
        warmup: how often each is called before.
        limit_seconds: after this long no further round is started, once there are five.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - began > limit_seconds:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            samples[name].append(time.perf_counter() - start)
    return samples


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], statistics.median(samples), tenths[7]


def copy_gb_per_s(size_bytes: int, *, rounds: int = 20) -> float:
    """Bandwidth of torch's copy between two warm CPU buffers of this size, bytes read plus bytes written."""
    source = torch.ones(max(1, size_bytes // 4))
    target = torch.empty_like(source)
    samples = time_alternating({"copy": lambda: target.copy_(source)}, rounds=rounds)["copy"]
    return 2 * source.numel() * 4 / spread(samples)[1] / 1e9


def peak_gflop_per_s(dtype: torch.dtype = torch.float32, *, rounds: int = 20) -> float:
    """What the CPU kernels' inner loop multiplies at most on all threads, 2 FLOP a product.

    bf16 counts as its pair products where the CPU has them, else as fp32, which it is widened to.

    Raises:
        RuntimeError: no compiled library is loaded.
    """
    status = _library.load_cpu_library()
    if not status.loaded:
        raise RuntimeError(f"peak_gflop_per_s: {status.detail}")
    pairs = dtype == torch.bfloat16
    rates = []
    for _ in range(1 + rounds):  # milliseconds each: threads wake and clocks rise in the first
        start = time.perf_counter()
        flops = _multiply_in_cache(10_000, pairs)
        rates.append(flops / (time.perf_counter() - start) / 1e9)
    return spread(rates[1:])[1]


_multiply_in_cache = _library.define_native(
    "multiply_in_cache(int repetitions, bool pairs) -> int", lambda repetitions, pairs: 0
)


def environment() -> dict[str, object]:
    """What a recorded number depends on: machine, threads, versions, commit and date."""
    return {
        "cpu": _library.cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The commit of the source tree, "+changes" where it differs; outside of one what $SDFAST_COMMIT says.

    Records are no part of what is measured: one that has just been written makes no difference.
    """
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        unchanged = [*git, "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)benchmarks/results"]
        changed = subprocess.run(unchanged, capture_output=True, check=False).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SDFAST_COMMIT", "unknown")
    return commit + "+changes" * changed
