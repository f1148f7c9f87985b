"""`sdfast.optimize` on diffusers' models of many kinds and sizes, beside the same models as they were.

    python benchmarks/bench_zoo.py [--models sd15 vae ...] [--dtype float32 bfloat16] [--rounds 3] [--tiny]

Random weights, one process, both sides alternating; eager torch has the memory format that was faster in a
run of each. A call is one step inside a sampling loop: its text is the tensor of the step before, whose keys
and values sdfast keeps. Errors are against eager in fp32. `optimize_seconds` and `first_call_seconds` are
what the added line costs, packing of weights included. A run
of all models and dtypes is written down.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import gc
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _record import results_path, write_json
from torch import Tensor, nn

import sdfast
from sdfast.bench.models import LARGEST_FP32_ERROR
from sdfast.bench.timing import in_turns, ratio, timed, times
from sdfast.memory import keep_freed_memory
from sdfast.testing import relative_error

_NARROW = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
_FORMATS = (torch.channels_last, torch.contiguous_format)


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the zoo.

    Attributes:
        title: names it in tables.
        kind: diffusers' class.
        config: what differs from that class's defaults.
        tiny: what differs from `config` where it is only tried out.
        sizes: sides of the latents, or of a pixel model's images.
        method: what is called.
    """

    title: str
    kind: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    sizes: tuple[int, int] = (32, 64)
    method: str = "forward"

    def make(self, tiny: bool) -> nn.Module:
        import diffusers

        diffusers.utils.logging.set_verbosity_error()  # it warns of every .to(dtype)
        torch.manual_seed(0)
        model = getattr(diffusers, self.kind)(**{**self.config, **(self.tiny if tiny else {})}).eval()
        for parameter in model.parameters():
            if not parameter.any():  # a ControlNet's last convolutions: it would compute nothing but zeros
                nn.init.normal_(parameter, std=0.02)
        return model

    def inputs(self, model: Any, size: int, batch: int) -> dict[str, Any]:
        """The keywords of a call, fp32."""
        noise = functools.partial(torch.randn, generator=torch.Generator().manual_seed(size + batch))
        config = model.config
        if self.kind == "AutoencoderKL":
            return {"z": noise(batch, config.latent_channels, size, size)}
        image = noise(batch, config.in_channels, size, size)
        call: dict[str, Any] = {"sample": image, "timestep": torch.tensor(500)}
        if self.kind == "UNet2DModel":
            return call
        call["encoder_hidden_states"] = noise(batch, 77, config.cross_attention_dim)
        if self.kind == "ControlNetModel":
            scale = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
            call["controlnet_cond"] = noise(batch, 3, scale * size, scale * size)
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            call["added_cond_kwargs"] = {"text_embeds": noise(batch, pooled), "time_ids": noise(batch, 6)}
        return call

    def calling(self, model: nn.Module, inputs: dict[str, Any]) -> Callable[[], Tensor]:
        """The call: all that it returns, flat."""
        method = getattr(model, self.method)

        @torch.no_grad()
        def call() -> Tensor:
            result = method(**inputs, return_dict=False)
            return torch.cat([t.flatten() for t in _tensors(result)])

        return call


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    else:
        for part in nested:
            yield from _tensors(part)


