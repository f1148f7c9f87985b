"""One call of one operation: the ways to compute it, how a result is judged, and its least cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdfast.bench.timing import in_turns, ratio, settled, timed, times
from sdfast.ops import _tiles
from sdfast.testing import error_budget, relative_error

Results = Sequence[Tensor]
Way = Callable[[], Results]


def whole(results: Results) -> Results:
    """The part of a case's results that is checked, where that is all."""
    return results


def gradients(y: Tensor, inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """Those of the inputs, where they ask for any; else y."""
    return list(torch.autograd.grad(y, inputs, dy)) if y.requires_grad else [y]


def split_limit(factor: Tensor) -> Callable[[float], float] | None:
    """`Case.limit` of products of such factors: None but where they are multiplied as sums of two bf16."""
    splits = factor.device.type == "cpu" and _tiles.split(factor.dtype)
    return (lambda eager_error: 2e-5) if splits else None


@dataclasses.dataclass
class Case:
    """One call, ready to run.

    Args:
        shape: of what is computed, as text.
        dtype: of its tensors.
        ways: "eager", "sdfast", and whatever else is to be timed beside them.
        exact: the results in fp64, of the part that `part` cuts out.
        part: that part of a way's results, so that fp64 has little to do.
        flops: of the direct algorithm, two for a multiplication and an addition.
        nbytes: of what must be read and written once.
        size: of the tensor that a copy, taking its turns, copies; 0 for what multiplication limits.
        limit: the error allowed to ours for eager's; None takes `sdfast.testing.error_budget`.
        eager_result: what stands for eager's result where the timed one draws numbers of its own.
        magnitude: of results that cancel: see `sdfast.testing.relative_error`.
        training: whether gradients are taken.
        details: more columns of the row.
    """

    shape: str
    dtype: torch.dtype
    ways: dict[str, Way]
    exact: Way
    flops: int
    nbytes: int
    part: Callable[[Results], Results] = whole
    size: int = 0
    limit: Callable[[float], float] | None = None
    eager_result: Way | None = None
    magnitude: Way | None = None
    training: bool = False
    details: dict[str, object] = dataclasses.field(default_factory=dict)

    def errors(self, results: dict[str, Results]) -> dict[str, float]:
        """The relative error of each way's results against fp64, the largest of them.

        Raises:
            AssertionError: ours is not within its budget, or not of eager's dtypes.
        """
        with torch.set_grad_enabled(self.training):
            exact = self.exact()
            sizes = [None] * len(exact) if self.magnitude is None else self.magnitude()
            if self.eager_result is not None:
                results = {**results, "eager": self.eager_result()}
        parts = {name: self.part(one) for name, one in results.items()}
        found = {
            name: max(relative_error(*pair, magnitude=m) for *pair, m in zip(part, exact, sizes, strict=True))
            for name, part in parts.items()
        }
        for ours, eager, right, magnitude in zip(parts["sdfast"], parts["eager"], exact, sizes, strict=True):
            if ours.dtype != eager.dtype:
                raise AssertionError(f"got {ours.dtype}, expected {eager.dtype}")
            error = relative_error(ours, right, magnitude=magnitude)
            if self.limit is None:
                allowed = error_budget(eager, right, magnitude=magnitude)
            else:
                allowed = self.limit(relative_error(eager, right, magnitude=magnitude))
            if not error <= allowed:
                raise AssertionError(f"error {error:.2e} exceeds {allowed:.2e}")
        return found


@dataclasses.dataclass(frozen=True)
class Spec:
    """A case that can be made.

    Args:
        op: the operation.
        model: whose layer it is.
        name: tells it from the operation's others.
        make: of a dtype, on a device.
        quick: whether it is one of the few of a quick run.
    """

    op: str
    model: str
    name: str
    make: Callable[[torch.dtype, str], Case]
    quick: bool = False


def measure(case: Case, device: str, seconds: float, peak: float) -> dict[str, object]:
    """Judge every way by its first call, then time them in turns.

    Args:
        seconds: of timing; five rounds are made at the least.
        peak: GFLOP/s of this dtype at this moment.

    Raises:
        AssertionError: our result is wrong.
    """
    ways = {name: settled(way, device) for name, way in case.ways.items()}
    with torch.set_grad_enabled(case.training):
        first = {name: timed(way) for name, way in ways.items()}
        errors = case.errors({name: result for name, (_, result) in first.items()})  # type: ignore[misc]
        first_ms = {name: 1e3 * duration for name, (duration, _) in first.items()}
        del first
        calls = dict(ways)
        if case.size:
            source = torch.ones(case.size // case.dtype.itemsize, dtype=case.dtype, device=device)
            target = torch.empty_like(source)
            calls["copy"] = settled(lambda: target.copy_(source), device)
        samples = in_turns(calls, rounds=max(20, int(600 * min(1, seconds))), seconds=seconds)
    sides = {
        name: {**times(samples[name]), "first_ms": first_ms[name], "error": errors[name]} for name in ways
    }
    ms = sides["sdfast"]["ms"]
    row: dict[str, object] = {
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "training": case.training,
        **case.details,
        "rounds": len(samples["sdfast"]),
        "sides": sides,
        "ratios": {name: ratio(samples[name], samples["sdfast"]) for name in ways if name != "sdfast"},
        "flops": case.flops,
        "bytes": case.nbytes,
        "gflop_per_s": case.flops / ms / 1e6,
        "gb_per_s": case.nbytes / ms / 1e6,
        "peak_gflop_per_s": peak,
        "of_peak": case.flops / ms / 1e6 / peak,
    }
    if case.size:
        row["of_copy"] = case.nbytes / ms / (2 * case.size / times(samples["copy"])["ms"])
    return row
