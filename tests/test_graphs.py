"""graphs: which calls share a graph, what makes a new one, what stays; captured for real where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from tiny_models import UNET
from torch import nn

from sdfast import graphs
from sdfast.graphs import Capture, GraphCache, graphed
from sdfast.models import UNet2DCondition
from sdfast.models.config import config_from_dict


class Recorder(GraphCache):
    """Captures on the CPU: a replay runs the function on the captured tensors and writes the captured results."""

    def __init__(self, budget_bytes=graphs.BUDGET_BYTES):
        super().__init__(budget_bytes)
        self.captured = 0

    def capture(self, function, tensors):
        self.captured += 1
        inputs = [t.clone() for t in tensors]
        outputs = function(inputs)

        def replay():
            for to, new in zip(
                graphs.pytree.tree_leaves(outputs), graphs.pytree.tree_leaves(function(inputs)), strict=True
            ):
                to.copy_(new)

        return Capture(inputs, outputs, replay, nbytes=100)

    def replay(self, capture, tensors):
        return graphs._copied_through(capture, tensors)


def tiny_unet():
    return UNet2DCondition(config_from_dict(UNet2DCondition, UNET)).eval()


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(graphs, "_can_capture", lambda owner, tensors: True)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, factor=1.0, *, more=None):
        return {"y": x * self.weight * factor + (0 if more is None else more[0])}


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
def test_results_outlive_the_next_call(on_cpu):
    run = graphed(Scaled(), cache=Recorder())
    first = run(torch.ones(2))["y"]
    run(torch.zeros(2))
    assert torch.equal(first, torch.full((2,), 2.0))


@torch.no_grad()
def test_changed_weights_are_seen_and_moved_ones_captured_anew(on_cpu):
    model, cache, x = Scaled(), Recorder(), torch.ones(2)
    run = graphed(model.forward, cache=cache)
    run(x)
    model.weight.mul_(2)
    assert run(x)["y"][0] == 4 and cache.captured == 1
    old = model.weight.data  # kept, so that the new one cannot lie in its place
    model.weight.data = torch.tensor(5.0)
    assert run(x)["y"][0] == 5 and cache.captured == 2 and len(cache) == 1
    assert old == 4


@torch.no_grad()
def test_the_least_recently_used_go_first(on_cpu):
    cache = Recorder(budget_bytes=250)
    run = graphed(Scaled(), cache=cache)
    for size in (1, 2, 1, 3, 1):
        run(torch.ones(size))
    assert cache.captured == 3 and len(cache) == 2 and cache.used_bytes() == 200
    run(torch.ones(2))
    assert cache.captured == 4
    cache.release()
    assert len(cache) == 0 and torch.equal(run(torch.ones(1))["y"], torch.tensor([2.0]))
    tight = Recorder(budget_bytes=0)
    assert graphed(Scaled(), cache=tight)(torch.ones(1))["y"] == 2 and len(tight) == 1


@torch.no_grad()
def test_precomputed_time_and_text_are_inputs(on_cpu):
    """A new step's embedding is copied to where the graph reads it, and captures nothing."""
    unet = tiny_unet()
    cache = Recorder()
    run = graphed(unet, cache=cache)
    text = torch.randn(2, 5, UNET["cross_attention_dim"])
    context, times = unet.encode_context(text), unet.encode_time(torch.tensor([3, 500, 900]))
    for time in times:
        x = torch.randn(2, 4, 8, 8)
        assert torch.equal(run(x, time, context), unet(x, time, context))
    assert cache.captured == 1


def test_what_cannot_be_captured_runs_as_it_is():
    model, cache = Scaled(), Recorder()
    run = graphed(model, cache=cache)
    x = torch.ones(2, requires_grad=True)
    run(x)["y"].sum().backward()
    assert x.grad is not None and cache.captured == 0
    assert graphed(model, enabled=False) is model


def test_bad_arguments(on_cpu):
    with pytest.raises(TypeError, match="argument: got bytearray, expected tensors, numbers, or lists"):
        graphed(Scaled(), cache=Recorder())(torch.ones(2), bytearray())
    with pytest.raises(
        TypeError, match=r"model: got NoneType, expected the torch.nn.Module that function runs"
    ):
        graphed(lambda x: x)
    with pytest.raises(ValueError, match="budget_bytes: got -1, expected 0 or more"):
        GraphCache(-1)


@pytest.mark.gpu
@torch.no_grad()
def test_captured_on_a_gpu():
    unet, cache = tiny_unet().cuda(), GraphCache()
    run = graphed(unet, cache=cache)
    text = torch.randn(2, 5, UNET["cross_attention_dim"], device="cuda")
    for size in (8, 16, 8):
        x = torch.randn(2, 4, size, size, device="cuda")
        torch.testing.assert_close(run(x, 500, text), unet(x, 500, text))
    assert len(cache) == 2 and cache.used_bytes() > 0