_CROSS, _PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
_TINY_UNET = {
    **_NARROW, "cross_attention_dim": 32, "down_block_types": (_CROSS[0], _PLAIN[0]),
    "up_block_types": (_PLAIN[1], _CROSS[1]), "attention_head_dim": 4, "transformer_layers_per_block": 1,
}  # fmt: skip
_SD1 = {"cross_attention_dim": 768}
_SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
_SDXL = {
    "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True, "transformer_layers_per_block": (1, 1, 2),
    "down_block_types": (_PLAIN[0], _CROSS[0], _CROSS[0]),
    "up_block_types": (_CROSS[1], _CROSS[1], _PLAIN[1]),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_DDPM = {
    "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2, "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
}  # fmt: skip
_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_TINY_DDPM = {
    **_NARROW, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
_TINY_VAE = {
    **_NARROW, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
_TINY_CONTROL = {key: value for key, value in _TINY_UNET.items() if key != "up_block_types"}

ZOO = {
    "sd15": Model("SD 1.5 U-Net", "UNet2DConditionModel", _SD1, _TINY_UNET, (32, 48)),
    "sd21": Model("SD 2.1 U-Net", "UNet2DConditionModel", _SD2, _TINY_UNET, (32, 48)),
    "sdxl": Model("SDXL U-Net, 2 transformers deep", "UNet2DConditionModel", _SDXL, _TINY_UNET, (32, 48)),
    "ddpm": Model("DDPM U-Net for CIFAR-10", "UNet2DModel", _DDPM, _TINY_DDPM),
    "vae": Model("VAE decode", "AutoencoderKL", _VAE, _TINY_VAE, (16, 32), "decode"),
    "controlnet": Model("ControlNet of SD 1.5", "ControlNetModel", _SD1, _TINY_CONTROL, (32, 48)),
}
_BATCHES = (1, 4)
_DTYPES = ("float32", "bfloat16")


def _as_dtype(nested: Any, dtype: torch.dtype) -> Any:
    if isinstance(nested, dict):
        return {key: _as_dtype(value, dtype) for key, value in nested.items()}
    return nested.to(dtype) if nested.is_floating_point() else nested


def measure(name: str, dtypes: list[str], rounds: int, tiny: bool) -> Iterator[dict[str, Any]]:
    """A row for each dtype, size and batch of one model.

    Raises:
        AssertionError: a result of ours is wrong.
    """
    zoo = ZOO[name]
    model = zoo.make(tiny)
    sizes = (8, 16) if tiny else zoo.sizes
    cases = [(size, batch, zoo.inputs(model, size, batch)) for size in sizes for batch in _BATCHES]
    expected: list[Tensor] = []
    for dtype_name in dtypes:
        dtype = getattr(torch, dtype_name)
        eager = copy.deepcopy(model).to(dtype)
        ours = copy.deepcopy(eager)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing of the zoo stays as it was
            optimize_seconds, _ = timed(functools.partial(sdfast.optimize, ours))
        for case, (size, batch, inputs) in enumerate(cases):
            inputs = _as_dtype(inputs, dtype)
            first_seconds, result = timed(zoo.calling(ours, inputs))
            taken, theirs = _in_faster_format(zoo, eager, inputs)
            if case == len(expected):  # the first dtype: fp32, or eager in it
                whole = theirs if dtype is torch.float32 else zoo.calling(model, cases[case][2])()
                expected.append(whole)
            errors = relative_error(result, expected[case]), relative_error(theirs, expected[case])
            limit = LARGEST_FP32_ERROR if dtype is torch.float32 else 1.5 * errors[1]
            if not errors[0] <= limit:
                raise AssertionError(f"{zoo.title}, {dtype_name}: error {errors[0]:.1e} exceeds {limit:.1e}")
            samples = in_turns(
                {"eager": zoo.calling(eager, inputs), "ours": zoo.calling(ours, inputs)}, rounds=rounds
            )
            yield {
                "model": name, "title": zoo.title, "dtype": dtype_name, "size": size, "batch": batch,
                "eager": {**times(samples["eager"]), "format": taken, "error": errors[1]},
                "sdfast": {**times(samples["ours"]), "error": errors[0]},
                **ratio(samples["eager"], samples["ours"]), "rounds": rounds,
                "optimize_seconds": optimize_seconds, "first_call_seconds": first_seconds,
            }  # fmt: skip
        del eager, ours
        gc.collect()


def _in_faster_format(zoo: Model, eager: nn.Module, inputs: dict[str, Any]) -> tuple[str, Tensor]:
    """Lay the model's weights out as it runs faster; the format, and its result."""
    zoo.calling(eager, inputs)()  # allocates, and makes what is made once
    found = []
    for memory_format in _FORMATS:
        eager.to(memory_format=memory_format)
        seconds, result = timed(zoo.calling(eager, inputs))
        found.append((seconds, memory_format, result))
    _, fastest, result = min(found, key=lambda each: each[0])
    eager.to(memory_format=fastest)
    return str(fastest).removeprefix("torch."), result


def main() -> None:
    """Print every row, write results/<device>/zoo.json where all were measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=ZOO, default=list(ZOO), help="(all)")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each side (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="try it out on small models; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows = []
    for name in options.models:
        for row in measure(name, options.dtype, options.rounds, options.tiny):
            rows.append(row)
            print(
                f"{row['title']}, {row['dtype']}, {row['batch']}x{row['size']}x{row['size']}:"
                f" {row['eager']['ms']:.0f} -> {row['sdfast']['ms']:.0f} ms, {row['ratio']:.2f}x",
                flush=True,
            )
    if not options.tiny and (tuple(options.models), tuple(options.dtype)) == (tuple(ZOO), _DTYPES):
        write_json(results_path("zoo"), rows)
    ratios = [row["ratio"] for row in rows]
    print(f"{min(ratios):.2f}x to {max(ratios):.2f}x, median {statistics.median(ratios):.2f}x")


if __name__ == "__main__":
    main()
