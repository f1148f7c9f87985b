"""CUDA graphs without a GPU: captures that are counted, and a module to capture."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn
from torch.utils import _pytree as pytree

from sdfast import graphs
from sdfast.graphs import Capture, GraphCache


class Recorder(GraphCache):
    """Captures on the CPU: a replay runs the function on the captured tensors and writes the captured results.

    Its pool is a number that grows by 100 with each graph and is the allocator's until the last one is gone.
    """

    def __init__(self, budget_bytes=graphs.BUDGET_BYTES):
        super().__init__(budget_bytes)
        self.captured = self.replayed = 0
        self.pools = []

    def allocated(self):
        """Bytes of the pools of which a graph is alive, and of the inputs of living graphs."""
        gc.collect()
        alive = [graph for pool in self.pools if any(g() is not None for g in pool) for graph in pool]
        return 100 * len(alive) + sum(g().nbytes for g in alive if g() is not None)

    def capture(self, function, tensors):
        self.captured += 1
        inputs = [t.clone() for t in tensors]
        outputs = function(inputs)

        def replay():
            self.replayed += 1
            leaves = [pytree.tree_leaves(results) for results in (outputs, function(inputs))]
            for to, new in zip(*leaves, strict=True):
                if new is not None:
                    to.copy_(new)

        replay.nbytes = sum(t.nbytes for t in inputs)
        if self._pool is None:
            self._pool = []
            self.pools.append(self._pool)
        assert not self._pool or any(g() is not None for g in self._pool), "a pool that was given back"
        self._pool.append(weakref.ref(replay))
        return Capture(inputs, outputs, replay, pool_bytes=100)

    def replay(self, capture, tensors, times=1, observe=None):
        return graphs._copied_through(capture, tensors, times, observe)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, factor=1.0, *, more=None):
        return {"y": x * self.weight * factor + (0 if more is None else more[0])}
