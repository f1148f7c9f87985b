"""Stable Diffusion 1.5, one guided U-Net step and one VAE decode, beside what else runs them on a CPU.

    python benchmarks/bench_peers.py [--rounds 5] [--work unet vae] [--dtype float32 bfloat16]
                                     [--peers sdfast_low inductor openvino onnxruntime] [--threads N] [--tiny]

Beside diffusers in eager torch (channels_last, its faster layout): sdfast under `use_memory("low")`,
torch.compile with frozen weights, OpenVINO and ONNX Runtime, as `pip install sdfast[peers]` brings them; one
that is not installed is left out, and said to be. All have the same random weights and inputs. A U-Net step
is one inside a sampling loop: ours has projected text and timestep before it, the others do in each step, as
diffusers' model is built (`Work.loop_inputs`). Every engine runs in a process of its own (`_peers.py`); ours
and one peer at a time are alive, so that only two models have to fit into memory, and take turns, so that a
ratio is of neighbours in time. Errors are taken against eager's fp32 result, and recorded; ours may be 1e-4
in fp32, in bf16 1.5 times eager's own, or nothing is recorded at all.
Linux only: /proc says what memory was used.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import pathlib
import tempfile
from typing import Any

import torch
from _models import TINY_WORKS, WORKS
from _peers import EXPORT, PACKAGES, serve, serve_export, why_not
from _record import results_path, write_json

from sdfast.testing import relative_error, spread

_SPAWN = multiprocessing.get_context("spawn")  # forked children would share the thread pool's state


class PeerError(RuntimeError):
    """An engine could not do it; the message says why."""


class Worker:
    """An engine in its process, loaded and run once."""

    def __init__(self, peer: str, *arguments: object) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=serve, args=(theirs, peer, *arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that a process that dies is an EOFError here, not silence
        self.idle_cpu_seconds = 0.0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()

    def receive(self) -> Any:
        return _receive(self.connection, self.process)

    def seconds(self) -> float:
        """Of one run."""
        self.connection.send(True)
        seconds, idle_cpu_seconds = self.receive()
        self.idle_cpu_seconds = max(self.idle_cpu_seconds, idle_cpu_seconds)
        return seconds

    def memory(self) -> dict[str, int]:
        """Ends the process."""
        self.connection.send(False)
        return self.receive()


def _receive(connection: Any, process: Any) -> Any:
    try:
        message = connection.recv()
    except EOFError:
        process.join()
        killed = " (out of memory?)" if process.exitcode == -9 else ""
        raise PeerError(f"its process ended with exit code {process.exitcode}{killed}") from None
    if isinstance(message, str):
        raise PeerError(message)
    return message


def export(peer: str, work: str, folder: pathlib.Path, tiny: bool) -> float:
    """Seconds to convert the model to the engine's file; 0 where it has none."""
    if peer not in EXPORT:
        return 0.0
    connection, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=serve_export, args=(theirs, peer, work, folder, tiny))
    process.start()
    theirs.close()
    try:
        return _receive(connection, process)
    finally:
        process.join()


