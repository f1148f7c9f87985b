"""Times the plans of Triton kernels on this GPU and writes the table of its architecture.

    python benchmarks/tune_launches.py [linear ...] [--minutes 8] [--only sd15] [--again]

The calls are those of tests/<op>_launches.py: the sizes of Stable Diffusion 1.5 and XL. For each choice that
a call makes, every plan that its launcher lists takes turns with the others on random values, after its
result was compared with that of the rule's own plan; one that cannot be launched is left out, and the file
says why. sdfast/assets/launches/sm_<capability>.json names the
plans that were faster than the rule's by more than 2%, and keeps the milliseconds. It is replaced in one step
after each choice, and a run that was interrupted goes on where it ended.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _gpu_timing import Timer
from _record import error_text
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sdfast.files import write_text
from sdfast.ops import _launch_table
from sdfast.ops._launch_table import Key, exploring, preferring
from sdfast.ops._triton import architecture
from sdfast.testing import relative_error, spread

TESTS = Path(__file__).parents[1] / "tests"
LARGEST_DIFFERENCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LEAST_GAIN = 1.02
ROUNDS = 7


class _Random(TorchFunctionMode):
    """Fills what `torch.empty` gives with normal values, on the device there is."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            values = torch.randn(*args, **{**kwargs, "dtype": torch.float32, "device": self.device})
            return values.to(kwargs.get("dtype", torch.float32))
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Keeps the calls of Triton operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sdfast" and func._schema.name.endswith("_triton"):
            self.calls.append(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def operations_of(case: Callable[[], object], device: str) -> list[Callable[[], object]]:
    """The Triton operations that a case calls, on random tensors of their own."""
    operations = _Operations()
    with _Random(device), operations:
        case()
    return operations.calls


def differs(actual: object, expected: object) -> float:
    """The largest relative difference among the results, by what the dtype allows."""
    pairs = zip(_tensors(actual), _tensors(expected), strict=True)
    return max(
        (relative_error(a, e) / LARGEST_DIFFERENCE[e.dtype] for a, e in pairs if e.numel()), default=0.0
    )


def _tensors(result: object) -> list[Tensor]:
    return [
        leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def measure(
    call: Callable[[], object], key: Key, plans: list[str], timer: Timer, left_out: dict[str, str]
) -> dict[str, float]:
    """Milliseconds by plan, of those that can be launched and whose result is that of the first of these.

    Args:
        left_out: why others have none; those that it names already are not tried. Added to.
    """
    expected: object = None
    usable = []
    for plan in plans:
        if plan in left_out:
            continue
        try:
            with preferring(key, plan):
                result = call()
            _synchronize()
            if expected is None:
                expected = result
            if differs(result, expected) > 1:
                left_out[plan] = "another result"
        except Exception as error:  # OutOfResources, a compiler's assertion: the others are to be timed
            left_out[plan] = error_text(error)
            _synchronize()  # fails again where the device is of no use any more
        if plan in left_out:
            print(f"  {plan}: {left_out[plan]}, left out", flush=True)
        else:
            usable.append(plan)
    samples: dict[str, list[float]] = {plan: [] for plan in usable}
    for _ in range(ROUNDS):
        for plan in usable:
            with preferring(key, plan):
                samples[plan].append(timer(call))
    return {plan: float(f"{spread(times)[1]:.4g}") for plan, times in samples.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Record:
    """The table of one architecture, in its file."""

    def __init__(self, folder: Path, capability: int) -> None:
        self.file = folder / f"sm_{capability}.json"
        content = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        self.plans: dict[str, dict[str, str]] = content.get("plans", {})
        self.ms: dict[str, dict[str, dict[str, float]]] = content.get("ms", {})
        self.left_out: dict[str, dict[str, dict[str, str]]] = content.get("left_out", {})
        self.devices: list[str] = content.get("devices", [])

    def __contains__(self, key: Key) -> bool:
        return key[1] in self.ms.get(key[0], {})

    def add(self, key: Key, ms: dict[str, float], rule: str) -> None:
        """Keep what was measured; name the fastest where it gains over the rule's plan."""
        kernel, bucket = key
        self.ms.setdefault(kernel, {})[bucket] = ms
        chosen = self.plans.setdefault(kernel, {})
        chosen.pop(bucket, None)
        if ms and min(ms.values()) * LEAST_GAIN < ms.get(rule, math.inf):
            chosen[bucket] = min(ms, key=lambda plan: ms[plan])

    def reasons(self, key: Key, *, again: bool = False) -> dict[str, str]:
        """Why plans of a choice are left out, to be added to; none where all are tried again."""
        buckets = self.left_out.setdefault(key[0], {})
        if again:
            buckets.pop(key[1], None)
        return buckets.setdefault(key[1], {})

    def save(self) -> None:
        if torch.cuda.is_available() and (name := torch.cuda.get_device_name()) not in self.devices:
            self.devices.append(name)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        left_out = {
            kernel: {bucket: reasons for bucket, reasons in buckets.items() if reasons}
            for kernel, buckets in self.left_out.items()
        }
        content = {"devices": self.devices, "plans": self.plans, "ms": self.ms, "left_out": left_out}
        write_text(self.file, json.dumps(content, indent=1, sort_keys=True) + "\n")


def cases(ops: list[str], only: str) -> Iterator[tuple[str, Callable[[], object]]]:
    for op in ops:
        for name, case in importlib.import_module(f"{op}_launches").code_cases().items():
            if only in name:
                yield name, case


def described(name: str, key: Key, ms: dict[str, float], rule: str) -> str:
    """What was measured, for the terminal."""
    if not ms:
        return f"{name}: {' '.join(key)}: no plan can be launched"
    best = min(ms, key=lambda plan: ms[plan])
    beside = f"the rule's {ms[rule]} ms" if rule in ms else "the rule's is left out"
    return f"{name}: {' '.join(key)}: {best}\n  {ms[best]} ms, {beside}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the choices that change, keep them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = sorted(path.name.removesuffix("_launches.py") for path in TESTS.glob("*_launches.py"))
    parser.add_argument("ops", nargs="*", default=known, metavar="op", help=f"of {', '.join(known)}")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no case after these (%(default)s)")
    parser.add_argument("--again", action="store_true", help="also measure what the table holds")
    parser.add_argument("--folder", type=Path, default=_launch_table.FOLDER)
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(known):
        parser.error(f"op: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("there is no CUDA device")
    sys.path.append(str(TESTS))
    torch.manual_seed(0)
    record = Record(options.folder, architecture(torch.device(device)))
    _launch_table.table.cache_clear()
    timer, ends = Timer(device), time.monotonic() + 60 * options.minutes
    for name, case in cases(options.ops, options.only):
        if time.monotonic() > ends:
            print("time is up; call again to go on", flush=True)
            break
        with torch.no_grad():
            for call in operations_of(case, device):
                with exploring() as met:
                    call()
                for key, plans in met.items():
                    if len(plans) < 2 or (key in record and not options.again):
                        continue
                    try:
                        ms = measure(call, key, plans, timer, record.reasons(key, again=options.again))
                        record.add(key, ms, plans[0])
                    finally:  # after a fault of the device too: the next run leaves that plan out
                        record.save()
                    print(described(name, key, ms, plans[0]), flush=True)


if __name__ == "__main__":
    main()
