"""From a component's config.json to its config dataclass and back.

A model class states what it implements with three class attributes, and nothing else has to know:

    config_class: type                  a frozen dataclass; its fields are the config.json keys that it varies
    fixed_config: Mapping[str, object]  keys for which it implements one value only, say {"act_fn": "silu"}
    ignored_config: frozenset[str]      keys that change nothing it computes (optional)

Everything else in a config.json must be switched off (null or false); otherwise the model would load
and then compute something else than it was trained for, so that is an error and names every such key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def config_from_dict(model_class: type, values: Mapping[str, Any]) -> Any:
    """The `model_class.config_class` that a parsed config.json describes.

    Args:
        model_class: has the attributes that the module's docstring lists.
        values: the parsed file. Keys that begin with "_" are notes of who wrote it.

    Raises:
        ValueError: a setting that `model_class` does not implement, or a required key is absent. One
            error names them all.
    """
    fields = {field.name: field for field in dataclasses.fields(model_class.config_class)}  # type: ignore[attr-defined]
    fixed: Mapping[str, Any] = getattr(model_class, "fixed_config", {})
    ignored: frozenset[str] = getattr(model_class, "ignored_config", frozenset())
    known: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in values.items():
        if key in fields:
            known[key] = _as_tuple(value)
        elif key in fixed:
            if _as_tuple(value) != _as_tuple(fixed[key]):
                problems.append(f"{key}={value!r} (only {fixed[key]!r})")
        elif not (key.startswith("_") or key in ignored or value is None or value is False):
            problems.append(f"{key}={value!r} (not supported)")
    for name, field in fields.items():
        if name not in known and field.default is field.default_factory is dataclasses.MISSING:
            problems.append(f"{name} (missing)")
    if problems:
        raise ValueError(f"{model_class.__name__}: cannot use this configuration: {', '.join(problems)}")
    return model_class.config_class(**known)  # type: ignore[attr-defined]


def config_to_dict(model: Any) -> dict[str, Any]:
    """What config.json has to say so that diffusers or transformers builds the same model.

    A diffusers model (one with `diffusers_class`) is marked by `_class_name`; a transformers one
    carries `architectures` among its fields.
    """
    values: dict[str, Any] = {}
    diffusers_class = getattr(type(model), "diffusers_class", None)
    if diffusers_class is not None:
        values["_class_name"] = diffusers_class
    settings = {**getattr(type(model), "fixed_config", {}), **_fields_of(model.config)}
    return values | {key: _as_list(settings[key]) for key in sorted(settings)}


def _fields_of(config: Any) -> dict[str, Any]:
    """Field name -> value, without copying what the fields hold."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _as_tuple(value: Any) -> Any:
    """JSON's lists as tuples, all the way down, so that a config is hashable."""
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, list | tuple) else value
