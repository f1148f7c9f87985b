"""Tensors in files: opened lazily, checked by name and shape, then put into a model without a second copy.

A safetensors file is mapped into memory, copy on write: a parameter's pages are read from disk when they are
first used, a changed parameter never reaches the file, and several processes share what they only read.
Do not change such a file in place while a model uses it; `write_weights` replaces files, which is safe.
What has to be converted is, tensor by tensor, and the pages it came from are given back at once.

Nothing here unpickles code. A `.bin` or `.ckpt` is read by torch's restricted unpickler, which knows tensors
and plain containers only, and there is no way round it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import mmap
import os
import pathlib
import pickle
import re
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdfast._listed import listed
from sdfast.files import replacing, write_json

_MOST_NAMES_IN_ERROR = 20


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read, or fitted to its model; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of an open file: its shape now, its values when `read` is called."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    mapped: bool = False  # from a file, to which its pages can be given back


Tensors = dict[str, LazyTensor]


def read_file(path: pathlib.Path) -> Tensors:
    """The tensors of a `.safetensors` file, or of a `.bin`, `.ckpt`, `.pt` or `.pth` without code in it.

    Raises:
        CheckpointError: the file is absent, damaged, or of another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with open(path, "rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` there")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".bin", ".ckpt", ".pt", ".pth"):
        return _read_pickle(path)
    raise CheckpointError(
        f"{path}: got a {path.suffix!r} file, expected .safetensors, .bin, .ckpt, .pt or .pth"
    )


def _read_safetensors(path: pathlib.Path) -> Tensors:
    try:
        file = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); download or copy it again") from error
    return {
        name: LazyTensor(shape, functools.partial(_read_aligned, file, name), mapped=True)
        for name, shape in shapes.items()
    }


def _read_aligned(file: Any, name: str) -> Tensor:
    """A tensor mapped from the file, or a copy where it lies at an address that its dtype does not allow."""
    tensor = file.get_tensor(name)
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _read_pickle(path: pathlib.Path) -> Tensors:
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # An unpickler that reads other bytes than a pickle's raises almost anything.
    except Exception as error:
        unpickling = isinstance(error, pickle.UnpicklingError)
        refused = re.search(r"GLOBAL (\S+)", str(error)) if unpickling else None
        if refused is not None:
            raise CheckpointError(
                f"{path}: holds Python objects besides tensors ({refused[1]}); loading them could run any"
                " code: refused. Take a .safetensors version of it, or convert it on a machine that has"
                " nothing to lose"
            ) from error
        reason = "no pickle of tensors" if unpickling else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path}: damaged or cut short ({reason}); download or copy it again"
        ) from error
    while isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):  # Lightning wraps it
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, expected a dictionary of tensors")
    return {
        str(name): LazyTensor(tuple(value.shape), lambda value=value: value)  # type: ignore[misc]
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def read_folder(folder: pathlib.Path, variant: str | None = None) -> Tensors:
    """The tensors of a component's folder, one file or shards, safetensors before anything else.

    Args:
        variant: "fp16" reads `model.fp16.safetensors` and its like, and only those.

    Raises:
        CheckpointError: no weights, or an index that is damaged or leads out of the folder.
    """
    dot = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        if (folder / f"{stem}{dot}.safetensors").exists():
            return read_file(folder / f"{stem}{dot}.safetensors")
        index = folder / f"{stem}.safetensors.index{dot}.json"
        if index.exists():
            return _read_shards(index)
    for stem in ("diffusion_pytorch_model", "pytorch_model"):
        if (folder / f"{stem}{dot}.bin").exists():
            return read_file(folder / f"{stem}{dot}.bin")
    found = ", ".join(sorted(p.name for p in folder.glob("*model*"))) or "none"
    raise CheckpointError(
        f"{folder}: no weights for variant={variant!r}; expected diffusion_pytorch_model{dot}.safetensors,"
        f" model{dot}.safetensors, or shards of one; weight files there: {found}"
    )


def _read_shards(index: pathlib.Path) -> Tensors:
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(entry, str) for entry in entries.values()):
        raise CheckpointError(f"{index}: no 'weight_map' from tensor names to file names; download it again")
    tensors: Tensors = {}
    for entry in sorted(set(entries.values())):
        shard = read_file(_shard_path(index, entry))
        twice = tensors.keys() & shard.keys()
        if twice:
            raise CheckpointError(
                f"{index}: {listed(twice, _MOST_NAMES_IN_ERROR)} in more than one shard; download it again"
            )
        tensors |= shard
    return tensors


