"""A process that answers requests: what runs there can be ended, may die, and has its memory to itself.

An error of CUDA (an illegal address, a launch that failed) leaves a process useless: everything that it does
next fails with the same words. Such a process says so and is ended, and the next request has a new one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from _record import error_text

_SPAWN = multiprocessing.get_context("spawn")


class WorkerError(RuntimeError):
    """A worker could not do it; the message says why."""


class OutOfTime(WorkerError):
    """It was not done when it had to be, which says nothing against it."""


class Server(Protocol):
    """What runs in the process; requests are its methods' names, and every answer can be pickled."""

    def unload(self) -> object:
        """Let go of what a request that failed has left."""

    def settle(self) -> None:
        """Wait for the device; raises where nothing will run on it any more."""


class Worker:
    """A process, started when it is first asked, and again after it was ended.

    Args:
        make: called there, of module scope; returns the server.
        arguments: for it.
        variables: of its environment.
    """

    def __init__(
        self,
        make: Callable[..., Server],
        arguments: tuple[Any, ...],
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.make, self.arguments, self.variables = make, arguments, dict(variables or {})
        self.process: Any = None
        self.connection: Any = None

    def start(self) -> None:
        """Begin to import, which takes seconds; nothing is waited for."""
        if self.process is not None:
            return
        self.connection, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=serve, args=(theirs, self.make, self.arguments), daemon=True)
        with _environment(self.variables):
            self.process.start()
        theirs.close()  # so that a process that dies is an EOFError here, not silence

    def ask(self, seconds: float, request: str, *arguments: object) -> Any:
        """The answer, or WorkerError; a process without one after so many seconds is ended."""
        if seconds <= 0:
            raise OutOfTime("the time of the run was over")
        self.start()
        try:
            self.connection.send((request, *arguments))
            if not self.connection.poll(seconds):
                self.end()
                raise OutOfTime(f"{request}: not done within {seconds:.0f} s")
            answer, error, usable = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            self.end()
            raise WorkerError(f"{request}: its process ended with exit code {code}") from None
        if not usable:
            self.end()
            raise WorkerError(f"{request}: {error} (after which its process was ended)")
        if error is not None:
            raise WorkerError(f"{request}: {error}")
        return answer

    def end(self) -> None:
        """Its memory is free when this returns."""
        if self.process is None:
            return
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
        self.process = None


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What a process that starts here inherits."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def serve(connection: Connection, make: Callable[..., Server], arguments: tuple[Any, ...]) -> None:
    """The main function of a worker's process: answers, errors as text, and whether it can go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is for whoever asks, who ends this process
    server = make(*arguments)
    while True:
        try:
            request, *values = connection.recv()
        except EOFError:
            return
        answer, failure = None, None
        try:
            answer = getattr(server, request)(*values)
            server.settle()  # a fault that shows later is to be this request's, not the next one's
        except Exception as error:
            failure = error_text(error)
        usable = failure is None or _recovers(server)
        connection.send((answer if failure is None else None, failure, usable))


def _recovers(server: Server) -> bool:
    """Whether the process is as good as before once it let go of what it held."""
    try:
        server.settle()
        server.unload()
        server.settle()
    except Exception:
        return False
    return True


def synchronize() -> None:
    """Wait for the GPU, where there is one and this process has used it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
