"""torch.compile, torch.export, torch.jit.trace and torch.func of an optimised model: the same results."""

from __future__ import annotations

import copy

import pytest
import torch
from test_optimize import TEXT_DIM, made, randn

import sdfast
from sdfast.testing import relative_error

ARGUMENTS = (randn(2, 4, 8, 8), torch.tensor(7), randn(2, 5, TEXT_DIM, seed=1))


@pytest.fixture
def pair():
    theirs, _ = made("unet")
    ours = copy.deepcopy(theirs)
    sdfast.optimize(ours)
    return ours, theirs


@torch.no_grad()
def test_compile_fullgraph(pair):
    ours, theirs = pair
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        result = compiled(*ARGUMENTS, return_dict=False)[0]
    assert relative_error(result, theirs(*ARGUMENTS).sample) < 2e-5
    with sdfast.disabled():  # guarded on: the graph is another one
        assert relative_error(compiled(*ARGUMENTS, return_dict=False)[0], theirs(*ARGUMENTS).sample) < 2e-5


def test_compiled_gradients(pair):
    ours, theirs = pair
    torch.compile(ours, fullgraph=True, backend="aot_eager")(*ARGUMENTS, return_dict=False)[
        0
    ].sum().backward()
    theirs(*ARGUMENTS).sample.sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-4, name


@torch.no_grad()
def test_compiled_by_inductor(pair):
    """One block, so that the C++ compiler is not asked for a whole model."""
    ours, theirs = pair
    block = torch.compile(ours.mid_block.resnets[0], fullgraph=True)
    x, time = randn(2, 32, 4, 4), randn(2, 64)
    assert relative_error(block(x, time), theirs.mid_block.resnets[0](x, time)) < 2e-5


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
@torch.no_grad()
def test_jit_trace(pair):
    """For other inputs, and after the weights have changed: no copy of them is part of the trace."""
    ours, theirs = (model.requires_grad_(False) for model in pair)
    ours(*ARGUMENTS)  # what is kept is not used
    traced = torch.jit.trace(
        lambda *arguments: ours(*arguments, return_dict=False)[0], ARGUMENTS, check_trace=False
    )
    x, timestep, words = ARGUMENTS
    for _ in range(2):
        expected = theirs(2 * x, timestep, 1.5 * words).sample
        assert relative_error(traced(2 * x, timestep, 1.5 * words), expected) < 2e-5
        for model in pair:
            for parameter in model.parameters():
                parameter.mul_(1.01)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
@torch.no_grad()
def test_jit_trace_of_what_keeps_copies():
    theirs = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.Conv2d(64, 64, 3, padding=1))
    ours = copy.deepcopy(theirs).requires_grad_(False)
    sdfast.optimize(ours)
    x = randn(1, 64, 48, 48)
    with sdfast.use_memory("high"):
        ours(x)
        traced = torch.jit.trace(ours, x, check_trace=False)
    assert relative_error(traced(2 * x), theirs(2 * x)) < 1e-4


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
def test_vmap(pair):
    x, _, words = ARGUMENTS
    results = [
        torch.vmap(lambda x, words, model=model: model(x[None], 7, words[None]).sample[0])(x, words)
        for model in pair
    ]
    assert relative_error(*results) < 2e-5


@torch.no_grad()
def test_export(pair):
    ours, theirs = pair
    program = torch.export.export(ours, ARGUMENTS, strict=False)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("sdfast" in target for target in targets)
    assert relative_error(program.module()(*ARGUMENTS).sample, theirs(*ARGUMENTS).sample) < 2e-5
