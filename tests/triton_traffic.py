"""Bytes and arithmetic of the Triton kernels, counted without a GPU: what is launched beside the least there is.

    python tests/triton_traffic.py [group_norm ...] [--write]

For each call in tests/<op>_launches.py: the bytes of the tensors that its launches read and write, each once a
launch, and of what torch copies or sums on the way, so that partial results, second passes and copies show;
beside the tensors that the operation takes and gives, each once. What a launch reads twice in itself does not
show, and a tensor of which it touches a part counts whole. FLOP are those of the formula, two a multiplication. --write records benchmarks/results/triton_traffic.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton_code import all_ops, cases

from sdfast import _library
from sdfast.ops._triton import Launch, recording

RECORD = Path(__file__).parents[1] / "benchmarks/results/triton_traffic.json"
OUTSIDE = "outside of operations"
Shape = Sequence[int]

# From the tensors of a call and those it gives, by the operation; the direct algorithms' arithmetic.
FLOPS: dict[str, Callable[[list[Tensor], list[Tensor]], int]] = {
    "linear_rows": lambda given, _: 2 * math.prod(given[0].shape) * given[1].shape[0],
    "linear_input_gradient": lambda given, _: 2 * math.prod(given[0].shape) * given[1].shape[1],
    "linear_weight_gradient": lambda given, _: 2 * math.prod(given[0].shape) * given[1].shape[1],
    "attention_forward": lambda given, _: 4 * math.prod(given[0].shape) * given[1].shape[-2],
    "attention_with_lse": lambda given, _: 4 * math.prod(given[0].shape) * given[1].shape[-2],
    "attention_backward": lambda given, _: 10 * math.prod(given[1].shape) * given[2].shape[-2],
    "conv2d_kernel": lambda given, made: 2 * made[0].numel() * math.prod(given[1].shape[-3:]),
    "conv2d_statistics": lambda given, made: 2 * made[0].numel() * math.prod(given[1].shape[-3:]),
    "conv2d_input_gradient": lambda given, _: 2 * given[0].numel() * math.prod(given[1].shape[1:]),
    "conv2d_weight_gradient": lambda given, made: 2 * given[0].numel() * math.prod(made[0].shape[1:]),
}


@dataclasses.dataclass
class Call:
    """One call of an operation.

    Attributes:
        op: without "sdfast::" and "_triton".
        given, made: the tensors that it takes and gives.
        launches: its kernels.
        copies: the tensors of each operation of torch's that moves elements.
    """

    op: str
    given: list[Tensor] = dataclasses.field(default_factory=list)
    made: list[Tensor] = dataclasses.field(default_factory=list)
    launches: list[Launch] = dataclasses.field(default_factory=list)
    copies: list[list[Tensor]] = dataclasses.field(default_factory=list)

    @property
    def moved_bytes(self) -> int:
        launched = sum(nbytes(_tensors(launch.arguments)) for launch in self.launches)
        return launched + sum(map(nbytes, self.copies))

    @property
    def least_bytes(self) -> int | None:
        """Unknown where no operation says what it takes and gives."""
        return None if self.op == OUTSIDE else nbytes([*self.given, *self.made])

    @property
    def flops(self) -> int:
        count = FLOPS.get(self.op)
        return 0 if count is None else count(self.given, self.made)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of their memory, each tensor once and of views that overlap no more than what they view."""
    views: dict[int, dict[tuple[Any, ...], Tensor]] = {}
    for t in tensors:
        place = (t.storage_offset(), t.shape, t.stride())
        views.setdefault(t.untyped_storage()._cdata, {})[place] = t
    return sum(
        min(next(iter(same.values())).untyped_storage().nbytes(), sum(t.nbytes for t in same.values()))
        for same in views.values()
    )


