"""What the commands that make images have in common: options, checks, progress, how files are written.

Nothing here imports torch before the arguments have been checked.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdfast._arguments import check_counts, check_file, check_inputs, check_not_input, usable_device
from sdfast.dispatch import BACKENDS
from sdfast.request import (
    MAX_STEPS,
    SAMPLER_NAMES,
    check_count,
    check_guidance_scale,
    check_sampler,
    check_seed,
    check_size,
)

DTYPES = ("float32", "bfloat16", "float16")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, and where and how it runs: what `load_pipeline` reads."""
    add = parser.add_argument
    model_help = "diffusers folder, .safetensors or .ckpt file, or Hugging Face id (the shipped digits)"
    add("--model", metavar="DIR|FILE|ID", help=model_help)
    add("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="LoRA to merge; may be repeated")
    add("--tokenizer", metavar="DIR|ID", help="CLIP's tokenizer, for a single-file model")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and arithmetic (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--backend", choices=BACKENDS, help="whose kernels to use (the fastest that can run)")
    add("--threads", type=int, help="CPU threads (torch's choice)")


def add_sampling_options(parser: argparse.ArgumentParser, *, size: bool = True) -> None:
    """What `sampling_options` reads, but for the seed, whose meaning is the command's.

    Args:
        size: whether the command takes the size of the images.
    """
    add = parser.add_argument
    add("--negative-prompt", metavar="TEXT", help="what to steer away from")
    add("--steps", type=int, default=50, help="reverse steps, at most the model's (%(default)s)")
    add("--guidance-scale", type=float, default=7.5, metavar="G", help="how closely to follow (%(default)s)")
    add("--sampler", help=f"{', '.join(SAMPLER_NAMES)} (the model's own)")
    add("--batch-size", type=int, help="images to run at once (by their size)")
    if not size:
        parser.set_defaults(size=None, height=None, width=None)
        return
    add("--size", metavar="HxW", help="height x width, multiples of 8 (the model's own)")
    add("--height", type=int, help="instead of --size")
    add("--width", type=int, help="instead of --size")


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a pipeline's call; all that can be checked without the model is.

    Raises:
        ValueError: an option is out of its range; says what is allowed.
    """
    check_count("--steps", arguments.steps, MAX_STEPS)
    check_counts(arguments, "batch_size", "threads")
    if arguments.seed is not None:
        check_seed("--seed", arguments.seed)
    if arguments.sampler is not None:
        check_sampler("--sampler", arguments.sampler)
    check_guidance_scale("--guidance-scale", arguments.guidance_scale)
    height, width = arguments.height, arguments.width
    if arguments.size is not None:
        if height is not None or width is not None:
            raise ValueError("--size: give it, or --height and --width, not both")
        height, width = _parse_size(arguments.size)
    try:
        check_size(8 if height is None else height, 8 if width is None else width)
    except ValueError as error:
        raise ValueError(f"--{error}" if arguments.size is None else f"--size: {error}") from None
    return {
        "negative_prompt": arguments.negative_prompt,
        "height": height,
        "width": width,
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "sampler": arguments.sampler,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
    }


def _parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--size: got {text!r}, expected HxW such as 512x768")
    return int(height), int(width)


def load_pipeline(arguments: argparse.Namespace) -> Any:
    """The `StableDiffusion` that `add_model_options` asked for.

    Raises:
        ValueError: a device, backend or model that cannot be used.
    """
    loras = [_lora(text) for text in arguments.lora]
    import torch

    from sdfast.memory import keep_freed_memory
    from sdfast.pipelines import StableDiffusion

    keep_freed_memory()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = usable_device("--device", arguments.device)
    _check_backend(arguments.backend, device.type)
    options = {
        "dtype": getattr(torch, arguments.dtype),
        "device": device,
        "tokenizer": arguments.tokenizer,
    }
    if arguments.model is None:
        pipe = StableDiffusion.digits(**options)
    else:
        pipe = StableDiffusion.from_pretrained(arguments.model, **options)
    for path, scale in loras:
        pipe.load_lora(path, scale, name=str(path))
    return pipe


def _lora(text: str) -> tuple[Path, float]:
    """FILE:SCALE, or FILE, whose name may hold a colon itself."""
    name, _, number = text.rpartition(":")
    path, scale = Path(text), 1.0
    if name and not path.exists():
        with contextlib.suppress(ValueError):
            path, scale = Path(name), float(number)
    if not math.isfinite(scale):
        raise ValueError(f"--lora: got a scale of {scale}, expected a finite number")
    if not path.exists():
        raise ValueError(f"--lora: {path}: no such file or folder")
    return path, scale


def forced_backend(backend: str | None) -> contextlib.AbstractContextManager[Any]:
    """`use_backend` for the kernels that --backend names; torch is imported no earlier."""
    from sdfast.dispatch import use_backend

    return use_backend(backend)


# What --backend may name beside torch's kernels, by device.
_KERNELS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


def _check_backend(backend: str | None, device_type: str) -> None:
    """Refuse kernels that could serve no operation at all: `use_backend` would quietly fall back to torch."""
    allowed = ("reference", "torch", *_KERNELS.get(device_type, ()))
    if backend is not None and backend not in allowed:
        raise ValueError(
            f"--backend: {backend!r} does not run on {device_type}, expected one of {', '.join(allowed)}"
        )
    if backend in ("cpu", "triton", "cuda"):
        from sdfast import _library

        status = {
            "cpu": _library.load_cpu_library,
            "triton": _library.triton_status,
            "cuda": _library.load_cuda_library,
        }[backend]()
        if not status.loaded:
            raise ValueError(f"--backend: {backend!r} cannot run: {status.detail}")


@contextlib.contextmanager
def step_bar(*, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over steps, and the `on_step` that moves it. Silent where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(unit="step", disable=None if shown else True, dynamic_ncols=True, leave=False) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_step


def image_paths(path: Path, count: int, *, separate: bool) -> list[Path]:
    """The files that `save_images` writes for so many images."""
    if count == 1 or not separate:
        return [path]
    return [path.with_name(f"{path.stem}-{i:04d}{path.suffix}") for i in range(count)]


def check_output(arguments: argparse.Namespace, path: Path, **read: Path | None) -> None:
    """Raises ValueError where images cannot be written to `path`, or would replace one that is read.

    Args:
        read: files, by their options' names; they have to be there.
    """
    inputs = {f"--{name}": file for name, file in read.items()}
    check_file("--output", path, ".png")
    for written in image_paths(path, arguments.num_images, separate=arguments.separate):
        check_not_input("--output", written, inputs)
    check_inputs(inputs)


@contextlib.contextmanager
def named_as_options() -> Iterator[None]:
    """Lets errors of a check, which begin with the names of arguments, begin with those of options."""
    try:
        yield
    except ValueError as error:
        names, colon, problem = str(error).partition(":")
        if not colon:
            raise
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names.split(", "))
        raise ValueError(f"{options}:{problem}") from None


def save_images(result: Any, path: Path, *, separate: bool) -> list[Path]:
    """Write a pipeline's `GeneratedImages`, as one sheet or as NAME-0000.png and so on; returns the files."""
    from sdfast.images import grid, save_png

    paths = image_paths(path, len(result.images), separate=separate)
    if len(paths) == 1:
        picture = result.images[0] if len(result.images) == 1 else grid(result.images)
        save_png(picture, path, result.settings)
        return paths
    for one, seed, image in zip(paths, result.seeds, result.images, strict=True):
        save_png(image, one, result.settings | {"seeds": [seed]})
    return paths


def summary(result: Any, written: list[Path]) -> str:
    """One line: what was written where, and what it took."""
    count = len(result.images)
    where = written[0] if len(written) == 1 else f"{written[0]} to {written[-1].name}"
    made = f"{count} image{'s' if count > 1 else ''}, seed {result.seeds[0]}"
    memory = ""
    if result.peak_memory_bytes is not None:
        memory = f", peak memory {result.peak_memory_bytes / 2**20:.0f} MiB"
    times = f"{1000 * result.seconds_per_step:.1f} ms per step, {result.seconds:.2f} s in all"
    return f"{where}: {made}; {times}{memory}"


def one_line(error: object) -> str:
    """An error's text without line breaks; the name of its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
