"""graphs: which calls share a graph, and what makes a new one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from recorded_graphs import Recorder, Scaled
from torch import nn

from sdfast import dispatch, graphs, packing
from sdfast.graphs import graphed


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(graphs, "_can_capture", lambda owner, tensors: True)


@torch.no_grad()
def test_one_graph_for_each_kind_of_call(on_cpu):
    model, cache = Scaled(), Recorder()
    run = graphed(model, cache=cache)
    for size in (3, 4, 3, 3, 4):
        x = torch.randn(size)
        assert torch.equal(run(x)["y"], 2 * x)
    assert (cache.captured, len(cache)) == (2, 2)
    x = torch.randn(3)
    assert torch.equal(run(x, 3.0)["y"], 6 * x) and cache.captured == 3
    assert torch.equal(run(x, factor=3.0)["y"], 6 * x) and cache.captured == 4
    assert torch.equal(run(x, more=[x])["y"], 3 * x) and cache.captured == 5
    assert torch.equal(run(x, more=[2 * x])["y"], 4 * x) and cache.captured == 5
    assert torch.equal(run(x.double())["y"], 2 * x.double()) and cache.captured == 6
    model.eval()
    assert torch.equal(run(x)["y"], 2 * x) and cache.captured == 7


@torch.no_grad()
def test_what_chooses_kernels_chooses_graphs(on_cpu):
    model, cache, x = Scaled(), Recorder(), torch.ones(2)
    run = graphed(model, cache=cache)
    run(x)
    for switch, value in (
        (dispatch.use_backend, "reference"),
        (dispatch.use_numerics, "exact"),
        (dispatch.use_memory, "low"),
        (dispatch.use_tuning, "off"),
    ):
        captured = cache.captured
        with switch(value):
            run(x)
            assert cache.captured == captured + 1
        run(x)
        assert cache.captured == captured + 1


def attribute(owner, name):
    """Its value, and what sets it."""
    return getattr(owner, name), lambda value: setattr(owner, name, value)


TORCH_SWITCHES = {
    "matmul": lambda: (*attribute(torch.backends.cuda.matmul, "fp32_precision"), "tf32"),
    "conv": lambda: (*attribute(torch.backends.cudnn.conv, "fp32_precision"), "ieee"),
    **{
        name: lambda name=name: (*attribute(torch.backends.cudnn, name), None)
        for name in ("enabled", "benchmark", "deterministic")
    },
    **{
        name: lambda name=name: (*attribute(torch.backends.cuda.matmul, name), None)
        for name in (
            "allow_fp16_reduced_precision_reduction",
            "allow_bf16_reduced_precision_reduction",
            "allow_fp16_accumulation",
        )
    },
    **{
        name: lambda name=name: (
            getattr(torch.backends.cuda, f"{name}_sdp_enabled")(),
            getattr(torch.backends.cuda, f"enable_{name}_sdp"),
            None,
        )
        for name in ("flash", "mem_efficient", "math", "cudnn")
    },
    "deterministic_algorithms": lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.use_deterministic_algorithms,
        None,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", TORCH_SWITCHES)
def test_what_chooses_the_kernels_of_torch_chooses_graphs(on_cpu, name):
    before, change, value = TORCH_SWITCHES[name]()
    cache, x = Recorder(), torch.ones(2)
    run = graphed(Scaled(), cache=cache)
    run(x)
    try:
        change(not before if value is None else value)
        run(x)
        run(x)
        assert cache.captured == 2
    finally:
        change(before)
    run(x)
    assert cache.captured == 2


@torch.no_grad()
def test_weights_that_changed_or_moved_are_captured_anew(on_cpu):
    model, cache, x = Scaled(), Recorder(), torch.ones(2)
    run = graphed(model.forward, cache=cache)
    run(x)
    model.weight.mul_(2)
    assert run(x)["y"][0] == 4 and run(x)["y"][0] == 4 and cache.captured == 2
    old = model.weight.data  # kept, so that the new one cannot lie in its place
    model.weight.data = torch.tensor(5.0)
    assert run(x)["y"][0] == 5 and cache.captured == 3 and len(cache) == 1
    assert old == 4


@torch.no_grad()
def test_a_layer_that_was_replaced_is_captured_anew(on_cpu):
    """Also one without weights, and one that takes over those of the old; a part may change its mode alone."""
    model, cache, x = nn.Sequential(Scaled(), nn.Flatten(0), nn.Dropout(0.0)), Recorder(), torch.ones(2)
    model[0].forward = lambda x: x
    run = graphed(model, cache=cache)
    assert run(x).tolist() == [1, 1] and cache.captured == 1
    model[1] = nn.Threshold(2.0, 7.0)
    assert run(x).tolist() == [7, 7] and cache.captured == 2
    doubling = Scaled()
    doubling.weight = model[0].weight
    doubling.forward = lambda x: 3 * x
    model[0] = doubling
    assert run(x).tolist() == [3, 3] and cache.captured == 3
    model[2].eval()
    run(x)
    assert cache.captured == 4 and len(cache) == 1


class PacksOnce(nn.Module):
    """Reads a copy of its weight, which is made outside of the graph, as a kernel's packed one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.packed = None, None

    def forward(self, x):
        if self.packed[0] != self.weight._version:
            self.packed = self.weight._version, packing.packed(self.weight, "twice", lambda w: 2 * w)
        return x * self.packed[1]


@torch.no_grad()
def test_copies_of_weights_are_made_anew_with_the_graph_and_outlive_their_budget(on_cpu):
    model, cache, x = PacksOnce(), Recorder(), torch.ones(2)
    run = graphed(model, cache=cache)
    assert run(x)[0] == 2
    model.weight.add_(1)
    assert run(x)[0] == 4 and cache.captured == 2
    alive = weakref.ref(model.packed[1])
    model.packed = model.packed[0], None
    packing.clear()
    gc.collect()
    assert alive() is not None  # the graph reads it by its address
    cache.release()
    gc.collect()
    assert alive() is None


def test_inference_tensors_have_no_version(on_cpu):
    with torch.inference_mode():
        model, cache, x = Scaled(), Recorder(), torch.ones(2)
        run = graphed(model, cache=cache)
        assert run(x)["y"][0] == 2
        model.weight.mul_(2)
        assert run(x)["y"][0] == 4 and cache.captured == 1  # it is read where it lies


@torch.no_grad()
def test_a_function_of_another_id_has_its_own_graph(on_cpu):
    """A method is a new object at each access, and an id may come back after its object is gone."""
    model, cache, x = Scaled(), Recorder(), torch.ones(2)
    for _ in range(3):
        graphed(model.forward, cache=cache)(x)
    assert cache.captured == 1
    for factor in range(5):
        run = graphed(lambda x, factor=factor: model(x, factor), model, cache)
        assert torch.equal(run(x)["y"], torch.full((2,), 2.0 * factor))
    assert cache.captured == 6
