"""One run of a pipeline: from first latents, through the reverse steps, to images, batch by batch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdfast.conditioning import TextConditioner
from sdfast.diffusion import SamplingPlan, sample, sample_on_device
from sdfast.graphs import GraphCache, graphed, repeat
from sdfast.images import to_pil
from sdfast.memory import peak_memory_bytes, reset_peak_memory
from sdfast.models import AutoencoderKL, Context, TimeEmbedding, TimeTable, UNet2DCondition
from sdfast.request import Request

# Image pixels that the VAE decodes at once: its memory grows with them, its speed hardly.
_IMAGE_PIXELS_PER_DECODE = 512 * 512
# The VAE decodes larger images without a graph: its kernels take longer than their launches there, and the
# graph would keep gigabytes. Assumed, not measured.
_MOST_PIXELS_BY_GRAPH = 1024 * 1024

# Where the noise of all steps takes more, each is drawn, and waited for, when it is its turn.
_MOST_NOISE_BYTES = 256 << 20

OnStep = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What one batch of n images starts from.

    Attributes:
        latents: the first ones, (n, c, h, w).
        condition: channels that the U-Net reads after the latents, (n, k, h, w), or None.
        draw_noise: what the steps draw from, as `sample` takes it; None: the images' generators.
        replace: the `on_step` of `sample`, which may return other latents, or None.
        finish: decoded images (n, C, H, W) in [0, 1] -> what becomes of them, or None.
    """

    latents: Tensor
    condition: Tensor | None = None
    draw_noise: Callable[[Tensor], Tensor] | None = None
    replace: Callable[[int, int, Tensor], Tensor] | None = None
    finish: Callable[[Tensor], Tensor] | None = None

    @property
    def plain(self) -> bool:
        """Whether the steps need nothing but the latents, so that the device can run them alone."""
        return self.condition is None and self.replace is None


# (which images, their generators) -> what they start from
Start = Callable[[slice, list[torch.Generator]], Beginning]


