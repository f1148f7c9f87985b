"""Load and save models and pipelines: diffusers folders, Hugging Face hub ids, single-file checkpoints.

    load_model(UNet2DCondition, "stable-diffusion-v1-5/stable-diffusion-v1-5", subfolder="unet")
    load_components("path/to/pipeline")         every part of a pipeline folder
    load_single_file("model.safetensors")       the same from one LDM file
    save_model(unet, "folder")                  read by diffusers and transformers as well

The hub is reached only for a name that is no existing path.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

from sdfast.files import write_json
from sdfast.models import weights
from sdfast.models.config import config_from_dict, config_to_dict
from sdfast.models.ldm_keys import current_name
from sdfast.models.single_file import load_single_file
from sdfast.models.text_encoder import CLIPTextEncoder
from sdfast.models.unet import UNet2D, UNet2DCondition
from sdfast.models.vae import AutoencoderKL
from sdfast.models.weights import CheckpointError

__all__ = [
    "CheckpointError",
    "load_components",
    "load_model",
    "load_single_file",
    "resolve",
    "save_components",
    "save_model",
]

Path = str | os.PathLike[str]
Model = TypeVar("Model", bound=nn.Module)

_MODEL_OF_CLASS: Mapping[str, type[nn.Module]] = {
    "UNet2DConditionModel": UNet2DCondition,
    "UNet2DModel": UNet2D,
    "AutoencoderKL": AutoencoderKL,
    "CLIPTextModel": CLIPTextEncoder,
    "CLIPTextModelWithProjection": CLIPTextEncoder,
}
# Parts of a pipeline that do not take part in making the image.
_LEFT_OUT = ("safety_checker", "feature_extractor", "watermark")
_DEFAULT_SHARD_BYTES = 10 * 10**9  # as diffusers


def resolve(
    path_or_id: Path, *, revision: str | None = None, subfolder: str | None = None, variant: str | None = None
) -> pathlib.Path:
    """A local path: the argument itself if it exists, else the cached or downloaded files of a hub id.

    From the hub come configurations, tokenizers and safetensors weights of the parts that are used: no
    pickles, no safety checker, no single-file checkpoint that lies beside them.

    Args:
        path_or_id: a folder, a file, or "owner/name" on the Hugging Face hub.
        revision: branch, tag or commit on the hub.
        subfolder: fetch only this component.
        variant: "fp16" fetches those weights instead of the plain ones.

    Raises:
        CheckpointError: neither; the message says what was tried.
    """
    path = pathlib.Path(path_or_id).expanduser()
    if path.exists():
        return path
    name = os.fspath(path_or_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise CheckpointError(f"{name}: no such file or folder, nor a hub id of the form owner/name")
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{name}: no such file or folder; to fetch it as a hub id: pip install huggingface_hub"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=_hub_patterns(subfolder, variant),
            ignore_patterns=[f"{part}/*" for part in _LEFT_OUT],
        )  # fmt: skip
    # Its errors and its HTTP library's differ between versions; whatever failed, the answer is the same.
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{name}: no such file or folder, and the Hugging Face hub did not give it{at}"
            f" ({type(error).__name__}: {reason}). Check the name and the network, log in with"
            " `hf auth login` if it is private or gated, or pass a local folder"
        ) from error
    return pathlib.Path(folder)


def _hub_patterns(subfolder: str | None, variant: str | None) -> list[str]:
    # In these patterns * also crosses slashes, so the file's whole name is spelled out wherever it matters.
    dot = f".{variant}" if variant else ""
    below = [f"{subfolder}/"] if subfolder else ["", "*/"]
    files = ["config.json", "scheduler_config.json", "model_index.json"]
    for stem in ("diffusion_pytorch_model", "model"):
        files += [
            f"{stem}{dot}.safetensors",
            f"{stem}{dot}-*-of-*.safetensors",
            f"{stem}.safetensors.index{dot}.json",
        ]
    if not subfolder:
        files += [
            "tokenizer*.json",
            "special_tokens_map.json",
            "vocab.json",
            "merges.txt",
            "added_tokens.json",
        ]
    return [folder + file for folder in below for file in files]


def load_model(
    model_class: type[Model],
    folder_or_id: Path,
    *,
    subfolder: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    revision: str | None = None,
) -> Model:
    """Load one component, as diffusers or transformers saved it, in evaluation mode.

    Args:
        model_class: `UNet2DCondition`, `UNet2D`, `AutoencoderKL` or `CLIPTextEncoder`.
        folder_or_id: holds config.json and the weights, itself or in `subfolder`; see `resolve`.
        dtype: what the weights become; None keeps what the file has. What needs no conversion (of dtype,
            or of a convolution to channels_last) stays mapped from disk.
        variant: "fp16" for files named so.
        revision: on the hub.

    Raises:
        CheckpointError: absent or damaged files, or weights whose names or shapes do not fit.
        ValueError: a configuration that `model_class` does not implement.
    """
    folder = resolve(folder_or_id, revision=revision, subfolder=subfolder, variant=variant)
    folder = folder / subfolder if subfolder else folder
    settings = weights.read_json(folder / "config.json")
    try:
        config = config_from_dict(model_class, settings)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    model = weights.build(model_class, config, folder / "config.json")
    tensors = {current_name(name): tensor for name, tensor in weights.read_folder(folder, variant).items()}
    # Old text encoders hold the numbers 0 to 76 as if they were weights.
    tensors.pop("text_model.embeddings.position_ids", None)
    weights.fill(model, tensors, folder, dtype=dtype, device=device)
    return cast(Model, model.eval())


def save_model(model: nn.Module, folder: Path, *, max_shard_bytes: int = _DEFAULT_SHARD_BYTES) -> None:
    """Save one component as config.json and safetensors, for sdfast, diffusers and transformers.

    An interrupted save leaves no half-written file; see `weights.write_weights`.

    Args:
        folder: made if absent.
        max_shard_bytes: weights beyond it are split over files (a single tensor never is).

    Raises:
        ValueError: `max_shard_bytes` is not positive.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, expected a positive number")
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    stem = "diffusion_pytorch_model" if hasattr(model, "diffusers_class") else "model"
    weights.write_weights(model, path, stem, max_shard_bytes)
    write_json(path / "config.json", config_to_dict(model))


