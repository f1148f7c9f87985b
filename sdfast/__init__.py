"""sdfast: the fast backend for latent diffusion in PyTorch.

    pipe = sdfast.StableDiffusion.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    pipe.text_to_image("a lighthouse at dusk", seed=0).images[0].save("lighthouse.png")

Names load when they are first used, so that importing sdfast costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdfast import diffusion, lora, models, ops, segmentation, tiled_vae, training
    from sdfast.dispatch import use_backend, use_memory, use_numerics, use_tuning
    from sdfast.drop_in import disabled, explain, optimize, restore
    from sdfast.drop_in.processor import SdfastAttnProcessor
    from sdfast.models import AutoencoderKL, CLIPTextEncoder, SegmentationUNet, UNet2D, UNet2DCondition
    from sdfast.models.checkpoint import CheckpointError
    from sdfast.pipelines import GeneratedImages, StableDiffusion
    from sdfast.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "AutoencoderKL",
    "CLIPTextEncoder",
    "CheckpointError",
    "GeneratedImages",
    "SdfastAttnProcessor",
    "SegmentationUNet",
    "StableDiffusion",
    "UNet2D",
    "UNet2DCondition",
    "__version__",
    "diffusion",
    "disabled",
    "explain",
    "lora",
    "models",
    "ops",
    "optimize",
    "restore",
    "segmentation",
    "tiled_vae",
    "training",
    "tune",
    "use_backend",
    "use_memory",
    "use_numerics",
    "use_tuning",
]

# Public name -> the module that has it; a module stands for itself.
_HOMES = {
    "AutoencoderKL": "sdfast.models",
    "CLIPTextEncoder": "sdfast.models",
    "CheckpointError": "sdfast.models.checkpoint",
    "GeneratedImages": "sdfast.pipelines",
    "SdfastAttnProcessor": "sdfast.drop_in.processor",
    "SegmentationUNet": "sdfast.models",
    "StableDiffusion": "sdfast.pipelines",
    "UNet2D": "sdfast.models",
    "UNet2DCondition": "sdfast.models",
    "diffusion": "sdfast.diffusion",
    "disabled": "sdfast.drop_in",
    "explain": "sdfast.drop_in",
    "lora": "sdfast.lora",
    "models": "sdfast.models",
    "ops": "sdfast.ops",
    "optimize": "sdfast.drop_in",
    "restore": "sdfast.drop_in",
    "segmentation": "sdfast.segmentation",
    "tiled_vae": "sdfast.tiled_vae",
    "training": "sdfast.training",
    "tune": "sdfast.tuning",
    "use_backend": "sdfast.dispatch",
    "use_memory": "sdfast.dispatch",
    "use_numerics": "sdfast.dispatch",
    "use_tuning": "sdfast.dispatch",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'sdfast' has no attribute {name!r}")
    module = importlib.import_module(home)
    value = module if home == f"sdfast.{name}" else getattr(module, name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
