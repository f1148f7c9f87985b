"""The command `sdfast`: generate | train | segment | bench | doctor.

Bad input is one line on stderr, `sdfast: error: ...`, and exit status 2, before any work is done. Work that
fails, because memory ran out or training diverged, is such a line and 1; Ctrl-C is 130. (`python -X dev -m
sdfast` shows the traceback instead.) Nothing here imports torch before the arguments have been checked, so
that a mistake is answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sdfast import __version__
from sdfast.bench.command import add_parser as add_bench
from sdfast.dispatch import BACKENDS, ORDER
from sdfast.request import (
    MAX_STEPS,
    SAMPLER_NAMES,
    check_count,
    check_guidance_scale,
    check_sampler,
    check_seed,
    check_size,
    check_strength,
)
from sdfast.segment_command import add_parser as add_segment

_DTYPES = ("float32", "bfloat16", "float16")
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_BAD_INPUT = 2
_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, those of the process when None.

    Returns:
        The exit status: 0, 1 for work that failed, 2 for bad input, 130 when interrupted. `--help` and
        `--version` raise SystemExit.
    """
    with _warnings_as_lines():
        try:
            arguments = _parser().parse_args(argv)
            return arguments.run(arguments)
        except KeyboardInterrupt as interrupt:
            print(f"\nsdfast: {str(interrupt) or 'interrupted'}", file=sys.stderr)
            return _INTERRUPTED
        # What comes from outside is checked by whoever takes it, and refused with one of these.
        except (ValueError, OSError, ImportError) as error:
            if sys.flags.dev_mode:
                raise
            print(f"sdfast: error: {_one_line(error)}", file=sys.stderr)
            return _BAD_INPUT
        except (FloatingPointError, MemoryError, RuntimeError) as error:
            diverged = isinstance(error, FloatingPointError)
            if sys.flags.dev_mode or not (diverged or _out_of_memory(error)):
                raise
            print(
                f"sdfast: error: {'' if diverged else 'out of memory: '}{_one_line(error)}", file=sys.stderr
            )
            return _FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see: {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sdfast", description="Fast latent diffusion on CPU and GPU.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"sdfast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_train(commands)
    add_segment(commands)
    add_bench(commands)
    doctor = commands.add_parser("doctor", help="say what sdfast found on this machine, and what it lacks")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="make images from a prompt, or from an image and a prompt")
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help='what to draw, say "a handwritten seven"')
    add("-o", "--output", type=Path, default=Path("sdfast.png"), help="PNG to write (%(default)s)")
    add("-n", "--num-images", type=int, default=1, help="how many; more than one become one sheet")
    add(
        "--separate", action="store_true", help="write NAME-0000.png, NAME-0001.png, ... instead of one sheet"
    )
    model_help = "diffusers folder, .safetensors or .ckpt file, or Hugging Face id (the shipped digits)"
    add("--model", metavar="DIR|FILE|ID", help=model_help)
    add("--tokenizer", metavar="DIR|ID", help="CLIP's tokenizer, for a single-file model")
    add("--negative-prompt", metavar="TEXT", help="what to steer away from")
    add("--steps", type=int, default=50, help=f"reverse steps, 1 to {MAX_STEPS} (%(default)s)")
    add("--guidance-scale", type=float, default=7.5, metavar="G", help="how closely to follow (%(default)s)")
    add("--sampler", help=f"{', '.join(SAMPLER_NAMES)} (the model's own)")
    add("--seed", type=int, help="image i gets SEED + i (a fresh one, which is told)")
    add("--size", metavar="HxW", help="height x width, multiples of 8 (the model's own)")
    add("--height", type=int, help="instead of --size")
    add("--width", type=int, help="instead of --size")
    add("--image", type=Path, help="image to start from")
    add("--strength", type=float, help="with --image: how much to change it, 0 to 1 (0.8)")
    add("--batch-size", type=int, help="images to run at once (by their size)")
    add("--dtype", choices=_DTYPES, default="float32", help="of weights and arithmetic (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--backend", choices=BACKENDS, help="whose kernels to use (the fastest that can run)")
    add("--threads", type=int, help="CPU threads (torch's choice)")
    parser.set_defaults(run=_generate)


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a model")
    models = train.add_subparsers(title="models", metavar="MODEL", required=True)
    parser = models.add_parser("digits", help="handwritten digits; some twenty minutes on two CPU cores")
    add = parser.add_argument
    add("-o", "--output", type=Path, default=Path("my-digits"), help="folder to write (%(default)s)")
    add("--run-dir", type=Path, default=Path("runs/digits"), help="where checkpoints go (%(default)s)")
    add("--seed", type=int, default=0, help="of everything random (%(default)s)")
    add("--vae-steps", type=int, help="length of the first phase")
    add("--unet-steps", type=int, help="length of the second phase")
    add("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    add("--restart", action="store_true", help="forget the checkpoints in --run-dir and start anew")
    parser.set_defaults(run=_train_digits)


def _doctor(_: argparse.Namespace) -> int:
    from sdfast.doctor import report

    print(report())
    return 0


def _train_digits(arguments: argparse.Namespace) -> int:
    steps = {"vae_steps": arguments.vae_steps, "unet_steps": arguments.unet_steps}
    steps = {name: count for name, count in steps.items() if count is not None}
    for name, count in {**steps, "threads": arguments.threads}.items():
        check_count(f"--{name.replace('_', '-')}", count)
    _check_writable("--output", arguments.output.parent)
    _check_writable("--run-dir", arguments.run_dir)
    from sdfast.training.digits import train_digits

    output = train_digits(
        arguments.output,
        run_dir=arguments.run_dir,
        seed=arguments.seed,
        resume=not arguments.restart,
        threads=arguments.threads,
        **steps,
    )
    # With "./", for the name alone may mean something else.
    model = shlex.quote(os.path.join(os.curdir, output))
    print(f"{output}: trained; try: sdfast generate 'a handwritten seven' --model {model}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    options = _checked_options(arguments)
    _check_output(arguments.output)
    image = None
    if arguments.image is not None:
        from sdfast.images import read_image

        image = read_image(arguments.image)

    import torch

    from sdfast.dispatch import use_backend
    from sdfast.memory import keep_freed_memory
    from sdfast.pipelines import StableDiffusion

    keep_freed_memory()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = _device(arguments.device)
    _check_backend(arguments.backend, device.type)
    load_options = {
        "dtype": getattr(torch, arguments.dtype),
        "device": device,
        "tokenizer": arguments.tokenizer,
    }
    if arguments.model is None:
        pipe = StableDiffusion.digits(**load_options)
    else:
        pipe = StableDiffusion.from_pretrained(arguments.model, **load_options)
    forced = contextlib.nullcontext() if arguments.backend is None else use_backend(arguments.backend)
    with forced, _step_bar() as on_step:
        if image is None:
            result = pipe.text_to_image(arguments.prompt, on_step=on_step, **options)
        else:
            result = pipe.image_to_image(arguments.prompt, image, on_step=on_step, **options)
    written = _save(result, arguments.output, separate=arguments.separate)
    print(_summary(result, written))
    return 0


def _checked_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `text_to_image` or `image_to_image`; all that can be checked without the model is."""
    check_count("--num-images", arguments.num_images)
    check_count("--steps", arguments.steps, MAX_STEPS)
    for name in ("batch_size", "threads"):
        if getattr(arguments, name) is not None:
            check_count(f"--{name.replace('_', '-')}", getattr(arguments, name))
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
    check_size(8 if height is None else height, 8 if width is None else width)
    options = {
        "negative_prompt": arguments.negative_prompt,
        "height": height,
        "width": width,
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "sampler": arguments.sampler,
        "seed": arguments.seed,
        "num_images": arguments.num_images,
        "batch_size": arguments.batch_size,
    }
    if arguments.image is None:
        if arguments.strength is not None:
            raise ValueError("--strength: needs --image")
        return options
    strength = 0.8 if arguments.strength is None else arguments.strength
    check_strength(strength, arguments.steps)
    return options | {"strength": strength}


def _parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--size: got {text!r}, expected HxW such as 512x768")
    return int(height), int(width)


def _check_output(path: Path) -> None:
    """Refuse a path that could not be written when the images are done."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output: got {path}, expected a name that ends in .png")
    if path.is_dir():
        raise ValueError(f"--output: {path} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"--output: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output: the folder {path.parent} cannot be written to")


def _check_writable(option: str, folder: Path) -> None:
    """Refuse a folder that could not be written to, nor made."""
    existing = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not existing.is_dir():
        raise ValueError(f"{option}: {existing} is no folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{option}: the folder {existing} cannot be written to")


def _check_backend(backend: str | None, device_type: str) -> None:
    """Refuse kernels that could serve no operation at all: `use_backend` would quietly fall back to torch."""
    allowed = dict.fromkeys(("reference", "torch", *ORDER.get(device_type, ())))
    if backend is not None and backend not in allowed:
        raise ValueError(
            f"--backend: {backend!r} does not run on {device_type}, expected one of {', '.join(allowed)}"
        )
    if backend == "cpu":
        from sdfast._library import load_cpu_library

        library = load_cpu_library()
        if not library.loaded:
            raise ValueError(f"--backend: 'cpu' cannot run: {library.detail}")


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device: {name!r} cannot be used: {_one_line(error)}") from error
    return device


@contextlib.contextmanager
def _step_bar() -> Iterator[Any]:
    """A progress bar over steps, and the `on_step` that moves it. Silent where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(unit="step", disable=None, dynamic_ncols=True, leave=False) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_step


def _save(result: Any, path: Path, *, separate: bool) -> list[Path]:
    from sdfast.images import grid, save_png

    if len(result.images) == 1 or not separate:
        picture = result.images[0] if len(result.images) == 1 else grid(result.images)
        save_png(picture, path, result.settings)
        return [path]
    paths = [path.with_name(f"{path.stem}-{i:04d}{path.suffix}") for i in range(len(result.images))]
    for one, seed, image in zip(paths, result.seeds, result.images, strict=True):
        save_png(image, one, result.settings | {"seeds": [seed]})
    return paths


def _summary(result: Any, written: list[Path]) -> str:
    count = len(result.images)
    where = written[0] if len(written) == 1 else f"{written[0]} to {written[-1].name}"
    made = f"{count} image{'s' if count > 1 else ''}, seed {result.seeds[0]}"
    memory = ""
    if result.peak_memory_bytes is not None:
        memory = f", peak memory {result.peak_memory_bytes / 2**20:.0f} MiB"
    times = f"{1000 * result.seconds_per_step:.1f} ms per step, {result.seconds:.2f} s in all"
    return f"{where}: {made}; {times}{memory}"


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"sdfast: warning: {_one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # if it has not been loaded it has not failed
    gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    # On the CPU torch raises a plain RuntimeError.
    return gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
