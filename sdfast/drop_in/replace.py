"""optimize, restore, explain: our layers and blocks put under a model somebody already has."""

from __future__ import annotations

import fnmatch
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from sdfast import _library, dispatch
from sdfast.drop_in import layers, text
from sdfast.drop_in.report import LEFT, OURS, Report, Row


class _Step(NamedTuple):
    """A module, its place in the model, what is to serve it, or None and why not."""

    name: str
    module: nn.Module
    kind: type[nn.Module] | None
    reason: str


def _components(target: object) -> dict[str, nn.Module]:
    """The models of a target, by name: of a pipeline its components, of a module itself under ""."""
    if isinstance(target, nn.Module):
        return {"": target}
    components = getattr(target, "components", None)
    if isinstance(components, dict):
        found = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        if found:
            return found
    raise TypeError(
        f"target: got {type(target).__name__}, expected a torch.nn.Module or a pipeline of diffusers';"
        " sdfast's own runs on these kernels as it is"
    )


def _scheduler(target: object) -> Any:
    """A pipeline's scheduler of diffusers', or None."""
    scheduler = (
        getattr(target, "components", {}).get("scheduler") if not isinstance(target, nn.Module) else None
    )
    return scheduler if type(scheduler).__module__.startswith("diffusers.") else None


def _modules(target: object) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, under its first name."""
    seen: set[nn.Module] = set()
    for component, model in _components(target).items():
        for name, module in model.named_modules():
            if module not in seen:
                seen.add(module)
                yield ".".join(filter(None, (component, name))), module


def _kind(module: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """What would serve it, or None and why not; the reason is empty where it is nothing that we know."""
    kind, reason = layers.layer_kind(module)
    if kind is None and not reason and type(module).__module__.startswith("diffusers."):
        from sdfast.drop_in import blocks  # diffusers is there already

        kind, reason = blocks.block_kind(module)
    if kind is not None and "forward" in module.__dict__:
        return None, "its forward was replaced before (by offloading?); optimize the model first"
    return kind, reason


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("sdfast.")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_meant(name: str, include: Sequence[str] | None, exclude: Sequence[str]) -> bool:
    return (include is None or _matches(name, include)) and not _matches(name, exclude)


def _check_patterns(target: object, **patterns: Sequence[str] | None) -> None:
    """Raises ValueError for a pattern that no module's name matches: it is likely misspelled."""
    parts = {} if isinstance(target, nn.Module) else getattr(target, "components", {})
    names = [
        ".".join(filter(None, (component, name)))
        for component, model in _components(target).items()
        for name, _ in model.named_modules(remove_duplicate=False)
    ]
    for argument, given in patterns.items():
        for pattern in given or ():
            # A component may be absent from this very pipeline, as a safety checker often is.
            if pattern.split(".")[0] not in parts and not fnmatch.filter(names, pattern):
                such = next(filter(None, reversed(names)), "")
                raise ValueError(f"{argument}: {pattern!r} matches no module{such and f', such as {such!r}'}")


def _plan(target: object, include: Sequence[str] | None, exclude: Sequence[str]) -> list[_Step]:
    steps = []
    for name, module in _modules(target):
        if _is_ours(module) or not _is_meant(name, include, exclude):
            continue
        kind, reason = _kind(module)
        if kind is None and not reason:
            if not layers.computes(module):
                continue  # a container, an activation, a dropout
            reason = f"{type(module).__name__} is none of the layers that sdfast has"
        steps.append(_Step(name, module, kind, reason))
    return steps


def _patterns(name: str, value: str | Sequence[str] | None) -> Sequence[str] | None:
    if value is None or (isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)):
        return value
    if isinstance(value, str):
        return (value,)
    raise TypeError(
        f"{name}: got {value!r}, expected a pattern of module names, as 'unet.mid_block.*', or a list"
    )


