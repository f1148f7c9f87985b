"""The part `images`: pictures by eager torch and by sdfast from the same seeds, and how they differ.

"digits": the small pipeline that ships with sdfast draws handwritten digits. "photograph": scikit-image's
photograph of an astronaut (NASA, public domain) goes through that pipeline's VAE, encoder and decoder. It was
trained on digits of 32x32 pixels alone, so its reconstruction of a photograph is a coarse one on either side;
what counts is that both sides give the same. A VAE of real size with random weights would give noise.

A side is a function that loads both and returns what draws them; a further one is a line in SIDES.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdfast import StableDiffusion, optimize
from sdfast.bench.plan import Planned
from sdfast.bench.request import Request, missing
from sdfast.bench.timing import in_turns, ratio, settled, timed, times
from sdfast.dispatch import use_backend
from sdfast.images import as_tensor, grid, to_pil
from sdfast.loading import digits_folder

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# fp32 pictures of eight bits: what rounding may turn over.
LARGEST_MEAN_DIFFERENCE = 1.0


@dataclasses.dataclass
class Draw:
    """What a side can draw; each returns (N, 3, H, W) in [0, 1].

    Args:
        digits: of prompts, starting latents (N, 4, 8, 8), and steps.
        photograph: the VAE's reconstruction of (1, 3, H, W) in [-1, 1].
    """

    digits: Callable[[Sequence[str], Tensor, int], Tensor]
    photograph: Callable[[Tensor], Tensor]


def eager(request: Request, dtype: torch.dtype) -> Draw:
    """diffusers' pipeline; without diffusers and transformers ours on torch's kernels, which is its equal."""
    diffusers = imported()
    if diffusers is None:
        return ours(dataclasses.replace(request, backend="torch"), dtype)
    return by_diffusers(diffusers, request, dtype)


def optimized(request: Request, dtype: torch.dtype) -> Draw:
    """diffusers' pipeline after `sdfast.optimize`."""
    return by_diffusers(imported(), request, dtype, prepare=optimize)


def by_diffusers(
    diffusers: Any, request: Request, dtype: torch.dtype, prepare: Callable[[Any], object] | None = None
) -> Draw:
    """diffusers' pipeline, after `prepare` where there is one."""
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(digits_folder())
    pipe = pipe.to(request.device, dtype)
    pipe.set_progress_bar_config(disable=True)
    if prepare is not None:
        prepare(pipe)

    def digits(prompts: Sequence[str], latents: Tensor, steps: int) -> Tensor:
        images = pipe(list(prompts), latents=latents, num_inference_steps=steps, output_type="pt").images
        return images

    @torch.inference_mode()
    def photograph(x: Tensor) -> Tensor:
        return _unit(pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample)

    return Draw(digits, photograph)


def imported() -> Any:
    """diffusers, silent, or None; imported before anything is timed."""
    if missing(("diffusers", "transformers")):
        return None
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # what they say of loading is not about times
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return diffusers


def ours(request: Request, dtype: torch.dtype) -> Draw:
    """sdfast's own pipeline."""
    pipe = StableDiffusion.digits(dtype=dtype, device=request.device)

    def digits(prompts: Sequence[str], latents: Tensor, steps: int) -> Tensor:
        with use_backend(request.backend):
            result = pipe.text_to_image(list(prompts), latents=latents, steps=steps, output="tensor")
        assert isinstance(result.images, Tensor)
        return result.images

    @torch.inference_mode()
    def photograph(x: Tensor) -> Tensor:
        with use_backend(request.backend):
            mean = pipe.vae.encode(x).mean
            return _unit(pipe.vae.decode(mean))

    return Draw(digits, photograph)


SIDES: dict[str, Callable[[Request, torch.dtype], Draw]] = {
    "eager": eager,
    "optimized": optimized,
    "sdfast": ours,
}


def _unit(x: Tensor) -> Tensor:
    return (x.float() / 2 + 0.5).clamp(0, 1)