def _shard_path(index: pathlib.Path, entry: str) -> pathlib.Path:
    """The shard an index names. An index is data from elsewhere, so it may name only a file beside itself.

    A link is followed if it ends in the same folder, or in the same repository of the Hugging Face cache,
    whose snapshots/<commit>/<component>/<file> are links to blobs/<hash>.
    """
    if "/" in entry or "\\" in entry or entry in ("", ".", "..") or not entry.endswith(".safetensors"):
        raise CheckpointError(
            f"{index}: names the shard {entry!r}; only a .safetensors file beside it is allowed"
        )
    folder = pathlib.Path(os.path.abspath(index)).parent
    allowed = [folder.resolve()]
    allowed += [p.parent.resolve() / "blobs" for p in folder.parents if p.name == "snapshots"][:1]
    path = folder / entry
    if path.resolve().parent not in allowed:
        raise CheckpointError(
            f"{index}: its shard {entry!r} is a link to {path.resolve()}, outside this checkpoint"
        )
    return path


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def build(model_class: Callable[[Any], nn.Module], config: Any, source: object) -> nn.Module:
    """`model_class(config)` whose parameters take no memory yet; buffers are real.

    Raises:
        CheckpointError: `config` makes no model; the message names `source`, where it is from.
    """
    try:
        with _parameters_on_meta():
            return model_class(config)
    # A number where a list belongs, widths that the groups do not divide, a negative width, no widths.
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        raise CheckpointError(f"{source}: describes no model that can be built: {error}") from error


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    # Not `with torch.device("meta")`: that empties computed buffers too, and one that is not in the
    # checkpoint could never be filled. The hook is global, so it heeds this thread's modules only.
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    # The stub says that such a hook returns None; its documentation says that it may return a replacement.
    handle = nn.modules.module.register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def fill(
    model: nn.Module,
    tensors: Tensors,
    source: object,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Give `model` exactly the tensors of a checkpoint; convolution weights become channels_last.

    Args:
        model: its parameters may be on the meta device.
        tensors: from `read_file` or `read_folder`, under the model's names.
        source: where they are from, for the error text.
        dtype: what floating-point tensors become, one by one; None keeps what the file has.
        device: where the model goes.

    Raises:
        CheckpointError: names or shapes differ; one error lists all that do.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    floating = {name: value.is_floating_point() for name, value in model.state_dict().items()}
    missing = expected.keys() - tensors.keys()
    extra = tensors.keys() - expected.keys()
    misshapen = {
        f"{name} {tensors[name].shape} for {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    }
    problems = [
        f"{len(names)} {kind}: {listed(names, _MOST_NAMES_IN_ERROR)}"
        for kind, names in (("missing", missing), ("unexpected", extra), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(f"{source}: does not fit {type(model).__name__}: {'; '.join(problems)}")
    state = {}
    for name in expected:
        tensor = tensors[name].read()
        if tensor.is_floating_point() != floating[name]:
            raise CheckpointError(
                f"{source}: {name} has dtype {tensor.dtype}; quantised weights are not supported"
            )
        # Convolutions and GroupNorm are a fifth faster with the channels innermost.
        layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        state[name] = tensor.to(device, dtype if floating[name] else tensor.dtype, memory_format=layout)
        if tensors[name].mapped and state[name] is not tensor:
            _give_back_pages(tensor)
    model.load_state_dict(state, assign=True)
    model.to(device)  # buffers that no checkpoint holds


def _give_back_pages(tensor: Tensor) -> None:
    """Drop the pages of a mapped tensor that has been copied; reading it again would read the file again.

    Without this they count as this process's memory until the kernel runs short of it.
    """
    if sys.platform != "linux":
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def write_weights(model: nn.Module, folder: pathlib.Path, stem: str, max_shard_bytes: int) -> None:
    """Write a model's tensors as `<stem>.safetensors`, or as shards and their index if they exceed the limit.

    Every file is written under another name first and then renamed, and files of an earlier save that would
    be read in their stead are removed last. So an interrupted save leaves no half-written file.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = total = 0
    for name, tensor in model.state_dict().items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
        total += tensor.nbytes
    count = len(shards)
    names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        dense = {key: tensor.detach().cpu().contiguous() for key, tensor in shard.items()}
        with replacing(folder / name) as temporary:
            save_file(dense, temporary, metadata={"format": "pt"})
    index = folder / f"{stem}.safetensors.index.json"
    if count > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        names.append(index.name)
    for stale in [folder / f"{stem}.safetensors", index, *folder.glob(f"{stem}-*-of-*.safetensors")]:
        if stale.name not in names:
            stale.unlink(missing_ok=True)
