"""Which implementation serves a call.

Names: `reference` is the definition (fp32 arithmetic), `torch` the same formula in the tensors' own
dtype through torch's kernels, `cpu` and `cuda` are compiled kernels, `triton` is Triton.
The order below is set from recorded benchmarks; the first that can run serves the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")

# Device type -> candidates, best first. `torch` can always run, so it ends every list. On CUDA no kernel of
# ours was measured yet, or has so much as run: they serve where they are named.
ORDER: Mapping[str, tuple[str, ...]] = {"cpu": ("cpu", "torch"), "cuda": ("torch",)}

# Process-wide, as torch.backends flags are; a plain global, so that torch.compile guards on it.
_forced: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call that names no backend itself by `name`, where that can run.

    An operation that has no such implementation falls back to torch, so that
    `use_backend("cpu")` means "compiled kernels wherever there are any".

    Raises:
        ValueError: `name` is not one of `BACKENDS`.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def is_named(backend: str | None) -> bool:
    """Whether a call's backend was asked for, by the call or by `use_backend`, and not chosen."""
    return backend is not None or _forced is not None


NUMERICS = ("exact", "fast")
_numerics = "fast"


@contextlib.contextmanager
def use_numerics(name: str) -> Iterator[None]:
    """How far kernels may reorder arithmetic.

    "fast", the default, allows Winograd convolutions in fp32 arithmetic: at most 5e-5 of relative error a
    layer in inference, 1e-5 in training, for the result and for each gradient, and a NaN reaches the whole
    of its 4x4 tile. "exact" keeps every kernel within twice eager's error. Process-wide, as `use_backend`;
    what is in force when the forward runs holds for its gradients.

    Raises:
        ValueError: `name` is not one of `NUMERICS`.
    """
    global _numerics
    check_switch("numerics", name)
    previous, _numerics = _numerics, name
    try:
        yield
    finally:
        _numerics = previous


def numerics() -> str:
    """What `use_numerics` says."""
    return _numerics


MEMORY = ("low", "default", "high")
_memory = "default"


@contextlib.contextmanager
def use_memory(name: str) -> Iterator[None]:
    """How much memory kernels may spend on copies of weights in their own layouts.

    "default": at most 1.0 times the weights, or 1 GiB where that is more; "low": makes none, at the price of
    speed (`sdfast.packing.clear` drops those that are there); "high": whatever makes a layer fastest, up to 4
    times a 3x3 convolution's weight, 11 times after an upsample, and twice that in bf16. Which layers have a
    copy decides their last bits: with "default" that is settled by a model's first two calls. Process-wide,
    as `use_backend`.

    Raises:
        ValueError: `name` is not one of `MEMORY`.
    """
    global _memory
    check_switch("memory", name)
    previous, _memory = _memory, name
    try:
        yield
    finally:
        _memory = previous


def memory() -> str:
    """What `use_memory` says."""
    return _memory


TUNING = ("off", "saved", "first-use")
_tuning = "saved"


@contextlib.contextmanager
def use_tuning(name: str) -> Iterator[None]:
    """Whether algorithms are chosen by times measured on this machine, see `sdfast.tune`.

    "saved", the default, uses what was measured before and measures nothing; "first-use" also measures a
    shape when it is first met, which takes seconds, and keeps the times; "off" follows the built-in rules
    alone, so that a file of measured times changes nothing. Process-wide, as `use_backend`.

    Raises:
        ValueError: `name` is not one of `TUNING`.
    """
    global _tuning
    check_switch("tuning", name)
    previous, _tuning = _tuning, name
    try:
        yield
    finally:
        _tuning = previous


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


def set_switches(*, numerics: str | None = None, memory: str | None = None) -> None:
    """Set what `use_numerics` and `use_memory` set for a while; None leaves it."""
    global _numerics, _memory
    _numerics, _memory = numerics or _numerics, memory or _memory
