"""CUDA graphs: a model's launches captured once for each kind of call, then replayed by a single one.

    step = graphs.graphed(unet.forward, unet)        # or unet, graphs.GraphCache(budget_bytes=4 << 30)
    noise = step(latents, timestep, text)

A step of a U-Net at batch 1 is some hundred kernels of microseconds, which the GPU runs faster than Python
launches them. A graph holds addresses, so inputs are copied to where it reads them, and results from where
it writes them. A new shape costs a capture; a weight that is changed in place is seen, one that moved, as
those of an offloaded model do, captures anew. All graphs of a cache share one memory pool and a budget,
above which the least recently used are dropped. What cannot be captured (CPU tensors, a call that records a
gradient, a call within another capture or under torch.compile) runs as it is.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

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
        nbytes: what it keeps of device memory.
    """

    inputs: list[Tensor]
    outputs: Any
    replay: Callable[[], None]
    nbytes: int


class GraphCache:
    """The graphs of one or several functions on one device, within one budget.

    Args:
        budget_bytes: of device memory for graphs, their intermediates, inputs and outputs; the graph of the
            latest call stays whatever it takes.
    """

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes: got {budget_bytes}, expected 0 or more")
        self.budget_bytes = budget_bytes
        self._captures: collections.OrderedDict[Hashable, tuple[tuple[int, ...], Capture]] = (
            collections.OrderedDict()
        )
        self._pool: Any = None
        self._lock = threading.RLock()
        self._last_use: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._captures)

    def used_bytes(self) -> int:
        """What its graphs keep of device memory."""
        return sum(capture.nbytes for _, capture in self._captures.values())

    def release(self) -> None:
        """Drop all graphs and their memory; later calls capture anew."""
        with self._lock:
            self._captures.clear()
            self._pool = None

    def run(
        self, key: Hashable, addresses: tuple[int, ...], tensors: Sequence[Tensor], function: Function
    ) -> Any:
        """The result of `function`, called with `tensors`, by the graph of this key.

        Args:
            key: all that the launches depend on but addresses.
            addresses: of the weights.
            tensors: the call's inputs, on one device.
            function: makes the call; takes a list of tensors in place of `tensors`.
        """
        with self._lock:
            known = self._captures.pop(key, None)
            if known is not None and known[0] == addresses:
                capture = known[1]
            else:
                capture = self.capture(function, tensors)
            self._captures[key] = addresses, capture
            self._drop_oldest()
            return self.replay(capture, tensors)

    def _drop_oldest(self) -> None:
        while len(self._captures) > 1 and self.used_bytes() > self.budget_bytes:
            self._captures.popitem(last=False)

    def replay(self, capture: Capture, tensors: Sequence[Tensor]) -> Any:
        """Copy the inputs in, run, copy the outputs out, all on the current stream."""
        with torch.cuda.device(tensors[0].device):
            stream = torch.cuda.current_stream()
            if self._last_use is not None:
                stream.wait_event(self._last_use)  # graphs share memory, so that two must not overlap
            outputs = _copied_through(capture, tensors)
            self._last_use = stream.record_event()
        return outputs

    def capture(self, function: Function, tensors: Sequence[Tensor]) -> Capture:
        """Warm up on a stream beside the current one, then capture."""
        with torch.cuda.device(tensors[0].device):
            inputs = [t.clone(memory_format=torch.preserve_format) for t in tensors]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARMUP_RUNS):
                    function(inputs)
            torch.cuda.current_stream().wait_stream(side)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.synchronize()
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = function(inputs)
            kept = max(0, torch.cuda.memory_reserved() - before)
        return Capture(inputs, outputs, graph.replay, kept + sum(t.nbytes for t in inputs))


def _copied_through(capture: Capture, tensors: Sequence[Tensor]) -> Any:
    for to, given in zip(capture.inputs, tensors, strict=True):
        to.copy_(given)
    capture.replay()
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
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in places]
        if not tensors or not _can_capture(owner, tensors):
            return function(*arguments, **keywords)

        def run(inputs: Sequence[Tensor]) -> Any:
            whole = list(leaves)
            for i, t in zip(places, inputs, strict=True):
                whole[i] = t
            positional, named = pytree.tree_unflatten(whole, structure)
            return function(*positional, **named)

        kinds = tuple(_kind(leaf) for leaf in leaves)
        weights = (*owner.parameters(), *owner.buffers())
        key = (id(function), structure, kinds, owner.training, torch.is_inference_mode_enabled(), _autocast())
        return graphs.run(key, tuple(w.data_ptr() for w in weights), tensors, run)

    return call


def _can_capture(owner: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether all lies on one GPU, no gradient is recorded, and nobody else captures or traces."""
    device = tensors[0].device
    if device.type != "cuda" or any(t.device != device for t in tensors) or torch.compiler.is_compiling():
        return False
    if torch.cuda.is_current_stream_capturing():
        return False
    recorded = (*tensors, *owner.parameters()) if torch.is_grad_enabled() else ()
    return not any(t.requires_grad for t in recorded)


def _kind(leaf: object) -> Hashable:
    """All that launches depend on: of a tensor what it is, of anything else its value."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device
    if not isinstance(leaf, Hashable):
        raise TypeError(f"argument: got {type(leaf).__name__}, expected tensors, numbers, or lists of these")
    return type(leaf), leaf


def _autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
