"""CUDA graphs: a model's launches captured once for each kind of call, then replayed by a single one.

    denoise = graphs.graphed(unet)                   # or unet, graphs.GraphCache(budget_bytes=4 << 30)
    noise = denoise(latents, timestep, text)
    state = graphs.repeat(step, 50, state, constants, model=unet, cache=cache)       # a whole loop

A step of a U-Net at batch 1 is some hundred kernels of microseconds, which the GPU runs faster than Python
launches them. A graph holds addresses, so inputs are copied to where it reads them, and results from where
it writes them; of a loop whose state stays on the device, once for all steps. A new shape costs a capture.

A layer that was replaced, a weight that moved, as those of an offloaded model do, or whose version counter
did, as at an optimiser's step, captures anew: a kernel may read a copy of it in another layout (packing.py),
which is made outside of the graph. `weight.data += ...` and writes to inference tensors move no counter: call
`release` after them, and `packing.clear` before.

All graphs of a cache share one memory pool, whose intermediates lie over each other, and a budget. The
allocator gives a pool back when its last graph is gone, so above the budget all are dropped but the newest.
What cannot be captured (CPU tensors, a call that records a gradient, a model with hooks, which a replay would
not call, a call within another capture or under torch.compile) runs as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.utils import _pytree as pytree

from sdfast import packing
from sdfast._graph_keys import call_key, model_identity, modules_of, weights_of

BUDGET_BYTES = 4 << 30
# Runs before a capture: the first of them compile kernels and fill caches, which a capture must not.
_WARMUP_RUNS = 2

Function = Callable[..., Any]


class Capture(NamedTuple):
    """One captured call.

    Attributes:
        inputs: the tensors it reads, in the order of the call's.
        outputs: what the function returned; each replay overwrites its tensors.
        replay: runs it.
        pool_bytes: by how much the pool grew for it, which has the outputs and what lies between.
    """

    inputs: list[Tensor]
    outputs: Any
    replay: Callable[[], None]
    pool_bytes: int


class _Entry(NamedTuple):
    """A capture, what it was made with (`model_identity`), and the packed copies of these weights."""

    identity: Hashable
    capture: Capture
    copies: list[Tensor]


class GraphCache:
    """The graphs of one or several functions on one device, within one budget.

    Args:
        budget_bytes: of device memory for graphs, their intermediates, inputs and outputs. A capture that
            goes beyond it drops all others and is made anew in a new pool, where it stays whatever it takes.
    """

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes: got {budget_bytes}, expected 0 or more")
        self.budget_bytes = budget_bytes
        self._entries: dict[Hashable, _Entry] = {}
        self._running: set[Hashable] = set()
        self._pool: Any = None
        self._pool_bytes = 0
        self._stream: torch.cuda.Stream | None = None
        self._lock = threading.RLock()
        self._last_use: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def is_running(self, key: Hashable) -> bool:
        """Whether the graph of this key is being replayed: its `observe` must not replay it in between."""
        return key in self._running

    def used_bytes(self) -> int:
        """What its graphs keep of device memory: their pool, and their inputs, which lie outside of it."""
        inputs = (t for entry in self._entries.values() for t in entry.capture.inputs)
        return self._pool_bytes + sum(t.nbytes for t in inputs)

    def pool_bytes(self) -> int:
        """What of it is the pool. It never shrinks while one of its graphs is there."""
        return self._pool_bytes

    def release(self) -> None:
        """Drop all graphs and their memory; later calls capture anew."""
        with self._lock:
            self._wait_for_last_use()
            self._entries.clear()
            self._pool, self._pool_bytes = None, 0

    def run(
        self,
        key: Hashable,
        model: nn.Module,
        tensors: Sequence[Tensor],
        function: Function,
        times: int = 1,
        observe: Callable[[int, Any], None] | None = None,
    ) -> Any:
        """The result of `function`, called with `tensors`, by the graph of this key.

        Args:
            key: all that the launches depend on but the model.
            model: whose modules and weights they are of; changed ones are captured anew.
            tensors: the call's inputs, on one device.
            function: makes the call; takes a list of tensors in place of `tensors`.
            times: how often the graph is replayed, on inputs that are copied once.
            observe: called as observe(i, results) after replay i; the next one overwrites their tensors.
        """
        with self._lock:
            modules = list(modules_of(model))
            weights = weights_of(modules)
            identity = model_identity(modules, weights)
            entry = self._entries.get(key)
            if entry is not None and entry.identity != identity:
                self._wait_for_last_use()
                entry = None
                del self._entries[key]  # what it had of the pool serves the next
            if entry is None:
                entry = self._add(key, identity, weights, tensors, function)
            self._running.add(key)
            try:
                return self.replay(entry.capture, tensors, times, observe)
            finally:
                self._running.remove(key)

    def _add(
        self,
        key: Hashable,
        identity: Hashable,
        weights: Sequence[Tensor],
        tensors: Sequence[Tensor],
        function: Function,
    ) -> _Entry:
        """Capture, within the budget: in the pool of the others, or after them in a new one."""
        if not self._entries or self._is_over_budget():
            self.release()  # a pool whose graphs are all gone is not to be used again
        while True:
            capture = self.capture(function, tensors)
            entry = self._entries[key] = _Entry(identity, capture, packing.copies_of(weights))
            self._pool_bytes += capture.pool_bytes
            if len(self._entries) == 1 or not self._is_over_budget():
                return entry
            del capture, entry
            self.release()

    def _is_over_budget(self) -> bool:
        return self.used_bytes() > self.budget_bytes

    def _wait_for_last_use(self) -> None:
        """Before memory is given up that a graph may still read, on a stream unknown to the allocator."""
        if self._last_use is not None:
            self._last_use.synchronize()

    def replay(
        self,
        capture: Capture,
        tensors: Sequence[Tensor],
        times: int = 1,
        observe: Callable[[int, Any], None] | None = None,
    ) -> Any:
        """Copy the inputs in, run, copy the outputs out, all on the current stream."""
        with torch.cuda.device(tensors[0].device):
            stream = torch.cuda.current_stream()
            if self._last_use is not None:
                stream.wait_event(self._last_use)  # graphs share memory, so that two must not overlap
            try:
                return _copied_through(capture, tensors, times, observe)
            finally:
                self._last_use = stream.record_event()

    def capture(self, function: Function, tensors: Sequence[Tensor]) -> Capture:
        """Warm up on a stream beside the current one, then capture on it.

        One stream for both and for all captures: a pool's blocks serve the stream that asked for them, and
        what cuBLAS keeps for a stream is there before the capture, so that no pool has to hold it.
        """
        with torch.cuda.device(tensors[0].device):
            inputs = [t.clone(memory_format=torch.preserve_format) for t in tensors]
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARMUP_RUNS):
                    function(inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # as the capture would: what is reserved from here on is the pool's
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                outputs = function(inputs)
            grown = max(0, torch.cuda.memory_reserved() - before)
        return Capture(inputs, outputs, graph.replay, grown)


def _copied_through(
    capture: Capture,
    tensors: Sequence[Tensor],
    times: int,
    observe: Callable[[int, Any], None] | None,
) -> Any:
    torch._foreach_copy_(capture.inputs, list(tensors))  # some hundred small ones: a launch for many
    for i in range(times):
        capture.replay()
        if observe is not None:
            observe(i, capture.outputs)
    return pytree.tree_map_only(Tensor, Tensor.clone, capture.outputs)


def graphed(
    function: Function,
    model: nn.Module | None = None,
    cache: GraphCache | None = None,
    *,
    enabled: bool = True,
) -> Function:
    """`function` by CUDA graphs, one for each kind of call.

    Args:
        function: of tensors, numbers and containers of these, without a gradient; it must not read a tensor's
            values on the host, nor depend on anything else that changes but the weights of `model`.
        model: whose parameters and buffers it reads; by default `function` itself, or what it is a method of.
        cache: where its graphs are kept, with a budget; one of its own by default.
        enabled: False gives `function` back.

    Raises:
        TypeError: there is no model to be found.
    """
    if not enabled:
        return function
    owner = function if model is None and isinstance(function, nn.Module) else model
    owner = getattr(function, "__self__", None) if owner is None else owner
    if not isinstance(owner, nn.Module):
        raise TypeError(f"model: got {type(owner).__name__}, expected the torch.nn.Module that function runs")
    graphs = GraphCache() if cache is None else cache

    def call(*arguments: Any, **keywords: Any) -> Any:
        leaves, structure = pytree.tree_flatten((arguments, keywords))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or not _can_capture(owner, tensors):
            return function(*arguments, **keywords)

        def run(inputs: Sequence[Tensor]) -> Any:
            positional, named = pytree.tree_unflatten(_filled(leaves, inputs), structure)
            return function(*positional, **named)

        return graphs.run(call_key(function, leaves, structure), owner, tensors, run)

    return call


def repeat(
    step: Function,
    times: int,
    state: Any,
    constants: Any,
    observe: Callable[[int, Any], None] | None = None,
    *,
    model: nn.Module,
    cache: GraphCache,
) -> Any:
    """A step so many times in a row, by replays of one graph of it.

    Args:
        step: (state, constants) -> state, as `graphed` takes a function; hashable, and equal to every other
            that launches the same. The new state has as many tensors as the old, like these but not the same.
        times: how many steps, at least 0.
        state: tensors, or a pytree of them, that a step changes; those given stay as they are.
        constants: what it reads besides, likewise. State and constants are copied to the graph once.
        observe: called as observe(i, state) after step i; the next step overwrites the tensors of the state.
        model: whose parameters and buffers the step reads.
        cache: where the graph is kept.

    Returns:
        The last state.
    """
    leaves, structure = pytree.tree_flatten((state, constants))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    key = call_key(step, leaves, structure)
    if not tensors or not _can_capture(model, tensors) or cache.is_running(key):
        for i in range(times):
            state = step(state, constants)
            if observe is not None:
                observe(i, state)
        return state

    def run(inputs: Sequence[Tensor]) -> Any:
        now, fixed = pytree.tree_unflatten(_filled(leaves, inputs), structure)
        following = step(now, fixed)
        places, values = (
            [leaf for leaf in pytree.tree_leaves(each) if isinstance(leaf, Tensor)]
            for each in (now, following)
        )
        torch._foreach_copy_(places, values)
        return now

    return cache.run(key, model, tensors, run, times, observe)


def _filled(leaves: Sequence[object], tensors: Sequence[Tensor]) -> list[object]:
    """The leaves with these tensors in place of theirs."""
    following = iter(tensors)
    return [next(following) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _can_capture(owner: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether all lies on one GPU, no gradient is recorded, no hook called, and nobody captures or traces."""
    device = tensors[0].device
    if device.type != "cuda" or any(t.device != device for t in tensors) or torch.compiler.is_compiling():
        return False
    if torch.cuda.is_current_stream_capturing():
        return False
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules_of(owner)):
        return False
    recorded = (*tensors, *owner.parameters()) if torch.is_grad_enabled() else ()
    return not any(t.requires_grad for t in recorded)
