"""The engines that bench_peers.py compares, each set up as its own documentation advises, in a process each.

A process of its own gives every engine a thread pool and an allocator to itself and a peak memory that can be
told apart, and lets models take turns that do not fit into memory together in one. Thread pools keep their
default waiting: they spin for about a millisecond and then sleep, so that an engine loses nothing while it
runs and takes nothing from the others while it does not. `idle_cpu_seconds` records that this is so.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import pathlib
import re
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from _models import TINY_WORKS, WORKS, Forward, Work
from _record import error_text
from torch import Tensor, nn

from sdfast import dispatch, packing
from sdfast.memory import keep_freed_memory

Run = Callable[[], Tensor]
# Called when an engine has the weights: what memory and time are counted from.
Ready = Callable[[], None]
# What each needs beside torch and diffusers.
PACKAGES = {
    "eager": (),
    "sdfast_low": (),
    "inductor": (),
    "inductor_autotune": (),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
}
DTYPES = {"onnxruntime": ("float32",)}  # its CPU kernels have no bf16 convolution


def why_not(peer: str, dtype: str) -> str | None:
    """Why an engine cannot take part, or None."""
    missing = [name for name in PACKAGES[peer] if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed; pip install {' '.join(missing)}"
    if dtype not in DTYPES.get(peer, (dtype,)):
        return f"has no {dtype} on the CPU"
    return None


def _torch_model(work: Work, dtype: torch.dtype) -> nn.Module:
    return work.make_theirs().to(dtype).to(memory_format=torch.channels_last)


def _torch_run(forward: Callable[..., Tensor], model: nn.Module, work: Work, dtype: torch.dtype) -> Run:
    image, *others = work.loop_inputs(model, dtype)
    assert isinstance(image, Tensor)
    image = image.to(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: forward(image, *others))


def load_sdfast(work: Work, dtype: str, folder: pathlib.Path, ready: Ready) -> Run:
    theirs = _torch_model(work, getattr(torch, dtype))
    ours = work.make_ours(theirs)
    del theirs
    ready()
    keep_freed_memory()
    return _torch_run(work.forward(ours), ours, work, getattr(torch, dtype))


def load_sdfast_low(work: Work, dtype: str, folder: pathlib.Path, ready: Ready) -> Run:
    """The same without packed copies of the weights."""
    run = load_sdfast(work, dtype, folder, ready)

    def run_low() -> Tensor:
        with dispatch.use_memory("low"):
            return run()

    return run_low


def load_eager(work: Work, dtype: str, folder: pathlib.Path, ready: Ready) -> Run:
    model = _torch_model(work, getattr(torch, dtype))
    ready()
    keep_freed_memory()
    return _torch_run(work.forward(model), model, work, getattr(torch, dtype))


def load_inductor(work: Work, dtype: str, folder: pathlib.Path, ready: Ready, mode: str | None = None) -> Run:
    """Freezing lets it fold and reorder weights: without, they are reordered at every call."""
    import torch._inductor.config

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # nothing from an earlier run
    torch._inductor.config.freezing = True
    model = _torch_model(work, getattr(torch, dtype))
    ready()
    keep_freed_memory()
    return _torch_run(torch.compile(work.forward(model), mode=mode), model, work, getattr(torch, dtype))


def load_inductor_autotune(work: Work, dtype: str, folder: pathlib.Path, ready: Ready) -> Run:
    return load_inductor(work, dtype, folder, ready, mode="max-autotune-no-cudagraphs")


def load_openvino(work: Work, dtype: str, folder: pathlib.Path, ready: Ready) -> Run:
    """Static shapes; without the hint it takes bf16 for fp32 models too, where the CPU has it."""
    import openvino

    ready()
    compiled = openvino.Core().compile_model(
        folder / "openvino.xml",
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
        },
    )
    request = compiled.create_infer_request()
    inputs = [x.numpy() for x in work.inputs()]
    return lambda: torch.from_numpy(next(iter(request.infer(inputs, share_outputs=True).values())))


def load_onnxruntime(work: Work, dtype: str, folder: pathlib.Path, ready: Ready) -> Run:
    import onnxruntime

    ready()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads spin far longer than others'; this ends it when a run ends, and not before.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    feed = dict(zip(names, (x.numpy() for x in work.inputs()), strict=True))
    return lambda: torch.from_numpy(session.run(None, feed)[0])


LOAD = {
    "sdfast": load_sdfast,
    "sdfast_low": load_sdfast_low,
    "eager": load_eager,
    "inductor": load_inductor,
    "inductor_autotune": load_inductor_autotune,
    "openvino": load_openvino,
    "onnxruntime": load_onnxruntime,
}


def export_openvino(forward: Forward, inputs: tuple[Tensor, ...], folder: pathlib.Path) -> None:
    import openvino

    model = openvino.convert_model(torch.export.export(forward, inputs))
    openvino.save_model(model, folder / "openvino.xml", compress_to_fp16=False)


def export_onnx(forward: Forward, inputs: tuple[Tensor, ...], folder: pathlib.Path) -> None:
    program = torch.onnx.export(forward, inputs, dynamo=True, verbose=False)
    program.save(folder / "model.onnx", external_data=True)


EXPORT = {"openvino": export_openvino, "onnxruntime": export_onnx}


def _die_first(peer: str) -> None:
    """Where memory runs out the kernel is to end the peer, then ours, and nothing else."""
    pathlib.Path("/proc/self/oom_score_adj").write_text("900" if peer == "sdfast" else "1000")


def serve_export(connection: Connection, peer: str, work: str, folder: pathlib.Path, tiny: bool) -> None:
    """The main function of a process that writes an engine's file; answers with the seconds it took."""
    _die_first(peer)
    try:
        chosen = (TINY_WORKS if tiny else WORKS)[work]
        forward = chosen.forward(chosen.make_theirs()).eval()
        began = time.perf_counter()
        with torch.no_grad():
            EXPORT[peer](forward, chosen.inputs(), folder)
        connection.send(time.perf_counter() - began)
    except Exception as error:
        connection.send(error_text(error))


