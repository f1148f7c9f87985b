"""Which implementation serves a call.

Names: `reference` is the definition (fp32 arithmetic), `torch` the same formula in the tensors' own
dtype through torch's kernels, `cpu` and `cuda` are compiled kernels, `triton` is Triton.
The order below is set from recorded benchmarks; the first that can run serves the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")

# Device type -> candidates, best first. `torch` can always run, so it ends every list. What was measured on a
# GPU has lists of its own, by operation and shape (ops/_cuda_order.py).
ORDER: Mapping[str, tuple[str, ...]] = {"cpu": ("cpu", "torch"), "cuda": ("torch",)}

# Process-wide, as torch.backends flags are; a plain global, so that torch.compile guards on it.
_forced: str | None = None


class Switched(contextlib.ContextDecorator):
    """A switch that was set: for good, in a block of `with`, or as a decorator while the function runs."""

    def __init__(self, switch: Callable[[Any], None], value: str | None, previous: str | None) -> None:
        self._switch, self._value, self._previous = switch, value, previous
        switch(value)

    def __enter__(self) -> None:
        self._switch(self._value)

    def __exit__(self, *_: object) -> None:
        self._switch(self._previous)

    def __call__(self, function: Callable[..., Any]) -> Any:
        self._switch(self._previous)
        return super().__call__(function)


def use_backend(name: str | None) -> Switched:
    """Serve every call that names no backend itself by `name`, where that can run, from now on.

    An operation that has no such implementation falls back to torch, so that
    `use_backend("cpu")` means "compiled kernels wherever there are any".

    Args:
        name: one of `BACKENDS`; None for each call's fastest, as at first.

    Returns:
        A context manager: `with use_backend(name):` sets it back at the end of the block. Around a compiled
        function, that is: in one, what convolutions ask for when they run is what holds outside.

    Raises:
        ValueError: `name` is neither one of `BACKENDS` nor None.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}, or None")
    return Switched(_set_backend, name, _forced)


def _set_backend(name: str | None) -> None:
    global _forced
    _forced = name


def is_named(backend: str | None) -> bool:
    """Whether a call's backend was asked for, by the call or by `use_backend`, and not chosen."""
    return backend is not None or _forced is not None


NUMERICS = ("exact", "fast")
_numerics = "fast"


def use_numerics(name: str) -> Switched:
    """How far kernels may reorder arithmetic.

    "fast", the default, allows Winograd convolutions in fp32 arithmetic: at most 5e-5 of relative error a
    layer in inference, 1e-5 in training, for the result and for each gradient, and a NaN reaches the whole
    of its 4x4 tile. On CPUs with AMX it also allows products of fp32 values as sums of two bf16 ("bf16x3",
    16 bits of 24): 3e-6 to 1e-5 a layer, in attention more where scores are large, which are off by that
    much of |q||k|; and what is infinite, or as large as 3.39e38, may become NaN. "exact" keeps every kernel
    within twice eager's error. Process-wide, as `use_backend`; what is in force when the forward runs holds
    for its gradients.

    Args:
        name: one of `NUMERICS`.

    Returns:
        A context manager, as `use_backend`.

    Raises:
        ValueError: `name` is not one of `NUMERICS`.
    """
    check_switch("numerics", name)
    return Switched(_set_numerics, name, _numerics)


def _set_numerics(name: str) -> None:
    global _numerics
    _numerics = name


def numerics() -> str:
    """What `use_numerics` says."""
    return _numerics


MEMORY = ("low", "default", "high")
_memory = "default"


def use_memory(name: str) -> Switched:
    """How much memory kernels may spend on copies of weights in their own layouts.

    "default": at most 1.0 times the weights, or 1 GiB where that is more; "low": none, so that Winograd
    convolutions transform their weights at each call (`sdfast.packing.clear` drops copies that are there);
    "high": whatever makes a layer fastest, up to 4
    times a 3x3 convolution's weight, 11 times after an upsample, and twice that in bf16. Which layers have a
    copy decides their last bits: with "default" that is settled by a model's first two calls. Process-wide,
    as `use_backend`.

    Args:
        name: one of `MEMORY`.

    Returns:
        A context manager, as `use_backend`.

    Raises:
        ValueError: `name` is not one of `MEMORY`.
    """
    check_switch("memory", name)
    return Switched(_set_memory, name, _memory)


def _set_memory(name: str) -> None:
    global _memory
    _memory = name


def memory() -> str:
    """What `use_memory` says."""
    return _memory


TUNING = ("off", "saved", "first-use")
_tuning = "saved"


def use_tuning(name: str) -> Switched:
    """Whether algorithms are chosen by times measured on this machine, see `sdfast.tune`.

    "saved", the default, uses what was measured before and measures nothing; "first-use" also measures a
    shape when it is first met, which takes seconds, and keeps the times; "off" follows the built-in rules
    alone, so that a file of measured times changes nothing. Process-wide, as `use_backend`.

    Args:
        name: one of `TUNING`.

    Returns:
        A context manager, as `use_backend`.

    Raises:
        ValueError: `name` is not one of `TUNING`.
    """
    check_switch("tuning", name)
    return Switched(_set_tuning, name, _tuning)


def _set_tuning(name: str) -> None:
    global _tuning
    _tuning = name


def tuning() -> str:
    """What `use_tuning` says."""
    return _tuning


def switches() -> tuple[str | None, ...]:
    """All that the switches above say: what else a recorded sequence of kernels depends on."""
    return _forced, _numerics, _memory, _tuning


def choose(
    op: str,
    device_type: str,
    unavailable: Mapping[str, str],
    backend: str | None,
    *,
    order: tuple[str, ...] | None = None,
) -> str:
    """Return the backend that serves one call of `op`.

    Args:
        op: the operation's name, for the error text.
        device_type: "cpu", "cuda", ... of the tensors.
        unavailable: reason by backend, for each backend that cannot serve this call.
        backend: the caller's own choice, or None.
        order: candidates for this call, best first, where it differs from `ORDER`.

    Raises:
        ValueError: `backend` is unknown, or cannot run; the reason is in the message.
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
        if backend in unavailable:
            raise ValueError(f"{op}: backend {backend!r} cannot run: {unavailable[backend]}")
        return backend
    if _forced is not None:
        return _forced if _forced not in unavailable else "torch"
    for candidate in order or ORDER.get(device_type, ("torch",)):
        if candidate not in unavailable:
            return candidate
    return "torch"


def check_switch(name: str, value: object) -> None:
    """Raise ValueError unless `value` is one of `numerics`', `memory`'s or `tuning`'s."""
    allowed = {"numerics": NUMERICS, "memory": MEMORY, "tuning": TUNING}[name]
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(allowed)}")
