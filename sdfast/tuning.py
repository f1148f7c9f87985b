"""Which candidate was measured to be fastest for a shape, on this machine.

    sdfast.tune(unet, (latent, timestep, text))     # once; later processes read what was measured

Built-in rules, measured on one machine, choose between an operation's algorithms. `tune` times these
algorithms here, at the shapes that a model meets, checks their results, and keeps the times in a file. Its
times are valid for this CPU, instruction set, number of threads and versions, and for nothing else. All
candidates' times are kept, not the winner: what numerics and memory allow is decided at the call.

An operation takes part by `register`, and asks `times_of` at each call. What shapes and candidates mean is
its own matter.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sdfast import __version__, _library, _tuning_file, dispatch, packing
from sdfast._tuning_file import Shape, Table, Times, path

__all__ = ["Shape", "Times", "TunedShape", "path", "register", "reload", "times_of", "tune", "tuned_shapes"]

# Operation, a shape's first value -> times the candidates of a shape, within about so many seconds.
_measures: dict[str, Callable[[Shape, float], Times]] = {}
# All that the file holds, read when the first shape is asked for.
_file: dict[str, Table] | None = None
# What this process measured. Each save merges all of it: two that save at once may overtake each other.
_measured_here: dict[str, Table] = {}
# The shapes that are asked for while `tune` listens.
_asked_for: dict[Shape, None] | None = None
_lock = threading.RLock()

SECONDS_PER_SHAPE = 2.0


@dataclasses.dataclass(frozen=True)
class TunedShape:
    """One shape and the milliseconds its candidates take, from the fastest.

    A candidate whose result was off has no time.
    """

    shape: Shape
    ms: Times

    @property
    def best(self) -> str:
        """The fastest; numerics or memory may call for another."""
        return next(iter(self.ms))

    def __str__(self) -> str:
        times = ", ".join(f"{candidate} {ms:.3f} ms" for candidate, ms in self.ms.items())
        return f"{_as_text(self.shape)}: {times}"


def tune(
    model: Callable[..., object],
    inputs: Tensor | Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    seconds_per_shape: float = SECONDS_PER_SHAPE,
    again: bool = False,
) -> list[TunedShape]:
    """Time the algorithms that can serve the convolutions of a model, and use the fastest from now on.

    Runs the model once, without gradients, to see which shapes it meets. Times are kept after each shape: a
    run that is interrupted goes on where it ended. The machine should have nothing else to do. Other threads
    should run no model meanwhile.

    Args:
        model: a module, or anything that can be called: `lambda: pipe.text_to_image("a cat", steps=1)`.
        inputs: its positional arguments; a lone tensor stands for itself.
        kwargs: its keyword arguments.
        seconds_per_shape: after this long no further round is timed, once there are five.
        again: also time shapes that the file already holds.

    Returns:
        The shapes met; an empty list where no convolution was served by the compiled kernels.
    """
    shapes = _shapes_of(model, (inputs,) if isinstance(inputs, Tensor) else inputs, kwargs or {})
    table = _table()
    missing = [shape for shape in shapes if again or shape not in table]
    if missing:
        from tqdm import tqdm

        packing.clear()  # copies of weights for algorithms that may no longer be chosen
        with tqdm(missing, desc="tuning", unit="shape", dynamic_ncols=True) as bar:
            for shape in bar:
                bar.set_postfix_str(_as_text(shape))
                _measure(shape, seconds_per_shape)
    return [TunedShape(shape, table[shape]) for shape in shapes]


def times_of(shape: Shape) -> Times | None:
    """Milliseconds by candidate, from the fastest, or None where nothing was measured for this shape.

    Args:
        shape: all that the choice depends on but the machine, threads and versions; first the operation.
    """
    if _asked_for is not None:
        _asked_for[shape] = None
    if dispatch.tuning() == "off":
        return None
    times = _table().get(shape)
    if times is None and dispatch.tuning() == "first-use" and _asked_for is None:
        with _lock:
            times = _table().get(shape) or _measure(shape, SECONDS_PER_SHAPE)
    return times


def register(operation: str, measure: Callable[[Shape, float], Times]) -> None:
    """Let shapes of this operation be tuned.

    Args:
        operation: what its shapes begin with.
        measure: times the candidates of a shape, in ms, within about so many seconds.
    """
    _measures[operation] = measure


def tuned_shapes() -> int:
    """How many shapes were measured on this machine, with this number of threads."""
    return len(_table())


def reload() -> None:
    """Forget everything; the file is read when the next shape is asked for."""
    global _file
    _file = None
    _measured_here.clear()


def _shapes_of(
    model: Callable[..., object], inputs: Sequence[object], kwargs: Mapping[str, object]
) -> list[Shape]:
    """The shapes that the model asks for, in order."""
    global _asked_for
    with _lock:
        shapes: dict[Shape, None] = {}
        _asked_for = shapes
        try:
            with torch.no_grad():
                model(*inputs, **kwargs)
        finally:
            _asked_for = None
    return list(shapes)


def _measure(shape: Shape, seconds: float) -> Times:
    machine = _machine(torch.get_num_threads())
    with _lock:  # two at once would disturb each other
        times = _measures[str(shape[0])](shape, seconds)
        times = _tuning_file.sort({name: float(f"{ms:.4g}") for name, ms in times.items()})
        _table()[shape] = times
        added = _measured_here.setdefault(machine, {})
        added[shape] = times
        _tuning_file.save(machine, added)
    return times


def _table() -> Table:
    global _file
    if _file is None:
        _file = _tuning_file.read()
    return _file.setdefault(_machine(torch.get_num_threads()), {})


@functools.cache
def _machine(threads: int) -> str:
    """All that a time depends on but the shape."""
    library = _library.load_cpu_library().name.removeprefix("_C_cpu_")
    versions = f"torch {torch.__version__}, sdfast {__version__}"
    return f"{_library.cpu_name()}, {library}, {threads} threads, {versions}"


def _as_text(shape: Shape) -> str:
    """ "conv2d float32 2x320x64x64 ..." """
    return " ".join("x".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in shape)
