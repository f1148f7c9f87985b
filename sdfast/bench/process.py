"""An engine in a process of its own: loaded and run once, then a run at a time, when it is asked.

Thread pools keep their default waiting: they spin for about a millisecond and then sleep, so that an engine
loses nothing while it runs and takes nothing from the others while it does not. `idle_cpu_seconds` records
that this is so.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import re
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from sdfast import packing
from sdfast.bench.engines import ENGINES, EXPORT, Run, Task
from sdfast.bench.record import error_text
from sdfast.memory import keep_freed_memory, return_freed_memory

_SPAWN = multiprocessing.get_context("spawn")  # forked children would share the thread pool's state


class EngineError(RuntimeError):
    """An engine could not do it; the message says why."""


class EngineEnded(EngineError):
    """An engine's process ended, as where memory runs out: it may do better another time."""


class Engine:
    """A process with an engine that has run once.

    Attributes:
        result: of that run, fp32.
        ready_seconds: from having the weights to having it.
        memory: see `settle`.
        idle_cpu_seconds: the most CPU time it took between two runs.

    Raises:
        EngineError: it failed, or its process ended.
    """

    def __init__(self, name: str, task: Task) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(theirs, name, task), daemon=True)
        self.process.start()
        theirs.close()  # so that a process that dies is an EOFError here, not silence
        self.idle_cpu_seconds = 0.0
        try:
            first = _receive(self.connection, self.process)
        except BaseException:
            self.end()
            raise
        self.result = torch.from_numpy(first["result"])
        self.ready_seconds: float = first["ready_seconds"]
        self.memory: dict[str, int] = {}

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()

    def settle(self) -> None:
        """Run again and note the memory, of which freed parts are kept from then on.

        So far glibc has given them back, as it does by default, so that the peak is of what was in use; times
        are to be of engines, not of mapping pages (`sdfast.memory.keep_freed_memory`). Noted are peak_bytes
        since it had the weights, resident_bytes, and packed_bytes of that.
        """
        self._ask("settle")
        self.memory = _receive(self.connection, self.process)

    def __call__(self) -> float:
        """Seconds of one run."""
        self._ask("run")
        seconds, idle_cpu_seconds = _receive(self.connection, self.process)
        self.idle_cpu_seconds = max(self.idle_cpu_seconds, idle_cpu_seconds)
        return seconds

    def _ask(self, message: str) -> None:
        with contextlib.suppress(OSError):  # it has ended: the answer says how
            self.connection.send(message)


def export(name: str, task: Task) -> float:
    """Seconds to convert the model to the engine's file; 0 where it reads none.

    Raises:
        EngineError: it failed.
    """
    if name not in EXPORT:
        return 0.0
    connection, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve_export, args=(theirs, name, task), daemon=True)
    process.start()
    theirs.close()
    try:
        return _receive(connection, process)
    except EngineError as problem:
        raise EngineError(f"export failed: {problem}") from None
    finally:
        process.join()


def _receive(connection: Any, process: Any) -> Any:
    try:
        message = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        killed = " (out of memory?)" if process.exitcode == -9 else ""
        raise EngineEnded(f"its process ended with exit code {process.exitcode}{killed}") from None
    if isinstance(message, str):
        raise EngineError(message)
    return message


def _die_first(name: str) -> None:
    """Where memory runs out the kernel is to end the peer, then ours, and nothing else."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("900" if name == "sdfast" else "1000")


def _serve_export(connection: Connection, name: str, task: Task) -> None:
    _die_first(name)
    torch.set_num_threads(task.threads)
    try:
        forward = task.model.forward(task.model.make_theirs()).eval()
        began = time.perf_counter()
        with torch.no_grad():
            EXPORT[name](forward, task.model.inputs(), task.folder)
        connection.send(time.perf_counter() - began)
    except Exception as error:
        connection.send(error_text(error))


def _serve(connection: Connection, name: str, task: Task) -> None:
    """Load, run once, send the result; then answer "settle" by the memory and "run" by a run's seconds."""
    _die_first(name)
    torch.set_num_threads(task.threads)
    try:
        run, first = _first_run(name, task)
        connection.send(first)
        cpu = time.process_time()
        while True:
            if connection.recv() == "settle":
                run()  # kept copies of weights are made by now
                connection.send(_memory(task.device))
                keep_freed_memory()
                continue
            idle_cpu_seconds = time.process_time() - cpu
            began = time.perf_counter()
            run()
            seconds = time.perf_counter() - began
            cpu = time.process_time()
            connection.send((seconds, idle_cpu_seconds))
    except EOFError:  # whoever asked has gone
        return
    except Exception as error:
        connection.send(error_text(error))


def _first_run(name: str, task: Task) -> tuple[Run, dict[str, Any]]:
    began = 0.0

    def ready() -> None:
        nonlocal began
        _reset_peak(task.device)
        began = time.perf_counter()

    run = ENGINES[name](task, ready)
    result = run().float().numpy(force=True).copy()
    return run, {"result": result, "ready_seconds": time.perf_counter() - began}


def _reset_peak(device: str) -> None:
    """Give freed pages back, and let the peak begin anew; only Linux can."""
    if device != "cpu":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        return
    return_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory(device: str) -> dict[str, int]:
    packed = {"packed_bytes": packing.packed_bytes()}
    if device != "cpu":
        return {"peak_bytes": torch.cuda.max_memory_reserved(device), **packed}
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return packed
    found = {name: re.search(rf"{field}:\s*(\d+) kB", status) for name, field in _FIELDS.items()}
    return {name: 1024 * int(match[1]) for name, match in found.items() if match} | packed


_FIELDS = {"peak_bytes": "VmHWM", "resident_bytes": "VmRSS"}
