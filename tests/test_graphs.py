"""graphs: loops, budgets, what is not captured; captured for real where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from recorded_graphs import Recorder, Scaled
from tiny_models import UNET
from torch import nn
from torch.nn.modules import module as everywhere

from sdfast import StableDiffusion, graphs
from sdfast.graphs import GraphCache, graphed, repeat
from sdfast.models import UNet2DCondition
from sdfast.models.config import config_from_dict


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(graphs, "_can_capture", lambda owner, tensors: True)


def tiny_unet():
    return UNet2DCondition(config_from_dict(UNet2DCondition, UNET)).eval()


@torch.no_grad()
def test_results_outlive_the_next_call(on_cpu):
    run = graphed(Scaled(), cache=Recorder())
    first = run(torch.ones(2))["y"]
    run(torch.zeros(2))
    assert torch.equal(first, torch.full((2,), 2.0))


def doubled(state, constants):
    """A step: doubles, adds, and counts."""
    return {"x": 2 * state["x"] + constants[0], "n": state["n"] + 1}


@torch.no_grad()
def test_a_loop_is_one_graph(on_cpu):
    model, cache = Scaled(), Recorder()
    for times, size in ((4, 3), (7, 3), (2, 5), (0, 3)):
        state = {"x": torch.ones(size), "n": torch.tensor(0)}
        seen = []
        last = repeat(
            doubled, times, state, [torch.tensor(1.0)],
            lambda i, state, seen=seen: seen.append((i, state["x"].tolist(), int(state["n"]))),
            model=model, cache=cache,
        )  # fmt: skip
        assert last["x"].tolist() == [2.0 ** (times + 1) - 1] * size and last["n"] == times
        assert seen == [(i, [2.0 ** (i + 2) - 1] * size, i + 1) for i in range(times)]
        assert torch.equal(state["x"], torch.ones(size)) and state["n"] == 0
    assert (cache.captured, cache.replayed) == (2, 13)


@torch.no_grad()
def test_the_results_of_a_loop_outlive_the_next_one(on_cpu):
    model, cache, state = Scaled(), Recorder(), {"x": torch.ones(1), "n": torch.tensor(0)}
    first = repeat(doubled, 1, state, [torch.tensor(0.0)], model=model, cache=cache)
    second = repeat(doubled, 2, state, [torch.tensor(5.0)], model=model, cache=cache)
    assert (first["x"], second["x"]) == (2, 19)


@torch.no_grad()
def test_a_loop_within_itself_leaves_it_alone(on_cpu):
    model, cache, state = Scaled(), Recorder(), {"x": torch.ones(1), "n": torch.tensor(0)}
    constants, within = [torch.tensor(1.0)], []

    def again(i, _):
        within.append(repeat(doubled, 3, state, constants, model=model, cache=cache)["x"].item())

    assert repeat(doubled, 4, state, constants, again, model=model, cache=cache)["x"] == 31
    assert within == [15] * 4 and cache.replayed == 4

    def fail(i, _):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repeat(doubled, 4, state, constants, fail, model=model, cache=cache)
    assert repeat(doubled, 4, state, constants, model=model, cache=cache)["x"] == 31 and cache.captured == 1
    assert cache.replayed == 9


@torch.no_grad()
def test_a_loop_that_cannot_be_captured_runs_as_it_is():
    cache, state = Recorder(), {"x": torch.ones(1), "n": torch.tensor(0)}
    seen = []
    last = repeat(
        doubled, 3, state, [torch.tensor(1.0)], lambda i, _: seen.append(i), model=Scaled(), cache=cache
    )
    assert last["x"] == 15 and last["n"] == 3 and seen == [0, 1, 2] and cache.captured == 0


def test_a_model_with_hooks_is_not_captured():
    """A replay would not call them. CUDA tensors are stood in for by what says it is one."""

    class OnCuda:
        device = torch.device("cuda", 0)
        requires_grad = False

    model = nn.Sequential(Scaled())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert graphs._can_capture(model, [OnCuda()]) is False  # its weight asks for a gradient
        with torch.no_grad():
            assert graphs._can_capture(model, [OnCuda()])
            for register in (model[0].register_forward_hook, model[0].register_forward_pre_hook):
                hook = register(lambda *_: None)
                assert not graphs._can_capture(model, [OnCuda()])
                hook.remove()
            for register in (
                everywhere.register_module_forward_hook,
                everywhere.register_module_forward_pre_hook,
            ):
                hook = register(lambda *_: None)
                assert not graphs._can_capture(model, [OnCuda()])
                hook.remove()
            assert graphs._can_capture(model, [OnCuda()])


@torch.no_grad()
def test_the_budget_bounds_the_pool(on_cpu):
    """Dropping some graphs of a pool frees nothing: the newest goes to a new pool, all others go."""
    cache = Recorder(budget_bytes=250)
    run = graphed(Scaled(), cache=cache)
    for size, captured, graphs_left in (
        (1, 1, 1), (2, 2, 2), (1, 2, 2), (3, 4, 1), (3, 4, 1), (1, 5, 2), (3, 5, 2), (9, 7, 1),
    ):  # fmt: skip
        assert torch.equal(run(torch.ones(size))["y"], torch.full((size,), 2.0))
        assert (cache.captured, len(cache)) == (captured, graphs_left)
        assert cache.used_bytes() == cache.allocated() <= 250
        assert cache.pool_bytes() == 100 * graphs_left
    cache.release()
    assert len(cache) == 0 == cache.used_bytes() == cache.allocated()
    assert torch.equal(run(torch.ones(1))["y"], torch.tensor([2.0]))


@torch.no_grad()
def test_the_newest_graph_stays_whatever_it_takes(on_cpu):
    cache = Recorder(budget_bytes=0)
    run = graphed(Scaled(), cache=cache)
    for size, captured in ((1, 1), (1, 1), (2, 2), (1, 3)):
        assert torch.equal(run(torch.ones(size))["y"], torch.full((size,), 2.0))
        assert len(cache) == 1 and cache.captured == captured and cache.allocated() == 100 + 4 * size


@torch.no_grad()
def test_a_pool_counts_what_graphs_before_left_in_it(on_cpu):
    """A weight that changed drops one graph; the pool of those that stay is as large as it was."""
    model, other = Scaled(), Scaled()
    cache = Recorder()
    for run in (graphed(model, cache=cache), graphed(other, cache=cache), graphed(model, cache=cache)):
        run(torch.ones(1))
        model.weight.mul_(2)
    assert len(cache) == 2 and cache.pool_bytes() == 300 and cache.used_bytes() == cache.allocated() == 308
    alone = Recorder()
    for _ in range(3):  # the only graph: its pool goes with it
        graphed(model, cache=alone)(torch.ones(1))
        model.weight.mul_(2)
    assert alone.used_bytes() == alone.allocated() == 104


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
    assert len(cache) == 2 and cache.pool_bytes() > 0


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_above_the_budget_are_given_back_on_a_gpu():
    """In turn by two sizes, each in a pool of its own: what is reserved is the same each round."""
    unet, cache = tiny_unet().cuda(), GraphCache(budget_bytes=0)
    run, reserved = graphed(unet, cache=cache), []
    text = torch.randn(2, 5, UNET["cross_attention_dim"], device="cuda")
    for size in (8, 64) * 3:
        run(torch.randn(2, 4, size, size, device="cuda"), 500, text)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
        assert len(cache) == 1 and cache.pool_bytes() > 0
    assert reserved[4:] == reserved[2:4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpm++2m"])
def test_a_pipeline_on_a_gpu(sampler):
    """The same kernels on the same numbers, whoever launches them."""
    options = {"steps": 8, "seed": 3, "sampler": sampler, "output": "tensor"}
    plain = StableDiffusion.digits(device="cuda", cuda_graphs=False)
    by_graphs = StableDiffusion.digits(device="cuda")
    expected = plain.text_to_image("a handwritten seven", **options).images
    for _ in range(2):
        assert torch.equal(by_graphs.text_to_image("a handwritten seven", **options).images, expected)
    assert len(by_graphs.graphs) == 2
    with torch.no_grad():
        for pipe in (plain, by_graphs):
            pipe.unet.conv_out.weight.mul_(0.5)
    changed = plain.text_to_image("a handwritten seven", **options).images
    assert not torch.equal(changed, expected)
    assert torch.equal(by_graphs.text_to_image("a handwritten seven", **options).images, changed)
