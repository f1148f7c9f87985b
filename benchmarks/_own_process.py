"""A side in a process of its own, whose memory is its own, and the peak of that."""

from __future__ import annotations

import multiprocessing
import pathlib
import re
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from _record import error_text

from sdfast.memory import return_freed_memory

_CONTEXT = multiprocessing.get_context("spawn")


def in_own_process(what: str, work: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """What `work`, a function of a module, returns.

    Raises:
        RuntimeError: it failed, or its process ended; the message begins with `what`.
    """
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:  # the kernel ended it, most likely for its memory
        answer = "it died"
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"{what}: {answer}")
    return answer


def _serve(
    connection: Connection, work: Callable[..., dict[str, Any]], arguments: tuple[object, ...]
) -> None:
    try:
        connection.send(work(*arguments))
    except Exception as error:
        connection.send(error_text(error))


class PeakMemory:
    """Counts from what is resident now, once all that is free was given back."""

    def __init__(self) -> None:
        return_freed_memory()
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        self._before = _resident("VmRSS")

    def above(self) -> int:
        """Bytes by which the peak since then lies above it."""
        return _resident("VmHWM") - self._before


def _resident(name: str) -> int:
    """VmRSS or VmHWM, bytes."""
    found = re.search(rf"{name}:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