def astronaut(size: int) -> Image.Image | None:
    """The photograph at `size` x `size` pixels, or None where scikit-image is not installed."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "astronaut.png"
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def planned(request: Request) -> Iterator[Planned]:
    """Digits, then the photograph, in each dtype."""
    steps, size = (10, 128) if request.quick else (50, 256)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(WORDS), 4, 8, 8, generator=generator)
    prompts = [f"a handwritten {word}" for word in WORDS]
    picture = astronaut(size)
    for dtype in request.dtypes:
        kind = getattr(torch, dtype)
        start = latents.to(request.device, kind)
        calls: dict[str, Callable[[Draw], Tensor]] = {
            f"ten digits, {steps} steps": functools.partial(draw_digits, prompts, start, steps)
        }
        title = f"photograph, {size}x{size}, through the digits VAE"
        if picture is not None:
            x = as_tensor(picture, height=size, width=size, channels=3, multiple=8)
            x = x.to(request.device, kind)
            calls[title] = functools.partial(draw_photograph, x)
        loads = functools.cache(functools.partial(loaded, request, kind))  # once for both, if at all
        for name, call in calls.items():
            row = {"part": "images", "name": name, "dtype": dtype}
            yield Planned(row, functools.partial(measured, call, loads, request, kind))
        if picture is None:
            reason = missing(("skimage",)) or "this scikit-image does not contain it"
            row = {"part": "images", "name": title, "dtype": dtype}
            yield Planned({**row, "skipped": dict.fromkeys(SIDES, reason)}, dict)


def loaded(request: Request, dtype: torch.dtype) -> dict[str, tuple[float, Draw]]:
    """The seconds that each side took to load, and what it draws with."""
    absent = ("optimized",) if imported() is None else ()
    return {
        name: timed(functools.partial(load, request, dtype))
        for name, load in SIDES.items()
        if name not in absent
    }


def draw_digits(prompts: Sequence[str], latents: Tensor, steps: int, draw: Draw) -> Tensor:
    """`Draw.digits`, its drawer last: what is timed is a call with that alone left open."""
    return draw.digits(prompts, latents, steps)


def draw_photograph(x: Tensor, draw: Draw) -> Tensor:
    """`Draw.photograph`, likewise."""
    return draw.photograph(x)


def measured(
    call: Callable[[Draw], Tensor],
    load_once: Callable[[], dict[str, tuple[float, Draw]]],
    request: Request,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Check the first pictures, then time all sides in turns.

    Raises:
        AssertionError: ours are not eager's, in fp32.
    """
    loads = load_once()
    runs = {
        name: settled(functools.partial(call, draw), request.device) for name, (_, draw) in loads.items()
    }  # fmt: skip
    first = {name: timed(run) for name, run in runs.items()}
    sheets = {name: sheet(images) for name, (_, images) in first.items()}  # type: ignore[arg-type]
    apart = {name: difference(sheets["eager"], picture) for name, picture in sheets.items()}
    mean = float(apart["sdfast"].mean())
    if dtype == torch.float32 and not mean <= LARGEST_MEAN_DIFFERENCE:
        raise AssertionError(f"pixels differ by {mean:.2f} of 255 in the mean")
    samples = in_turns(runs, rounds=request.call_rounds)
    sides = {
        name: {
            **times(samples[name]), "first_ms": 1e3 * seconds,
            "first_image_ms": 1e3 * (loads[name][0] + seconds), "error": float(apart[name].mean()) / 255,
        }
        for name, (seconds, _) in first.items()
    }  # fmt: skip
    largest = int(apart["sdfast"].max())
    gain = max(1, 128 // max(1, largest)) if largest else 1
    shown = Image.fromarray((apart["sdfast"] * gain).clip(0, 255).astype(np.uint8))
    return {
        "rounds": request.call_rounds, "sides": sides,
        "ratios": {n: ratio(samples[n], samples["sdfast"]) for n in samples if n != "sdfast"},
        "largest_difference": largest, "mean_difference": mean, "difference_gain": gain,
        "pictures": {**{name: as_url(p) for name, p in sheets.items()}, "difference": as_url(shown)},
    }  # fmt: skip


def sheet(images: Tensor) -> Image.Image:
    """One picture, or rows of five."""
    pictures = to_pil(images.cpu())
    return grid(pictures, columns=5) if len(pictures) > 1 else pictures[0]


def difference(a: Image.Image, b: Image.Image) -> np.ndarray:
    """|a - b| of eight bits, (H, W, 3) int16."""
    return np.abs(np.asarray(a, dtype=np.int16) - np.asarray(b, dtype=np.int16))


def as_url(picture: Image.Image) -> str:
    """A PNG as a data: URL."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
