"""torch.compile and torch.export of an optimised model: one graph, the same results."""

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


@torch.no_grad()
def test_export(pair):
    ours, theirs = pair
    program = torch.export.export(ours, ARGUMENTS, strict=False)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("sdfast" in target for target in targets)
    assert relative_error(program.module()(*ARGUMENTS).sample, theirs(*ARGUMENTS).sample) < 2e-5