def optimize(
    target: Any,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    mode: Literal["inference", "training"] = "inference",
    numerics: str | None = None,
    memory: str | None = None,
    cuda_graphs: bool = False,
    strict: bool = False,
) -> Report:
    """Put sdfast's kernels under a model: layers of torch's and blocks of diffusers' are served by ours.

    Parameters, names, state-dict keys, hooks and the pipeline's control flow stay as they are, and so does
    `isinstance`: a module's class becomes a subclass of what it was. Children that are wrapped or listened to
    later (LoRA, hooks, offloading, FSDP) are called as they are; custom attention processors stay in charge.
    `restore` gives back what was there; `with sdfast.disabled()` runs it for a while.

    It makes convolutions' weights channels_last, which `weight.view(n, -1)`, `parameters_to_vector` and
    safetensors' `save_file` refuse without `.contiguous()`; `mode="training"` does not, and `save_pretrained`
    takes both.
    `quantize_dynamic` looks for torch's very classes: quantise first. A write to a few values of a weight by
    way of its `.data` may go unnoticed: call `sdfast.packing.clear()` after it.

    Args:
        target: a diffusers pipeline, a model of diffusers', or any `torch.nn.Module`.
        include: patterns of module names (`fnmatch`); only these. A pipeline's begin with a component's name,
            and its scheduler is "scheduler".
        exclude: patterns of names that are left alone.
        mode: "inference" also lays the weights of convolutions on the CPU out as the kernels read them
            (channels_last); "training" leaves the memory of parameters alone, which optimizers may point to.
        numerics: "exact" or "fast", set for the process (`use_numerics`); None leaves it as it is.
        memory: "low", "default" or "high", set for the process (`use_memory`); None leaves it as it is.
        cuda_graphs: replay U-Nets, ControlNets and the VAE's halves by CUDA graphs (`sdfast.graphs`): a new
            size costs a capture. Calls with LoRA's layers, attention processors of others, hooks, offloaded
            weights or gradients run without, and so do those on a CPU.
        strict: raise where a module would stay as it was, before anything is changed.

    Returns:
        What serves each module; `print(report)` is a table.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or value.
        RuntimeError: with `strict`, some modules are not served; the message lists them.
    """
    patterns = _patterns("include", include), _patterns("exclude", exclude) or ()
    if mode not in ("inference", "training"):
        raise ValueError(f"mode: got {mode!r}, expected 'inference' or 'training'")
    for name, value in (("numerics", numerics), ("memory", memory)):
        if value is not None:
            dispatch.check_switch(name, value)
    _check_patterns(target, include=patterns[0], exclude=patterns[1])
    steps = _plan(target, *patterns)
    if not steps and not any(_is_ours(module) for _, module in _modules(target)):
        raise ValueError("target: holds no module that sdfast could serve; are include and exclude as meant?")
    scheduler = _scheduler(target) if _is_meant("scheduler", *patterns) else None
    left = [
        Row(step.name, type(step.module).__name__, LEFT, step.reason) for step in steps if step.kind is None
    ]
    if scheduler is not None:
        left += [row for row in _scheduler_row(target) if row.detail == _NO_STEP]
    if left and strict:
        listed = "\n".join(f"  {row.name} ({row.module}): {row.detail}" for row in left)
        raise RuntimeError(f"strict: these modules would stay as they were:\n{listed}")
    import sdfast.flops  # here, for torch's counter takes long to import  # noqa: F401

    for step in steps:
        if step.kind is not None:
            _replace(step.module, step.kind, mode)
    if scheduler is not None:
        from sdfast.drop_in import schedulers  # diffusers is there already

        if schedulers.serves(scheduler):
            schedulers.replace(scheduler)
    if cuda_graphs and not _replay(target, patterns):
        warnings.warn(
            "sdfast.optimize(cuda_graphs=True): found no U-Net, ControlNet or VAE of diffusers' to replay,"
            " among what is meant by include and exclude",
            stacklevel=2,
        )
    if numerics is not None:
        dispatch.use_numerics(numerics)
    if memory is not None:
        dispatch.use_memory(memory)
    if left:
        listed = ", ".join(sorted({f"{row.module} ({row.detail})" for row in left}))
        warnings.warn(f"sdfast.optimize left {len(left)} modules as they were: {listed}", stacklevel=2)
    return explain(target)


def _replay(target: object, patterns: tuple[Sequence[str] | None, Sequence[str]]) -> bool:
    """Let CUDA graphs replay the models that are meant; whether there are such."""
    if "diffusers" not in sys.modules:
        return False
    from sdfast.drop_in import graphed

    return graphed.replace(module for name, module in _modules(target) if _is_meant(name, *patterns))


def _replace(module: nn.Module, kind: type[nn.Module], mode: str) -> None:
    relaid = False
    if mode == "inference" and isinstance(module, nn.Conv2d):
        weight = module.weight
        relaid = weight.device.type == "cpu" and not weight.is_contiguous(memory_format=torch.channels_last)
        if relaid:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    module._sdfast = layers.Replaced(type(module), relaid)  # type: ignore[assignment]
    module.__class__ = kind