@dataclasses.dataclass(frozen=True)
class GeneratedImages:
    """What a pipeline made.

    Attributes:
        images: N pictures; or a tensor, (N, C, H, W) float32 in [0, 1] for output="tensor", the final
            latents (N, c, h, w) for output="latent".
        seeds: N seeds; `seed=seeds[i]` makes image i again, alone.
        seconds: all of it, text encoder and VAE included.
        seconds_per_step: the mean over steps, a step being one pass over one batch.
        peak_memory_bytes: of the process so far, or of this call on a GPU; None where unknown.
        settings: what made them, ready for JSON.
    """

    images: list[Image.Image] | Tensor
    seeds: list[int]
    seconds: float
    seconds_per_step: float
    peak_memory_bytes: int | None
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Generation:
    """A request and what serves it.

    Attributes:
        cache: where the CUDA graphs of U-Net and VAE are kept; None runs both without.
        vae_memory_bytes: what the decoder may take for an image, in bands then; None sets no limit.
    """

    request: Request
    plan: SamplingPlan
    unet: UNet2DCondition
    vae: AutoencoderKL
    text: TextConditioner
    cache: GraphCache | None = None
    vae_memory_bytes: int | None = None

    @torch.inference_mode()
    def run(self, start: Start, on_step: OnStep | None, settings: dict[str, Any]) -> GeneratedImages:
        """Algorithm 2 for every batch, then the decoder.

        Args:
            start: makes what some of the images start from.
            on_step: called as on_step(done, total) after each step of each batch.
            settings: for the result.
        """
        request, device = self.request, self._device
        reset_peak_memory(device)
        began, stepping = self._now(), 0.0
        batches = list(request.batches())
        total = len(batches) * len(self.plan)
        done = itertools.count(1)
        tell = None if on_step is None else lambda *_: on_step(next(done), total)

        encoded = functools.lru_cache(maxsize=1)(self._encoded)  # often all batches have one text
        outputs = []
        for part in batches:
            generators = [torch.Generator().manual_seed(seed) for seed in request.seeds[part]]
            beginning = start(part, generators)
            context, timesteps = encoded(self._texts(part))
            before = self._now()
            latents = self._sample(beginning, context, timesteps, generators, tell)
            stepping += self._now() - before
            if request.output == "latent":
                outputs.append(latents)
                continue
            images = self._decode(latents)
            outputs.append(images if beginning.finish is None else beginning.finish(images))
        result = torch.cat(outputs)
        return GeneratedImages(
            images=to_pil(result) if request.output == "pil" else result,
            seeds=request.seeds,
            seconds=self._now() - began,
            seconds_per_step=stepping / total,
            peak_memory_bytes=peak_memory_bytes(device),
            settings=settings,
        )

    def _texts(self, part: slice) -> tuple[tuple[str, str | None], ...]:
        """Prompt and negative prompt, once for as many consecutive images of `part` as all of them have."""
        request = self.request
        texts = tuple(zip(request.prompts[part], request.negative_prompts[part], strict=True))
        runs = [(text, len(list(same))) for text, same in itertools.groupby(texts)]
        return tuple(text for text, _ in runs) if len({length for _, length in runs}) == 1 else texts

    def _encoded(
        self, texts: tuple[tuple[str, str | None], ...]
    ) -> tuple[Context, TimeTable | list[TimeEmbedding]]:
        """What the U-Net is told in place of the text and, step by step, of the timestep."""
        prompts, negatives = zip(*texts, strict=True)
        condition = self.text.batch(prompts, negatives, guided=self.request.guided)
        added = None
        if condition.pooled is not None:
            time_ids = torch.tensor([self.request.time_ids], dtype=torch.float32, device=self._device)
            added = {"text_embeds": condition.pooled, "time_ids": time_ids.expand(len(condition.pooled), -1)}
        context = self.unet.encode_context(condition.hidden_states)
        if len(self.plan) <= self.request.steps:
            return context, self.unet.encode_time(self.plan.timesteps, added)
        # Resampling visits each timestep many times.
        distinct, places = self.plan.timesteps.unique(return_inverse=True)
        table = self.unet.encode_time(distinct, added)
        return context, [table[place] for place in places.tolist()]

    def _sample(
        self,
        beginning: Beginning,
        context: Context,
        timesteps: TimeTable | list[TimeEmbedding],
        generators: list[torch.Generator],
        on_step: Callable[[int, int, Tensor], None] | None,
    ) -> Tensor:
        """The reverse steps of one batch: one graph for all of them, if their noise fits on the device."""
        latents = beginning.latents
        options: dict[str, Any] = {
            "timesteps": timesteps,
            "guidance_scale": self.request.guidance_scale if self.request.guided else None,
        }
        drawn = len(self.plan) * latents.nbytes if self.plan.draws_noise.any() else 0
        if self.cache is not None and drawn <= _MOST_NOISE_BYTES and beginning.plain:
            replayed = functools.partial(repeat, model=self.unet, cache=self.cache)
            return sample_on_device(
                self.plan, self.unet, latents, conditioning=[context], repeat=replayed,
                noise=_noise_of_all_steps(self.plan, generators, latents) if drawn else None,
                on_step=on_step, **options,
            )  # fmt: skip

        def after_step(i: int, n: int, latents: Tensor) -> Tensor:
            if beginning.replace is not None:
                latents = beginning.replace(i, n, latents)
            if on_step is not None:
                on_step(i, n, latents)
            return latents

        denoiser = functools.partial(self._denoise, context, beginning.condition)
        noise = beginning.draw_noise or functools.partial(draw_like, generators)
        return sample(self.plan, denoiser, latents, draw_noise=noise, on_step=after_step, **options)

    def _denoise(
        self, context: Context, condition: Tensor | None, x: Tensor, timestep: TimeEmbedding
    ) -> Tensor:
        """The U-Net's output for latents (N, c, h, w); if guided for both texts, unconditional first."""
        if condition is not None:
            x = torch.cat([x, condition], dim=1)
        unet = self._graphed(self.unet, self.unet)
        return unet(torch.cat([x, x]) if self.request.guided else x, timestep, context)

    def _graphed(
        self, function: Callable[..., Tensor], model: torch.nn.Module, *, enabled: bool = True
    ) -> Callable[..., Tensor]:
        return graphed(function, model, self.cache, enabled=enabled and self.cache is not None)

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents (N, c, h, w) -> images (N, C, H, W) float32 in [0, 1]."""
        z = latents.to(self.vae.decoder.conv_in.weight.dtype) / self.vae.config.scaling_factor
        pixels = self.request.height * self.request.width
        parts = z.split(max(1, _IMAGE_PIXELS_PER_DECODE // pixels))
        if self.vae_memory_bytes is None:
            decode = self._graphed(self.vae.decode, self.vae, enabled=pixels <= _MOST_PIXELS_BY_GRAPH)
        else:
            decode = functools.partial(self.vae.decode, memory_bytes=self.vae_memory_bytes)
        images = torch.cat([decode(part).float() for part in parts])
        if not images.isfinite().all():
            warnings.warn(
                f"the image has values that are not numbers: {latents.dtype} overflowed, try float32"
            )
        return (images / 2 + 0.5).clamp(0, 1)

    @property
    def _device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def _now(self) -> float:
        """Seconds, when what was started on the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def draw_noise(
    generators: Sequence[torch.Generator], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Standard normal noise as diffusers draws it: on the CPU, in the dtype of the latents.

    Args:
        generators: N of them, on the CPU; each draws the noise of one image.
        shape: of one image, (c, h, w).

    Returns:
        (N, c, h, w) of `dtype` on `device`.
    """
    return torch.cat([torch.randn(1, *shape, generator=one, dtype=dtype) for one in generators]).to(device)


def _noise_of_all_steps(plan: SamplingPlan, generators: Sequence[torch.Generator], latents: Tensor) -> Tensor:
    """(n, N, c, h, w) on the device, drawn in the order in which the steps would, and copied at once."""
    pinned = latents.device.type == "cuda"
    table = torch.zeros((len(plan), *latents.shape), dtype=latents.dtype, pin_memory=pinned)
    for i, draws in enumerate(plan.draws_noise.tolist()):
        if draws:
            table[i] = draw_noise(generators, latents.shape[1:], latents.dtype, table.device)
    return table.to(latents.device, non_blocking=True)


def draw_like(generators: Sequence[torch.Generator], latents: Tensor) -> Tensor:
    """`draw_noise` of the shape and dtype of `latents`, on their device."""
    return draw_noise(generators, latents.shape[1:], latents.dtype, latents.device)
