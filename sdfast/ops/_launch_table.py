"""Which of a kernel's plans serves a call: what was measured on this architecture, else what a rule expects.

    plan = choose("linear", (dtype, near(tokens), rows, k), plans, device)

A launcher lists the plans that it has for a call, each with the cost that its rule expects. The table of an
architecture, assets/launches/sm_<capability>.json, names for buckets of shapes the plan that was fastest on
such a GPU, as benchmarks/tune_launches.py measured it; where it names none, or one that is no longer listed,
the least cost decides. Nothing is timed here: a call compiles what it launches and nothing else. Sizes that
change from call to call belong in a bucket by `near`, so that a new resolution finds its neighbour's plan.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from sdfast.ops._triton import Config, architecture

FOLDER = pathlib.Path(__file__).parents[1] / "assets" / "launches"


class Plan(Protocol):
    """How one call is launched.

    Attributes:
        config: tile sizes and launch options.
        kind: what tells it from plans of the same config, in all sizes of a bucket; "" if nothing does.
        cost: what the rule expects, in a unit that is the same for all plans of a call.
    """

    @property
    def config(self) -> Config: ...
    @property
    def kind(self) -> str: ...
    @property
    def cost(self) -> float: ...


AnyPlan = TypeVar("AnyPlan", bound=Plan)
Key = tuple[str, str]  # a kernel, a bucket
# What `exploring` has met, and the plans that `preferring` names.
_met: dict[Key, list[str]] | None = None
_preferred: dict[Key, str] = {}


def near(size: int) -> int:
    """The power of two at or above a size."""
    return 1 << max(size - 1, 0).bit_length()


def name_of(plan: Plan) -> str:
    """All that tells a plan from the others of its call, and nothing that changes within a bucket."""
    constants = (f"{name}={value}" for name, value in plan.config.constants.items())
    more = (f"warps={plan.config.num_warps}", f"stages={plan.config.num_stages}", plan.kind)
    return " ".join((*constants, *more)).rstrip()


def choose(kernel: str, bucket: Sequence[object], plans: Sequence[AnyPlan], device: torch.device) -> AnyPlan:
    """The plan that serves a call.

    Args:
        kernel: what its table is called.
        bucket: what the choice depends on: dtypes and sizes, those that vary by `near`.
        plans: at least one; of those that cost the same, the first goes first.
        device: of the call.
    """
    measured = table(architecture(device)).get(kernel)
    if not measured and not _preferred and _met is None:
        return min(plans, key=lambda plan: plan.cost)  # nothing asks for the bucket's name
    key = (kernel, " ".join(str(part).removeprefix("torch.") for part in bucket))
    if _met is not None:
        _met[key] = [name_of(plan) for plan in sorted(plans, key=lambda plan: plan.cost)]
    wanted = _preferred.get(key) or (measured or {}).get(key[1])
    if wanted is not None:
        for plan in plans:
            if name_of(plan) == wanted:
                return plan
    return min(plans, key=lambda plan: plan.cost)


@functools.cache
def table(capability: int) -> dict[str, dict[str, str]]:
    """Plans by kernel and bucket, as measured on this compute capability; empty where nothing was."""
    file = FOLDER / f"sm_{capability}.json"
    return json.loads(file.read_text(encoding="utf-8"))["plans"] if file.exists() else {}


@contextlib.contextmanager
def exploring() -> Iterator[dict[Key, list[str]]]:
    """Keep the names of the plans of every choice meanwhile, the rule's own first."""
    global _met
    before, _met = _met, {}
    try:
        yield _met
    finally:
        _met = before


@contextlib.contextmanager
def preferring(key: Key, name: str) -> Iterator[None]:
    """Let one choice take the plan of this name."""
    before = _preferred.get(key)
    _preferred[key] = name
    try:
        yield
    finally:
        del _preferred[key]
        if before is not None:
            _preferred[key] = before