class _Calls(TorchDispatchMode):
    """Runs the launchers of Triton operations and keeps each outermost call."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches, self.calls = launches, list[Call]()
        self.current: Call | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "sdfast" or not func._schema.name.endswith("_triton"):
            result = func(*args, **kwargs)
            if self.current is not None and _moves(func, (args, kwargs), result):
                read = () if _fills(func) else (args, kwargs)
                self.current.copies.append(_tensors((read, result)))
            return result
        op = func._schema.name.removeprefix("sdfast::").removesuffix("_triton")
        outermost = self.current is None
        first = len(self.launches)
        if outermost:
            self.current = Call(op, _tensors((args, kwargs)))
        try:
            with self:
                result = _library.launchers[op](*args, **kwargs)
        finally:
            call, self.current = self.current, None if outermost else self.current
        if outermost:
            assert call is not None
            call.made, call.launches = _tensors(result), self.launches[first:]
            self.calls.append(call)
        return result


def _moves(func: Any, given: object, result: object) -> bool:
    """Whether an operation of torch's reads or writes elements: views and empty tensors do not."""
    if func.namespace != "aten" or "empty" in func._schema.name:
        return False
    viewed = {t.untyped_storage()._cdata for t in _tensors(given)}
    made = {t.untyped_storage()._cdata for t in _tensors(result)}
    return func._schema.is_mutable or not made <= viewed


def _fills(func: Any) -> bool:
    """Whether it takes a tensor for its shape or dtype alone, as `zeros_like` and `new_zeros` do."""
    return func._schema.name.endswith("_like") or func._schema.name.startswith("aten::new_")


def count(case: Callable[[], object], architecture: int = 90) -> list[Call]:
    """The calls that a case makes, on fake CUDA tensors; the last holds what it launches beside them, if any."""
    with recording(architecture) as launches, FakeTensorMode():
        mode = _Calls(launches)
        with mode:
            case()
    counted = {id(launch) for call in mode.calls for launch in call.launches}
    beside = [launch for launch in launches if id(launch) not in counted]
    return [*mode.calls, *([Call(OUTSIDE, launches=beside)] if beside else [])]


def rows(ops: Iterable[str]) -> list[dict[str, Any]]:
    """A row for each call of each case, on sm_90; calls of a case that move the same share one."""
    found: list[dict[str, Any]] = []
    for op in ops:
        for what, case in cases(op).items():
            for call in count(case):
                least = call.least_bytes
                row = {
                    "case": what, "op": call.op, "launches": len(call.launches), "copies": len(call.copies),
                    "moved_bytes": call.moved_bytes, "least_bytes": least,
                    "ratio": call.moved_bytes / least if least else None, "flop": call.flops,
                }  # fmt: skip
                if row not in found:
                    found.append(row)
    return found


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    least, ratio = row["least_bytes"], row["ratio"]
    parts = [f"{row['launches']} launches", f"{row['moved_bytes'] / 2**20:.2f} MiB"]
    if row["copies"]:
        parts.insert(1, f"{row['copies']} of torch's")
    if ratio is not None:
        parts.append(f"least {least / 2**20:.2f}, {ratio:.2f}x")
    if row["flop"]:
        parts.append(
            f"{row['flop'] / 1e9:.2f} GFLOP, {row['flop'] / (least or row['moved_bytes']):.0f} a byte"
        )
    return f"{row['case']}, {row['op']}: {', '.join(parts)}"


def main() -> None:
    """Print a line a call."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", default=all_ops())
    parser.add_argument("--write", action="store_true", help="record every operation")
    options = parser.parse_args()
    found = rows(all_ops() if options.write else options.ops)
    print("\n".join(map(line, found)))
    if options.write:
        import triton

        from sdfast.testing import environment

        commit = environment()["commit"]
        record = {
            "command": " ".join(["python", "tests/triton_traffic.py", *sys.argv[1:]]),
            "environment": {"torch": torch.__version__, "triton": triton.__version__, "commit": commit},
            "rows": found,
        }
        partial = RECORD.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(RECORD)


if __name__ == "__main__":
    main()
