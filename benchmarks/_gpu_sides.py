"""The sides of bench_gpu_models.py, each in a process of its own.

A process that compiles for too long, dies or fails can be ended (`_gpu_process.py`), and the others go on;
its memory is its own, and so are its caches of compiled kernels, a folder that was empty when the run began
unless another was asked for. Idle processes leave the GPU alone.
"""

from __future__ import annotations

import gc
import pathlib
import time
from typing import Any

import torch
from _gpu_process import Worker, synchronize
from _gpu_profile import kernels_of, summary, synchronisation
from _gpu_timing import milliseconds
from _gpu_works import TINY_WORKS, WORKS, Call, make_call

from sdfast.testing import relative_error

_ROUND_SECONDS = 0.3  # of calls that follow each other


class Side(Worker):
    """A side's process, with caches of compiled kernels of its own."""

    def __init__(
        self,
        name: str,
        folder: pathlib.Path,
        caches: pathlib.Path,
        dtype: str,
        tiny: bool,
        compile_mode: str = "max-autotune",
    ) -> None:
        self.name = name
        self.caches = caches / name.replace(" ", "_")
        variables = {
            "TRITON_CACHE_DIR": str(self.caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.caches / "inductor"),
        }
        super().__init__(_Server, (name, folder, dtype, tiny, compile_mode), variables)


class _Server:
    """What a side's process can be asked; every answer can be sent."""

    def __init__(self, side: str, folder: pathlib.Path, dtype: str, tiny: bool, compile_mode: str) -> None:
        self.side, self.folder, self.compile_mode = side, folder, compile_mode
        self.works = TINY_WORKS if tiny else WORKS
        self.on_gpu = torch.cuda.is_available() and not tiny
        self.device = "cuda" if self.on_gpu else "cpu"
        self.dtype = torch.float32 if side == "reference" else getattr(torch, dtype)
        if tiny:
            torch.set_num_threads(1)
        self.call: Call | None = None
        self.calls_a_round = 1
        if side == "reference":
            torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True

    def settle(self) -> None:
        synchronize()

    def _release(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def unload(self) -> bool:
        self.call = None
        torch._dynamo.reset()
        self._release()
        return True

    def load(self, work: str) -> dict[str, Any]:
        """Build the model, take its first result, and compare it with the reference's, which comes first.

        Returns:
            Seconds from having the weights to the first result, its error (0 for the reference), and the most
            memory that calls take from then on, weights included.
        """
        self.unload()
        self.settle()
        self.call = make_call(self.works[work], self.side, self.dtype, self.device, self.compile_mode)
        self.settle()
        began = time.perf_counter()
        result = self.call.result().float()
        self.settle()
        first_seconds = time.perf_counter() - began
        expected = self.folder / f"{work}.pt"
        if self.side == "reference":
            torch.save(result.cpu(), expected)
            self.unload()
            return {}
        error = relative_error(result, torch.load(expected, weights_only=True).to(self.device))
        del result
        for _ in range(2):
            self.call.run()
        self._release()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elapsed = milliseconds(self.call.run, 1, on_gpu=self.on_gpu)
        self.calls_a_round = max(1, min(50, round(1e3 * _ROUND_SECONDS / elapsed)))
        peak = torch.cuda.max_memory_reserved() if self.on_gpu else None
        return {"first_seconds": first_seconds, "error": error, "peak_bytes": peak}

    def time(self) -> float:
        """Milliseconds of a call; what it holds beyond its weights is free for the others afterwards."""
        assert self.call is not None
        self.call.run()
        ms = milliseconds(self.call.run, self.calls_a_round, on_gpu=self.on_gpu)
        self._release()
        return ms

    def profile(self) -> dict[str, Any]:
        """Of the call as it is timed; and whether it makes the host wait where it is launched one by one."""
        assert self.call is not None
        if not self.on_gpu:
            return {"not_measured": "needs a CUDA device"}
        self.call.direct()
        return {
            **summary(kernels_of(self.call.run)),
            "launches_without_graph": summary(kernels_of(self.call.direct))["launches"],
            "waits_for": synchronisation(self.call.direct),
        }
