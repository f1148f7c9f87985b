"""The bound of a model on disk over a folder of pictures or the held-out digits: `sdfast bound`.

A pixel model (an unconditional U-Net and its scheduler in a diffusers folder) is judged by the 8-bit pictures
themselves. A latent one by the latents of its own autoencoder, one sample of q(z|x) of each picture, scaled:
the bound is then that of the latents' density given the text, per element of a latent, and not to be compared
with that of pictures.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from sdfast._arguments import usable_device
from sdfast._listed import listed
from sdfast.conditioning import TextConditioner
from sdfast.diffusion import Bound, NoiseSchedule, variational_bound
from sdfast.figures import new_figure, save_figure
from sdfast.images import as_tensor, read_image
from sdfast.loading import DIGITS, digits_folder, load_pipeline_parts
from sdfast.models import UNet2D
from sdfast.models.checkpoint import CheckpointError, load_components, resolve
from sdfast.models.weights import read_json
from sdfast.request import check_count
from sdfast.training.captions import WORDS
from sdfast.training.data import enlarge, load_digits
from sdfast.training.images import SUFFIXES, visible_names

VARIANCES = ("fixed_large", "fixed_small")


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Data of one size, with what a text model is told of them.

    Attributes:
        images: (N, C, H, W) float32 in [-1, 1], of 256 levels.
        prompts: N.
        skipped: files that could not be read.
    """

    images: Tensor
    prompts: list[str]
    skipped: list[Path]


@dataclasses.dataclass(frozen=True)
class DataBound:
    """The bound over a data set.

    Attributes:
        bounds: for each of `VARIANCES`.
        latent: whether it is one of latents.
        shape: of one sample, pictures' or latents'.
        skipped: files that could not be read.
    """

    bounds: dict[str, Bound]
    latent: bool
    shape: tuple[int, ...]
    skipped: list[Path]

    def record(self) -> dict[str, Any]:
        """Means, standard errors and terms, ready for JSON; all but the errors in bits per dimension."""
        first = next(iter(self.bounds.values()))
        return {
            "of": "latents" if self.latent else "pictures",
            "samples": len(first.prior),
            "shape": list(self.shape),
            "skipped": [str(path) for path in self.skipped],
            "bits_per_dimension": {
                name: {
                    "total": one.total.mean().item(),
                    "stderr": _standard_error(one.total),
                    "prior": one.prior.mean().item(),
                    "transitions": one.terms[:, 1:].sum(dim=1).mean().item(),
                    "reconstruction": one.terms[:, 0].mean().item(),
                    "terms": one.terms.mean(dim=0).tolist(),
                }
                for name, one in self.bounds.items()
            },
            "x0_mse": first.x0_mse.mean(dim=0).tolist(),
            "epsilon_mse": first.epsilon_mse.mean(dim=0).tolist(),
        }