def restore(target: Any) -> None:
    """Give every module back the class, and every weight the layout, that it had before `optimize`.

    Args:
        target: what was optimized, or a part of it; nothing is done where nothing was.

    Raises:
        TypeError: `target` is no model.
        RuntimeError: something has put a class of its own over ours since, as FSDP does; nothing is changed.
    """
    found = [(name, module) for name, module in _modules(target) if "_sdfast" in module.__dict__]
    for name, module in found:
        if not _is_ours(module):
            raise RuntimeError(
                f"{name}: its class is {type(module).__qualname__} by now, which was put over sdfast's;"
                " undo that first"
            )
    for _, module in found:
        was: layers.Replaced = module.__dict__.pop("_sdfast")
        module.__class__ = was.original
        if was.relaid:
            weight = module.get_parameter("weight")
            weight.data = weight.data.contiguous()
        text.forget(module)
    if found:
        _restore_wrapped(target)
    for model in _graphed_models(target):
        del model.forward  # with its graphs
    scheduler = _scheduler(target)
    if scheduler is not None:
        from sdfast.drop_in import schedulers

        schedulers.restore(scheduler)


def _restore_wrapped(target: object) -> None:
    """peft makes its own layers of the class that it wraps, which was ours."""
    for _, module in _modules(target):
        if type(module).__module__.startswith("peft."):
            for child in module.modules():
                child.__class__ = layers.ORIGINALS.get(type(child), type(child))


def _graphed_models(target: object) -> list[nn.Module]:
    """Those that CUDA graphs replay."""
    if "sdfast.drop_in.graphed" not in sys.modules:
        return []
    from sdfast.drop_in import graphed

    return [module for _, module in _modules(target) if graphed.is_replaced(module)]


def explain(target: Any) -> Report:
    """What serves each module of a model or pipeline, and why not something faster. Changes nothing.

    Args:
        target: what `optimize` takes, before or after it.

    Returns:
        A table: `print` it, or go through its `rows`; what was left as it is says why.

    Raises:
        TypeError: `target` is no model.
    """
    return Report(_rows(target), _notes(target))


def _rows(target: object) -> list[Row]:
    rows = []
    for name, module in _modules(target):
        what = type(module).__name__
        if _is_ours(module):
            doc = (type(module).__doc__ or what).strip().splitlines()[0]
            rows.append(Row(name, what, OURS, f"{_kernels_for(module)}: {doc}"))
            continue
        kind, reason = _kind(module)
        if kind is not None:
            rows.append(Row(name, what, LEFT, "not optimized"))
        elif reason or layers.computes(module):
            rows.append(Row(name, what, LEFT, reason or f"sdfast has no {what}"))
    return [*rows, *_scheduler_row(target)]


_NO_STEP = "sdfast has no fused step of its kind"


def _scheduler_row(target: object) -> Iterator[Row]:
    scheduler = _scheduler(target)
    if scheduler is None:
        return
    from sdfast.drop_in import schedulers

    what = type(scheduler).__name__
    if schedulers.is_replaced(scheduler):
        yield Row("scheduler", what, OURS, "One pass over the latents a step")
    else:
        served = schedulers.serves(scheduler)
        yield Row("scheduler", what, LEFT, "not optimized" if served else _NO_STEP)


def _kernels_for(module: nn.Module) -> str:
    """Whose kernels a module's calls reach first, where it is."""
    parameter = next(module.parameters(), None)
    device = "cpu" if parameter is None else parameter.device.type
    if parameter is not None and parameter.dtype is torch.float64:
        return "torch's kernels, for float64"
    loaded = {"cpu": _library.load_cpu_library, "cuda": _library.load_cuda_library}
    for backend in dispatch.ORDER.get(device, ("torch",)):
        if backend not in loaded or loaded[backend]().loaded:
            return f"{backend} kernels"
    return "torch kernels"


def _notes(target: object) -> list[str]:
    devices = {p.device.type for model in _components(target).values() for p in model.parameters()}
    notes = [f"numerics {dispatch.numerics()}, memory {dispatch.memory()} (sdfast.use_numerics, use_memory)"]
    if "cpu" in devices:
        notes.append(
            f"{torch.get_num_threads()} threads (torch.set_num_threads); in a process that runs models and"
            " little else, sdfast.memory.keep_freed_memory() saves mapping every large tensor anew"
        )
    if models := _graphed_models(target):
        notes.append(f"by CUDA graphs: {', '.join(type(model).__name__ for model in models)}")
    if "cuda" in devices:
        notes.append(
            "on CUDA torch's kernels serve, on Hopper in half precision what was measured fastest for a shape"
            " (sdfast.use_backend)"
        )
    if "diffusers" not in sys.modules:
        notes.append("diffusers is not imported: only torch's layers were looked for")
    return notes