class Measurement:
    """One work in one dtype: ours, loaded once, beside each peer in turn."""

    def __init__(self, work: str, dtype: str, rounds: int, threads: int, tiny: bool) -> None:
        self.work, self.dtype, self.rounds, self.tiny = work, dtype, rounds, tiny
        self.threads = threads
        self.samples: list[float] = []  # ours, beside all peers
        self.peers: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}

    def worker(self, peer: str, folder: pathlib.Path, dtype: str | None = None) -> Worker:
        return Worker(peer, self.work, dtype or self.dtype, folder, self.threads, self.tiny)

    def run(self, peers: list[str], folder: pathlib.Path, exports: dict[str, float | str]) -> dict[str, Any]:
        """The row of the record. `exports` keeps what conversion took, or why it failed, between dtypes."""
        with self.worker("eager", folder, "float32") as reference:
            expected = torch.from_numpy(reference.receive()["result"])
        with self.worker("sdfast", folder) as ours:
            first = ours.receive()
            error = relative_error(torch.from_numpy(first["result"]), expected)
            for peer in ("eager", *peers):
                try:
                    self.beside(peer, ours, folder, expected, exports)
                except PeerError as problem:
                    if peer == "eager" or not ours.process.is_alive():
                        raise
                    self.skipped[peer] = str(problem)
                    print(f"  {peer}: {problem}", flush=True)
                if peer == "eager":
                    self.check(error)
            ours_row = {
                **_times(self.samples), "error": error, "ready_seconds": first["ready_seconds"],
                "idle_cpu_seconds": ours.idle_cpu_seconds, **ours.memory(),
            }  # fmt: skip
        work = (TINY_WORKS if self.tiny else WORKS)[self.work]
        return {
            "work": work.title, "dtype": self.dtype, "rounds": self.rounds,
            "weight_bytes": work.weight_bytes(getattr(torch, self.dtype)), "sdfast": ours_row,
            "peers": self.peers, "skipped": self.skipped,
        }  # fmt: skip

    def check(self, error: float) -> None:
        limit = 1e-4 if self.dtype == "float32" else 1.5 * self.peers["eager"]["error"]
        if not error <= limit:
            raise AssertionError(f"{self.work}, {self.dtype}: error {error:.1e} exceeds {limit:.1e}")

    def beside(
        self,
        peer: str,
        ours: Worker,
        folder: pathlib.Path,
        expected: torch.Tensor,
        exports: dict[str, float | str],
    ) -> None:
        """Time one peer and ours in turns."""
        if reason := why_not(peer, self.dtype):
            raise PeerError(reason)
        if peer not in exports:
            try:
                exports[peer] = export(peer, self.work, folder, self.tiny)
            except PeerError as problem:
                exports[peer] = f"export failed: {problem}"
        export_seconds = exports[peer]
        if isinstance(export_seconds, str):
            raise PeerError(export_seconds)
        with self.worker(peer, folder) as theirs:
            first = theirs.receive()
            theirs.seconds()  # warm, both
            ours.seconds()
            pairs = [(theirs.seconds(), ours.seconds()) for _ in range(self.rounds)]
            ratio = spread([their / our for their, our in pairs])
            self.samples += [our for _, our in pairs]
            self.peers[peer] = {
                **_times([their for their, _ in pairs]),
                "ratio": ratio[1], "ratio_p20": ratio[0], "ratio_p80": ratio[2],
                "error": relative_error(torch.from_numpy(first["result"]), expected),
                "export_seconds": export_seconds, "ready_seconds": first["ready_seconds"],
                "idle_cpu_seconds": theirs.idle_cpu_seconds, **theirs.memory(),
            }  # fmt: skip
        print(f"  {peer}: {_line(self.peers[peer])}, ratio {ratio[1]:.2f}", flush=True)


def _times(samples: list[float]) -> dict[str, float]:
    p20, median, p80 = spread(samples)
    return {"ms": 1e3 * median, "p20_ms": 1e3 * p20, "p80_ms": 1e3 * p80}


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['ms']:.0f} ms, error {row['error']:.1e}, peak {row['peak_bytes'] / 2**30:.1f} GiB, ready after"
        f" {row['ready_seconds'] + row.get('export_seconds', 0):.0f} s"
    )


def main() -> None:
    """Print every measurement, write results/<device>/peers.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    others = [peer for peer in PACKAGES if peer != "eager"]
    parser.add_argument("--rounds", type=int, default=5, help="of each pair (%(default)s)")
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--peers", nargs="*", choices=others, default=["sdfast_low", "inductor", "openvino", "onnxruntime"],
        help="beside eager, which always runs (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="try it out on small models; writes nothing")
    options = parser.parse_args()
    rows = []
    for work in options.work:
        exports: dict[str, float | str] = {}
        with tempfile.TemporaryDirectory() as folder:
            for dtype in options.dtype:
                print(f"{work}, {dtype}", flush=True)
                measurement = Measurement(work, dtype, options.rounds, options.threads, options.tiny)
                rows.append(measurement.run(options.peers, pathlib.Path(folder), exports))
                print(f"  sdfast: {_line(rows[-1]['sdfast'])}", flush=True)
    if not options.tiny:
        torch.set_num_threads(options.threads)  # what the record says
        write_json(results_path("peers"), rows, versions=_versions())


def _versions() -> dict[str, str]:
    """Of what is installed."""
    names = {"torch", "diffusers"}.union(*PACKAGES.values())
    found = {}
    for name in sorted(names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