@torch.no_grad()
def bound_of_data(
    model: str | Path,
    data: str | Path,
    *,
    images: int | None = None,
    prompt: str | None = None,
    clip: bool | None = None,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> DataBound:
    """Evaluate a model's bound over a data set.

    Args:
        model: a diffusers folder, file or hub id; "digits" for the model that ships.
        data: a folder of pictures, searched with its sub-folders; "digits" for scikit-learn's held-out ones.
        images: how many of them, the first by name; None for all.
        prompt: what a text model is told of every picture; None says nothing, but of a digit its name.
        clip: clamp the predicted x_0 to [-1, 1]; None does so for pixel models, whose data lie there.
        batch_size: pictures in one call of the model.
        device: where the model runs.
        seed: of the noise.
        on_step: called as on_step(done, total), in pictures times timesteps.

    Raises:
        CheckpointError: the model cannot be loaded, or is of a kind whose bound is not implemented.
        TypeError, ValueError: an argument is out of range, or no picture can be read.
        FloatingPointError: a term is not finite.
    """
    _check_images(images)
    check_count("batch_size", batch_size)
    device = usable_device("device", device)
    subject = (_pixel_subject if _is_pixel_model(model) else _latent_subject)(model, device)
    if subject.latent and clip:
        raise ValueError("clip: is for pixel models; latents go beyond [-1, 1]")
    pictures = read_pictures(data, subject.channels, subject.size, images=images, prompt=prompt)
    x0 = subject.encode(pictures.images, seed)
    bounds = variational_bound(
        subject.schedule, subject.denoiser(pictures.prompts), x0, variance=VARIANCES,
        discrete=not subject.latent, clip=not subject.latent if clip is None else clip,
        batch_size=batch_size, seed=seed, on_step=on_step,
    )  # fmt: skip
    return DataBound(bounds, subject.latent, tuple(x0.shape[1:]), pictures.skipped)


def read_pictures(
    data: str | Path, channels: int, size: int, *, images: int | None = None, prompt: str | None = None
) -> Pictures:
    """Pictures of one size: cut to a square around their middle, enlarged or reduced.

    Args: as of `bound_of_data`; channels is 1 or 3.

    Raises:
        ImportError: "digits" needs scikit-learn.
        TypeError, ValueError: `images` is out of range, or no folder, or one without a picture that can be
            read.
    """
    _check_images(images)
    if str(data) == DIGITS:
        holdout = load_digits()[1]
        levels = (enlarge(holdout.images[:images], size) + 1) * 127.5
        named = [f"a handwritten {WORDS[digit]}" for digit in holdout.labels[:images].tolist()]
        prompts = named if prompt is None else [prompt] * len(named)
        return Pictures(levels.round()[:, :channels] / 127.5 - 1, prompts, [])
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(f"data: {folder} is no folder; expected one of pictures, or {DIGITS!r}")
    paths = [folder / name for name in visible_names(folder) if Path(name).suffix.lower() in SUFFIXES]
    found: list[Tensor] = []
    skipped: list[Path] = []
    for path in paths:
        if images is not None and len(found) == images:
            break
        try:
            image = _square(read_image(path))
        except OSError:
            skipped.append(path)
            continue
        found.append(as_tensor(image, height=size, width=size, channels=channels, multiple=1))
    if skipped:
        names = listed(str(path) for path in skipped)
        warnings.warn(f"data: {len(skipped)} of {len(paths)} files cannot be read and are left out: {names}")
    if not found:
        raise ValueError(f"data: {folder} holds no picture that can be read ({len(skipped)} cannot)")
    return Pictures(torch.cat(found), [prompt or ""] * len(found), skipped)


def _check_images(images: int | None) -> None:
    if images is not None:
        check_count("images", images)


def _square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def plot(result: DataBound, path: str | Path) -> None:
    """Write a PNG with the terms and the mean squared errors at each t.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(6.4, 6.4)
    terms, errors = figure.subplots(2, 1, sharex=True)
    for name, one in result.bounds.items():
        # L_0 stands apart: of latents it is a density's and may be negative, which a logarithm cannot show.
        mean, linestyle = one.terms.mean(dim=0), "-" if name == VARIANCES[0] else "--"
        parts = f"{mean[1:].sum():.3f} + $L_0$ {mean[0]:.3f} + $L_T$ {one.prior.mean():.0e}"
        label = f"σ² {name.replace('_', ' ')}: {one.total.mean():.3f} = {parts}"
        terms.plot(range(1, len(mean)), mean[1:].numpy(), label=label, linestyle=linestyle)
    of = "latent" if result.latent else "picture"
    terms.set(
        ylabel=f"bits per dimension of a {of}", title=f"Terms of the bound, {_samples(result)}", yscale="log"
    )
    first = next(iter(result.bounds.values()))
    errors.plot(first.epsilon_mse.mean(dim=0).numpy(), label="ε", color="C2")
    errors.plot(first.x0_mse.mean(dim=0).numpy(), label="$x_0$", color="C3")
    errors.set(xlabel="index t", ylabel="mean squared error", yscale="log")
    for axes in (terms, errors):
        axes.legend()
        axes.grid(alpha=0.25)
    save_figure(figure, path)


def _samples(result: DataBound) -> str:
    count = len(next(iter(result.bounds.values())).prior)
    return f"{count} {'latents' if result.latent else 'pictures'} of {'x'.join(map(str, result.shape))}"


@dataclasses.dataclass(frozen=True)
class _Subject:
    """A model as the bound sees it."""

    schedule: NoiseSchedule
    latent: bool
    channels: int  # of pictures
    size: int
    encode: Callable[[Tensor, int], Tensor]  # pictures and a seed -> x_0 on the device
    denoiser: Callable[[Sequence[str]], Callable[[Tensor, slice, int], Tensor]]  # of prompts


def _is_pixel_model(model: str | Path) -> bool:
    path = digits_folder() if model == DIGITS else resolve(model)
    if path.is_file():
        return False
    entry = read_json(path / "model_index.json").get("unet")
    return isinstance(entry, list) and entry[-1:] == ["UNet2DModel"]


def _pixel_subject(model: str | Path, device: torch.device) -> _Subject:
    components = load_components(model, dtype=torch.float32, device=device)
    unet = cast(UNet2D, components["unet"])
    _check_channels(model, unet.config.in_channels, unet.config.out_channels, unet.config.in_channels)
    if unet.config.in_channels not in (1, 3):
        raise CheckpointError(f"{model}: reads {unet.config.in_channels} channels, expected 1 or 3")
    schedule = NoiseSchedule.from_config(components["scheduler"])
    steps = unet.encode_time(torch.arange(schedule.T))
    return _Subject(
        schedule, False, unet.config.in_channels, _side(model, unet.config.sample_size),
        lambda images, _: images.to(device), lambda _: lambda x_t, part, t: unet(x_t, steps[t]),
    )  # fmt: skip


def _latent_subject(model: str | Path, device: torch.device) -> _Subject:
    parts = load_pipeline_parts(model, dtype=torch.float32, device=device)
    unet, vae = parts["unet"], parts["vae"]
    if unet.config.addition_embed_type is not None:
        raise CheckpointError(
            f"{model}: the bound of SDXL is not implemented; expected Stable Diffusion 1 or 2"
        )
    latents = vae.config.latent_channels
    _check_channels(model, unet.config.in_channels, unet.config.out_channels, latents)
    text = TextConditioner(
        parts["text_encoders"], parts["tokenizers"], is_xl=False, zero_empty_negative=False
    )
    schedule = NoiseSchedule.from_config(parts["scheduler_config"])
    steps = unet.encode_time(torch.arange(schedule.T))

    def encode(images: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        codes = []
        for image in images.split(1):
            posterior = vae.encode(image.to(device))
            noise = torch.randn(posterior.mean.shape, generator=generator)
            codes.append(posterior.sample(noise.to(device)) * vae.config.scaling_factor)
        return torch.cat(codes)

    def denoiser(prompts: Sequence[str]) -> Callable[[Tensor, slice, int], Tensor]:
        @functools.lru_cache(maxsize=1)  # all steps of a batch come one after the other
        def context(first: int, last: int) -> Any:
            told = text.batch(prompts[first:last], [None] * (last - first), guided=False)
            return unet.encode_context(told.hidden_states)

        return lambda x_t, part, t: unet(x_t, steps[t], context(part.start, part.stop))

    side = _side(model, unet.config.sample_size) * vae.downsampling
    return _Subject(schedule, True, vae.config.in_channels, side, encode, denoiser)


def _check_channels(model: str | Path, reads: int, gives: int, expected: int) -> None:
    if (reads, gives) != (expected, expected):
        what = "its variances too" if gives == 2 * expected else "more than its noise"
        if reads != expected:
            what = f"{reads} channels, as for inpainting"
        raise CheckpointError(
            f"{model}: the U-Net {'reads' if reads != expected else 'predicts'} {what}, whose bound is not"
            f" implemented; expected {expected} channels in and out"
        )


def _side(model: str | Path, sample_size: int | Sequence[int] | None) -> int:
    sides = {sample_size} if isinstance(sample_size, int) else set(sample_size or ())
    if len(sides) != 1:
        raise CheckpointError(f"{model}: sample_size is {sample_size}, expected one side of a square")
    return sides.pop()


def _standard_error(values: Tensor) -> float | None:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
