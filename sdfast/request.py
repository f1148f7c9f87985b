"""What a pipeline is asked for, checked before anything is computed, and spread over images and batches.

Imports no torch, so that the command line can refuse bad input at once.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypedDict

SIZE_MULTIPLE = 8  # what Stable Diffusion asks of an image's sides
MAX_STEPS = 1000
MAX_THREADS = 1024  # torch ends the process where it cannot start as many as it is told to
MAX_SIDE = 2**16
OUTPUTS = ("pil", "tensor", "latent")
# The keys of `sdfast.diffusion.SAMPLERS`, which cannot be asked without torch; a test holds them equal.
SAMPLER_NAMES = ("ddpm", "ddim", "euler", "euler_a", "dpm++2m")
INPAINTING_METHODS = ("auto", "blend", "repaint")
REMEMBERING_SAMPLERS = ("dpm++2m",)  # those whose plans take the previous x0, likewise
_MAX_SEED = 2**63 - 1  # a signed 64-bit number, for programs that read our settings
# Latent pixels in one batch by default: four images of Stable Diffusion 1.5, or 256 digits.
_LATENT_PIXELS_PER_BATCH = 4 * 64 * 64


class DrawOptions(TypedDict, total=False):
    """What inpainting and outpainting take as `StableDiffusion.image_to_image` does, with its defaults."""

    negative_prompt: str | Sequence[str] | None
    steps: int
    guidance_scale: float
    seed: int | Sequence[int] | None
    num_images: int
    batch_size: int | None
    time_ids: Sequence[float] | None
    output: str


DRAW_DEFAULTS: DrawOptions = {
    "negative_prompt": None, "steps": 50, "guidance_scale": 7.5, "seed": None, "num_images": 1,
    "batch_size": None, "time_ids": None, "output": "pil",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Request:
    """N images, image by image. The arguments of `StableDiffusion.text_to_image` have these names."""

    prompts: list[str]  # N
    negative_prompts: list[str | None]  # N
    seeds: list[int]  # N
    height: int
    width: int
    latent_shape: tuple[int, int, int]  # (c, h, w)
    steps: int
    guidance_scale: float
    batch_size: int
    time_ids: tuple[float, ...]  # 6
    output: str

    @property
    def guided(self) -> bool:
        """Whether the unconditional half has to be computed at all."""
        return self.guidance_scale > 1

    def batches(self) -> Iterator[slice]:
        """The images in parts of at most `batch_size`."""
        for first in range(0, len(self.seeds), self.batch_size):
            yield slice(first, min(first + self.batch_size, len(self.seeds)))


def make_request(
    *,
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    height: int,
    width: int,
    latent_channels: int,
    downsampling: int,
    steps: int,
    guidance_scale: float,
    seed: int | Sequence[int] | None,
    num_images: int,
    batch_size: int | None,
    time_ids: Sequence[float] | None,
    output: str,
) -> Request:
    """Check the arguments of a pipeline and spread them over the images.

    Raises:
        TypeError, ValueError: names the argument, what came and what is allowed.
    """
    check_size(height, width, math.lcm(SIZE_MULTIPLE, downsampling))
    check_count("steps", steps, MAX_STEPS)
    check_count("num_images", num_images)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    check_guidance_scale("guidance_scale", guidance_scale)
    if output not in OUTPUTS:
        raise ValueError(f"output: got {output!r}, expected one of {', '.join(OUTPUTS)}")
    if time_ids is not None and len(time_ids) != 6:
        raise ValueError(f"time_ids: got {len(time_ids)} numbers, expected 6")
    negatives: list[str | None] = [None]
    if negative_prompt is not None:
        negatives = list(as_prompts("negative_prompt", negative_prompt))
    if len(negatives) == 1:
        negatives *= len(prompts)
    if len(negatives) != len(prompts):
        raise ValueError(f"negative_prompt: got {len(negatives)} for {len(prompts)} prompts")
    # Plain numbers from here on: numpy's would not go into the settings' JSON.
    height, width = int(height), int(width)
    latent_size = (height // downsampling, width // downsampling)
    return Request(
        prompts=[prompt for prompt in prompts for _ in range(num_images)],
        negative_prompts=[prompt for prompt in negatives for _ in range(num_images)],
        seeds=_as_seeds(seed, len(prompts) * num_images),
        height=height,
        width=width,
        latent_shape=(latent_channels, *latent_size),
        steps=int(steps),
        guidance_scale=float(guidance_scale),
        batch_size=batch_size or default_batch_size(*latent_size),
        time_ids=tuple(time_ids or (height, width, 0, 0, height, width)),
        output=output,
    )


def default_batch_size(height: int, width: int) -> int:
    """How many images with latents of this size run at once where nobody says."""
    return max(1, _LATENT_PIXELS_PER_BATCH // (height * width))


def as_prompts(name: str, prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several, as a list.

    Raises:
        TypeError, ValueError: something in it is not text, or there is none.
    """
    if not isinstance(prompt, Iterable):
        raise TypeError(f"{name}: got {type(prompt).__name__}, expected str or a list of str")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError(f"{name}: got an empty list, expected at least one text")
    for text in prompts:
        if not isinstance(text, str):
            raise TypeError(f"{name}: got {type(text).__name__}, expected str or a list of str")
    return prompts