def serve(
    connection: Connection, peer: str, work: str, dtype: str, folder: pathlib.Path, threads: int, tiny: bool
) -> None:
    """The main function of an engine's process.

    It loads and runs once, sends what `_first_run` returns, then answers True by (seconds of a run, CPU
    seconds it took while it waited), and False by its memory, and ends. Errors are sent as text.
    """
    _die_first(peer)
    torch.set_num_threads(threads)
    try:
        run, first = _first_run(peer, (TINY_WORKS if tiny else WORKS)[work], dtype, folder)
        connection.send(first)
        cpu = time.process_time()
        while connection.recv():
            idle_cpu_seconds = time.process_time() - cpu
            began = time.perf_counter()
            run()
            seconds = time.perf_counter() - began
            cpu = time.process_time()
            connection.send((seconds, idle_cpu_seconds))
        connection.send(_memory())
    except Exception as error:
        connection.send(error_text(error))


def _first_run(peer: str, work: Work, dtype: str, folder: pathlib.Path) -> tuple[Run, dict[str, Any]]:
    """What runs the model, and its first result with the seconds from having the weights to this result."""
    began = 0.0

    def ready() -> None:
        nonlocal began
        _reset_peak()
        began = time.perf_counter()

    run = LOAD[peer](work, dtype, folder, ready)
    result = run().float().numpy(force=True).copy()
    return run, {"result": result, "ready_seconds": time.perf_counter() - began}


def _reset_peak() -> None:
    """Give freed pages back, and let the peak begin anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def _memory() -> dict[str, int]:
    """In bytes: the peak since `_reset_peak`, what is resident now, and what packed weights take of it."""
    status = pathlib.Path("/proc/self/status").read_text()
    peak, resident = (1024 * int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) for name in ("VmHWM", "VmRSS"))
    return {"peak_bytes": peak, "resident_bytes": resident, "packed_bytes": packing.packed_bytes()}