def load_components(
    folder_or_id: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Load a pipeline folder by its model_index.json.

    Returns:
        Part -> what it is: models loaded ("unet", "vae", "text_encoder", "text_encoder_2"), "tokenizer" and
        "tokenizer_2" as folders, "scheduler" as its configuration, plain settings of the pipeline as they
        are, and "_class_name", the pipeline's class in diffusers. Safety checker and feature extractor are
        left out.

    Raises:
        CheckpointError: as `load_model`, or a part of a kind that sdfast does not have.
    """
    folder = resolve(folder_or_id, revision=revision, variant=variant)
    index = folder / "model_index.json"
    components: dict[str, Any] = {}
    for part, entry in weights.read_json(index).items():
        if part in _LEFT_OUT or (part.startswith("_") and part != "_class_name"):
            continue
        if not isinstance(entry, list):
            components[part] = entry
            continue
        if len(entry) != 2 or not part.isidentifier():  # a part's name is a folder's
            raise CheckpointError(f"{index}: {part!r}: got {entry!r}, expected [library, class]")
        class_name = entry[1]
        if class_name is None:
            continue
        if not isinstance(class_name, str):
            raise CheckpointError(f"{index}: {part!r}: got {entry!r}, expected [library, class]")
        if class_name in _MODEL_OF_CLASS:
            components[part] = load_model(
                _MODEL_OF_CLASS[class_name], folder / part, dtype=dtype, device=device, variant=variant
            )
        elif "Tokenizer" in class_name:
            components[part] = folder / part
        elif "Scheduler" in class_name:
            components[part] = weights.read_json(folder / part / "scheduler_config.json")
        else:
            raise CheckpointError(
                f"{index}: {part} is a {class_name}; expected {', '.join(_MODEL_OF_CLASS)}, a tokenizer"
                " or a scheduler"
            )
    return components


def save_components(
    folder: Path, components: Mapping[str, Any], *, max_shard_bytes: int = _DEFAULT_SHARD_BYTES
) -> None:
    """Save a pipeline folder that `load_components` and diffusers read. model_index.json is written last.

    Args:
        components: as `load_components` returns it. A part that is None is listed as absent.

    Raises:
        ValueError: "_class_name" is absent, a part's name is no identifier, a scheduler lacks "_class_name".
    """
    path = pathlib.Path(folder)
    if "_class_name" not in components:
        raise ValueError(
            "components: '_class_name' is missing: the pipeline's, say 'StableDiffusionPipeline'"
        )
    index: dict[str, Any] = {}
    for part, value in components.items():
        if not part.isidentifier():
            raise ValueError(f"components: {part!r} cannot be a folder's name")
        target = path / part
        if isinstance(value, nn.Module):
            save_model(value, target, max_shard_bytes=max_shard_bytes)
            settings = config_to_dict(value)
            index[part] = (
                ["diffusers", settings["_class_name"]]
                if "_class_name" in settings
                else ["transformers", settings["architectures"][0]]
            )
        elif isinstance(value, pathlib.Path):
            if target.resolve() != value.resolve():
                shutil.copytree(value, target, dirs_exist_ok=True)
            index[part] = ["transformers", "CLIPTokenizer"]
        elif isinstance(value, Mapping):
            if "_class_name" not in value:
                raise ValueError(f"components: {part}: '_class_name' is missing, such as 'DDIMScheduler'")
            target.mkdir(parents=True, exist_ok=True)
            write_json(target / "scheduler_config.json", dict(value))
            index[part] = ["diffusers", value["_class_name"]]
        else:
            index[part] = [None, None] if value is None else value
    write_json(path / "model_index.json", index)
