"""The part `training`: forward and backward of a U-Net, beside diffusers in eager torch.

Random weights, batch 2, the squared error of a predicted noise; no optimiser. Before anything is timed the
gradients of some parameters are checked against eager's: in fp32 at most 1e-4 off, in other types at most
1.5 times as far from fp32 as eager's own. The sides share one set of parameters where their format allows,
and take turns in one process. sdfast packs no weights to train, so nothing that one step computes serves the
next.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sdfast.bench.plan import Planned
from sdfast.bench.record import Row
from sdfast.bench.request import Request, missing
from sdfast.bench.timing import in_turns, ratio, settled, timed, times
from sdfast.bench.works import SIZES, Work
from sdfast.dispatch import use_backend
from sdfast.memory import peak_memory_bytes, reset_peak_memory

LARGEST_FP32_ERROR = 1e-4
_CHECKED = slice(None, None, 23)  # of the parameters
Step = Callable[[], None]


def planned(request: Request, size: str | None = None) -> Iterator[Planned]:
    """A row for each dtype."""
    work = SIZES[size or ("quick" if request.quick else "full")]["unet"]
    for dtype in request.dtypes:
        title = work.title.replace("guided step", "forward and backward")
        row = {"part": "training", "name": title, "dtype": dtype}
        if reason := missing(("diffusers",)):
            yield Planned({**row, "skipped": dict.fromkeys(request.engines("training"), reason)}, dict)
            continue
        yield Planned(row, functools.partial(measured, work, getattr(torch, dtype), request))


def measured(work: Work, dtype: torch.dtype, request: Request) -> Row:
    """
    Raises:
        AssertionError: our gradients are wrong.
    """
    return Training(work, dtype, request).measure()


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of `errors`."""
    return max(errors(found, expected))


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """The relative error of each gradient; inf where one is not finite.

    One that cancels to almost nothing, as a bias's before a GroupNorm of single channels, is rounding alone:
    a thousandth of the gradients' usual norm divides where that is larger than its own.
    """
    norms = [float(torch.linalg.vector_norm(right)) for right in expected]
    usual = math.sqrt(sum(norm**2 for norm in norms) / len(norms))
    found_errors = [
        float(torch.linalg.vector_norm(actual - right)) / max(norm, 1e-3 * usual)
        for actual, right, norm in zip(found, expected, norms, strict=True)
    ]
    return [error if math.isfinite(error) else math.inf for error in found_errors]


def share_parameters(ours: nn.Module, theirs: Any) -> None:
    """Let `ours` hold the very parameters of `theirs`: memory for one copy of weights and gradients."""
    for name, parameter in theirs.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(module), leaf, parameter)


class Training:
    """The sides of one dtype, ready to step."""

    def __init__(self, work: Work, dtype: torch.dtype, request: Request) -> None:
        self.work, self.dtype, self.request = work, dtype, request
        shapes = work.shapes
        latents = (shapes[0][0], shapes[0][1], shapes[0][2] // 2, shapes[0][3] // 2)  # 256x256 images
        generator = torch.Generator().manual_seed(1)
        self.inputs = [
            torch.randn(shape, generator=generator).to(request.device)
            for shape in (latents, shapes[2], latents)
        ]
        original = work.make_theirs().to(request.device)
        theirs = original.to(dtype).to(memory_format=torch.channels_last)
        self.models: dict[str, Any] = {"eager": theirs}
        self.names = [name for name, _ in theirs.named_parameters()][_CHECKED]
        if "eager-contiguous" in request.engines("training"):
            self.models["eager-contiguous"] = copy.deepcopy(theirs).to(memory_format=torch.contiguous_format)
        ours = work.make_ours_empty(theirs)
        share_parameters(ours, theirs)
        self.models["sdfast"] = ours

    def step(self, name: str, dtype: torch.dtype | None = None) -> Step:
        model = self.models[name]
        dtype = dtype or self.dtype
        sample, text, noise = (t.to(self.dtype).to(dtype) for t in self.inputs)
        if name != "eager-contiguous":
            sample = sample.to(memory_format=torch.channels_last)
        backend = self.request.backend if name == "sdfast" else None

        def run() -> None:
            for other in self.models.values():  # one set of gradients in memory
                other.zero_grad(set_to_none=True)
            with use_backend(backend):
                y = model(sample, 500, text)
                y = y if isinstance(y, Tensor) else y.sample
                torch.nn.functional.mse_loss(y, noise).backward()

        return settled(run, self.request.device)  # type: ignore[return-value]

    def gradients(self, name: str) -> list[Tensor]:
        """Of every 23rd parameter, after a step."""
        parameters = dict(self.models[name].named_parameters())
        gradients = [parameters[name].grad for name in self.names]
        return [gradient.float().clone() for gradient in gradients]

    def reference(self) -> list[Tensor]:
        """eager's in fp32, from the same rounded weights and inputs."""
        if self.dtype == torch.float32:
            self.step("eager")()
            return self.gradients("eager")
        wide = copy.deepcopy(self.models["eager"]).float()
        self.models["wide"] = wide
        self.step("wide", torch.float32)()
        found = self.gradients("wide")
        del self.models["wide"]
        return found

    def check(self) -> dict[str, dict[str, Any]]:
        """A first step of each side.

        Returns:
            first_ms, the largest error of a gradient, and on a GPU peak_bytes, by side.

        Raises:
            AssertionError: our gradients are wrong.
        """
        expected = self.reference()
        sides: dict[str, dict[str, Any]] = {}
        device = torch.device(self.request.device)
        for name in self.models:
            reset_peak_memory(device)
            seconds, _ = timed(self.step(name))
            found = self.gradients(name)
            sides[name] = {"first_ms": 1e3 * seconds, "error": largest_error(found, expected)}
            if device.type == "cuda":  # a CPU's process has one peak for all sides
                sides[name]["peak_bytes"] = peak_memory_bytes(device)
        limit = LARGEST_FP32_ERROR if self.dtype == torch.float32 else 1.5 * sides["eager"]["error"]
        if not sides["sdfast"]["error"] <= limit:
            raise AssertionError(f"a gradient's error {sides['sdfast']['error']:.1e} exceeds {limit:.1e}")
        return sides

    def measure(self) -> dict[str, Any]:
        """
        Raises:
            AssertionError: our gradients are wrong.
        """
        sides = self.check()
        steps = {name: self.step(name) for name in self.models}
        samples = in_turns(steps, rounds=self.request.call_rounds)
        return {
            "rounds": self.request.call_rounds,
            "sides": {name: {**times(samples[name]), **side} for name, side in sides.items()},
            "ratios": {
                name: ratio(samples[name], samples["sdfast"]) for name in samples if name != "sdfast"
            },
        }  # fmt: skip
