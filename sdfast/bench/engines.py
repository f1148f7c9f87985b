"""The engines that run a whole model, each set up as its own documentation advises.

Every engine runs in a process of its own (`process`): that gives it a thread pool and an allocator to itself
and a peak memory that can be told apart, and lets models take turns that do not fit into memory together in
one. A further engine is a function here, a line in ENGINES and one in `request.ENGINES`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sdfast
from sdfast import dispatch
from sdfast.bench.request import ENGINES as REQUESTED
from sdfast.bench.request import missing
from sdfast.bench.works import SIZES, Forward, Work

Run = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Task:
    """What every engine of a comparison runs.

    Args:
        size: of `works.SIZES`.
        work: of that size's works.
        dtype: of weights and activations.
        device: where.
        folder: where exported files and caches of compilers go.
        threads: of torch, and of engines with threads of their own.
        backend: whose kernels ours are, None for the best.
    """

    size: str
    work: str
    dtype: str
    device: str
    folder: Path
    threads: int
    backend: str | None = None

    @property
    def model(self) -> Work:
        return SIZES[self.size][self.work]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


# Called when an engine has the weights: what memory and time are counted from.
Ready = Callable[[], None]


def why_not(engine: str, task: Task) -> str | None:
    """Why an engine cannot take part, or None."""
    if reason := missing(REQUESTED[engine][0]):
        return reason
    if engine in ("openvino", "onnxruntime") and task.device != "cpu":
        return "is compared on the CPU alone"
    if engine == "onnxruntime" and task.dtype != "float32":  # its CPU kernels have no bf16 convolution
        return f"has no {task.dtype} on the CPU"
    if engine == "openvino" and task.dtype == "float16":
        return "has no float16 on the CPU"
    if engine == "diffusers-tiling" and task.work != "vae":
        return "tiles a VAE, and nothing else"
    return None


def _theirs(task: Task) -> Any:
    model = task.model.make_theirs().to(task.device, task.torch_dtype)
    return model.to(memory_format=torch.channels_last)


def _run(forward: Callable[..., Tensor], model: nn.Module, task: Task, *, last: bool = True) -> Run:
    image, *others = task.model.loop_inputs(model, task.torch_dtype, task.device)
    assert isinstance(image, Tensor)
    if last:
        image = image.to(memory_format=torch.channels_last)
    call = torch.inference_mode()(lambda: forward(image, *others))
    if task.device == "cpu":
        return call

    def settled() -> Tensor:
        result = call()
        torch.cuda.synchronize(task.device)
        return result

    return settled


def load_sdfast(task: Task, ready: Ready) -> Run:
    """Our model on the weights of diffusers', by the kernels of `task.backend`."""
    theirs = _theirs(task)
    ours = task.model.make_ours(theirs)
    del theirs
    ready()
    run = _run(task.model.forward(ours), ours, task)

    def run_by_backend() -> Tensor:
        with dispatch.use_backend(task.backend):
            return run()

    return run_by_backend


def load_sdfast_low(task: Task, ready: Ready) -> Run:
    """The same without packed copies of the weights."""
    run = load_sdfast(task, ready)

    def run_low() -> Tensor:
        with dispatch.use_memory("low"):
            return run()

    return run_low


def load_optimize(task: Task, ready: Ready) -> Run:
    """diffusers' model after `sdfast.optimize`, which counts as part of the first call."""
    model = _theirs(task)
    ready()
    sdfast.optimize(model)
    return _run(task.model.forward(model), model, task)


def load_eager(task: Task, ready: Ready) -> Run:
    """diffusers' model in its faster memory format."""
    model = _theirs(task)
    ready()
    return _run(task.model.forward(model), model, task)


def load_eager_contiguous(task: Task, ready: Ready) -> Run:
    """diffusers' model as it comes."""
    model = task.model.make_theirs().to(task.device, task.torch_dtype)
    ready()
    return _run(task.model.forward(model), model, task, last=False)


def load_tiling(task: Task, ready: Ready) -> Run:
    """diffusers' tiles: four in each direction, overlapping by a quarter; each has GroupNorms of its own."""
    model = _theirs(task)
    side = task.model.shapes[0][-1]
    scale = 2 ** (len(task.model.config["block_out_channels"]) - 1)
    model.enable_tiling()
    model.tile_latent_min_size, model.tile_sample_min_size = side // 4, side // 4 * scale
    ready()
    return _run(task.model.forward(model), model, task)


def load_compile(task: Task, ready: Ready, mode: str | None = None) -> Run:
    """Freezing lets it fold and reorder weights: without, they are reordered at every call."""
    import torch._inductor.config

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(task.folder / "inductor")  # nothing from an earlier run
    torch._inductor.config.freezing = True
    model = _theirs(task)
    ready()
    return _run(torch.compile(task.model.forward(model), mode=mode), model, task)


def load_compile_autotune(task: Task, ready: Ready) -> Run:
    """Compiled as `load_compile`, every kernel by the fastest of its candidates."""
    return load_compile(task, ready, mode="max-autotune-no-cudagraphs")


def load_openvino(task: Task, ready: Ready) -> Run:
    """Static shapes; without the hint it takes bf16 for fp32 models too, where the CPU has it."""
    import openvino

    ready()
    compiled = openvino.Core().compile_model(
        task.folder / "openvino.xml",
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[task.dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": task.threads,
            "NUM_STREAMS": 1,
        },
    )
    request = compiled.create_infer_request()
    inputs = [x.numpy() for x in task.model.inputs()]
    return lambda: torch.from_numpy(next(iter(request.infer(inputs, share_outputs=True).values())))


def load_onnxruntime(task: Task, ready: Ready) -> Run:
    """All of its graph's optimisations, threads that stop spinning when a run ends."""
    import onnxruntime

    ready()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads spin far longer than others'; this ends it when a run ends, and not before.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = str(task.folder / "model.onnx")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    feed = dict(zip(names, (x.numpy() for x in task.model.inputs()), strict=True))
    return lambda: torch.from_numpy(session.run(None, feed)[0])


ENGINES: dict[str, Callable[[Task, Ready], Run]] = {
    "sdfast": load_sdfast,
    "sdfast-low": load_sdfast_low,
    "sdfast-optimize": load_optimize,
    "eager": load_eager,
    "eager-contiguous": load_eager_contiguous,
    "compile": load_compile,
    "compile-autotune": load_compile_autotune,
    "openvino": load_openvino,
    "onnxruntime": load_onnxruntime,
    "diffusers-tiling": load_tiling,
}


def export_openvino(forward: Forward, inputs: tuple[Tensor, ...], folder: Path) -> None:
    """Write openvino.xml, its weights uncompressed."""
    import openvino

    model = openvino.convert_model(torch.export.export(forward, inputs))
    openvino.save_model(model, folder / "openvino.xml", compress_to_fp16=False)


def export_onnx(forward: Forward, inputs: tuple[Tensor, ...], folder: Path) -> None:
    """Write model.onnx, its weights beside it."""
    program = torch.onnx.export(forward, inputs, dynamo=True, verbose=False)
    assert program is not None
    program.save(folder / "model.onnx", external_data=True)


# Engines that read a file; the others run the torch model.
EXPORT: dict[str, Callable[[Forward, tuple[Tensor, ...], Path], None]] = {
    "openvino": export_openvino,
    "onnxruntime": export_onnx,
}