def check_size(height: int, width: int, multiple: int = SIZE_MULTIPLE) -> None:
    """Raises ValueError, with the nearest sizes that work, unless both sides are multiples of `multiple`."""
    for name, side in (("height", height), ("width", width)):
        side = _whole(name, side)
        if not multiple <= side <= MAX_SIDE:
            raise ValueError(f"{name}: got {side}, expected {multiple} to {MAX_SIDE}")
        if side % multiple:
            below = side - side % multiple
            raise ValueError(
                f"{name}: got {side}, expected a multiple of {multiple}; the nearest are {below} and"
                f" {below + multiple}"
            )


def check_count(name: str, value: int, most: int | None = None) -> None:
    """Raises TypeError unless it is a whole number, ValueError unless 1 <= value <= most."""
    value = _whole(name, value)
    if value < 1 or (most is not None and value > most):
        raise ValueError(f"{name}: got {value}, expected {f'1 to {most}' if most else 'at least 1'}")


def check_guidance_scale(name: str, guidance_scale: float) -> None:
    """Raises ValueError unless it is finite, TypeError unless it is a number."""
    if not math.isfinite(_number(name, guidance_scale)):
        raise ValueError(f"{name}: got {guidance_scale}, expected a finite number")


def check_sampler(name: str, sampler: str) -> None:
    """Raises ValueError unless there is such a sampler."""
    if sampler not in SAMPLER_NAMES:
        raise ValueError(f"{name}: got {sampler!r}, expected one of {', '.join(SAMPLER_NAMES)}")


def check_strength(strength: float, steps: int) -> None:
    """Raises ValueError unless strength is in 0..1 and leaves a step to run."""
    if not 0 <= _number("strength", strength) <= 1:
        raise ValueError(f"strength: got {strength}, expected 0 to 1")
    check_count("steps", steps, MAX_STEPS)
    if int(steps * strength) < 1:
        raise ValueError(f"strength: {strength} of {steps} steps leaves none to run; raise strength or steps")


def check_inpainting(
    method: str, steps: int, jump_length: int, resamplings: int, sampler: str | None
) -> None:
    """Raises ValueError unless there is such a method, and "repaint" can jump so within so many steps."""
    if method not in INPAINTING_METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(INPAINTING_METHODS)}")
    check_count("jump_length", jump_length)
    check_count("resamplings", resamplings)
    if method == "repaint" and sampler in REMEMBERING_SAMPLERS:
        raise ValueError(
            "sampler: it remembers the step before, which jumps break; take another, such as 'ddpm'"
        )
    if method == "repaint" and resamplings > 1 and jump_length >= steps:
        raise ValueError(
            f"jump_length: got {jump_length} for {steps} steps, expected less; take more steps, or"
            " resamplings 1 for no jumps"
        )


def check_outpainting(
    left: int,
    right: int,
    top: int,
    bottom: int,
    feather: int,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """Raises TypeError or ValueError unless an image of this height and width, where known, can grow so."""
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    for name, value in (sides | {"feather": feather}).items():
        if not 0 <= _whole(name, value) <= MAX_SIDE:
            raise ValueError(f"{name}: got {value}, expected 0 to {MAX_SIDE} pixels")
    if not any(sides.values()):
        raise ValueError("left, right, top, bottom: all are 0; at least one side has to grow")
    for ends, length in ((("left", "right"), width), (("top", "bottom"), height)):
        growing = [end for end in ends if sides[end]]
        if length is not None and feather * len(growing) >= length and growing:
            raise ValueError(
                f"feather: {feather} pixels from {' and '.join(growing)} leave nothing whole of {length};"
                f" take at most {(length - 1) // len(growing)}"
            )


def check_seed(name: str, seed: int) -> None:
    """Raises ValueError unless the seed is one that torch and other programs take."""
    if not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"{name}: got {seed}, expected 0 to {_MAX_SEED}")


def _as_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        seeds = [secrets.randbelow(2**32) for _ in range(count)]
    elif isinstance(seed, Iterable):
        seeds = [_whole("seed", one) for one in seed]
    else:
        first = _whole("seed", seed)
        seeds = list(range(first, first + count))
    if len(seeds) != count:
        raise ValueError(f"seed: got {len(seeds)} seeds for {count} images")
    for one in seeds:
        check_seed("seed", one)
    return seeds


def _number(name: str, value: Any) -> float:
    try:
        return math.fsum((value,))  # of anything that is a number, and not of text
    except (TypeError, OverflowError):
        raise TypeError(f"{name}: got {value!r}, expected a number") from None


def _whole(name: str, value: Any) -> int:
    """A plain int of whatever stands for one, numpy's integers included."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, expected a whole number") from None
