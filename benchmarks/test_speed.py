"""What `sdfast bench` measures, as pytest benchmarks: every way of a case is a benchmark of its own.

    pytest benchmarks [-k conv2d] [--full] [--benchmark-json=FILE]
    pytest benchmarks --benchmark-autosave            # then, later:
    pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%

Results are checked before they are timed, as in `sdfast bench`, whose sides take turns: here one follows the
other, so that a machine that is busy for a while hits one of them. `sdfast bench compare` knows of both.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdfast import packing
from sdfast.bench.case import Spec
from sdfast.bench.models import LARGEST_FP32_ERROR
from sdfast.bench.operations import specs
from sdfast.bench.request import Request
from sdfast.bench.training import Training
from sdfast.bench.works import QUICK_WORKS, WORKS
from sdfast.testing import relative_error

DTYPES = (torch.float32, torch.bfloat16)
SIDES = ("eager", "sdfast")
Benchmark = Any


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    if "spec" in metafunc.fixturenames:
        chosen = specs(quick=not full)
        metafunc.parametrize("spec", chosen, ids=[f"{spec.op} {spec.name}" for spec in chosen])
    if "works" in metafunc.fixturenames:
        metafunc.parametrize("works", [WORKS if full else QUICK_WORKS], ids=["full" if full else "quick"])


@pytest.fixture(autouse=True)
def no_packed_copies():
    yield
    packing.clear()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operation(benchmark: Benchmark, spec: Spec, dtype: torch.dtype, side: str) -> None:
    benchmark.group = f"{spec.op} {spec.name}, {dtype}"  # the sides of a case beside each other
    case = spec.make(dtype, "cpu")
    with torch.set_grad_enabled(case.training):
        case.errors({name: case.ways[name]() for name in SIDES})
        benchmark(case.ways[side])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", WORKS)
def test_model(benchmark: Benchmark, works: dict, name: str, side: str) -> None:
    pytest.importorskip("diffusers")
    work = works[name]
    benchmark.group = work.title
    theirs = work.make_theirs().to(memory_format=torch.channels_last)
    models = {"eager": theirs, "sdfast": work.make_ours(theirs)}
    with torch.inference_mode():
        calls = {
            name: (work.forward(model), work.loop_inputs(model, torch.float32))
            for name, model in models.items()
        }
        results = [forward(*inputs) for forward, inputs in calls.values()]
        assert relative_error(results[1], results[0]) <= LARGEST_FP32_ERROR
        forward, inputs = calls[side]
        benchmark(forward, *inputs)


@pytest.mark.parametrize("side", SIDES)
def test_training(benchmark: Benchmark, works: dict, side: str) -> None:
    pytest.importorskip("diffusers")
    benchmark.group = "training"
    training = Training(works["unet"], torch.float32, Request())
    training.check()
    benchmark(training.step(side))
