"""The calls of operations that a model makes, recorded without values: their shapes, layouts and numbers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from _gpu_works import Work
from torch import Tensor
from torch.utils import _pytree as pytree

from sdfast import ops, use_backend
from sdfast.models.config import config_from_dict

OPERATIONS = ("conv2d", "linear", "attention", "group_norm", "layer_norm")
GROUPS = 32  # of the models' norms


class TensorOf(NamedTuple):
    """A tensor of a recorded call."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: str) -> Tensor:
        """Normal values."""
        once = [1 if stride == 0 else size for size, stride in zip(self.shape, self.stride, strict=True)]
        t = torch.empty_strided(once, self.stride, dtype=self.dtype, device=device)
        t.copy_(torch.randn(once, device=device))
        return t.expand(self.shape) if 0 in self.stride else t  # of views no copy of a weight is kept


class RecordedCall(NamedTuple):
    """One call: arguments with `TensorOf` in place of tensors, and how often each work makes it."""

    op: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    counts: dict[str, int]

    @property
    def name(self) -> str:
        shapes = ["x".join(map(str, t.shape)) for t in self.arguments if isinstance(t, TensorOf)]
        more = [
            f"{key}={'x'.join(map(str, value.shape)) if isinstance(value, TensorOf) else value}"
            for key, value in self.keywords.items()
            if value is not None
            and value is not False
            and (isinstance(value, TensorOf) or not isinstance(value, tuple))
        ]
        numbers = [
            str(a) for a in self.arguments if isinstance(a, int | tuple) and not isinstance(a, TensorOf)
        ]
        return " ".join([self.op, *shapes, *numbers, *more])

    @property
    def may_have_statistics(self) -> bool:
        """Whether it is a convolution that could gather them, or a norm that could be given them."""
        if self.op == "conv2d":
            weight = self.arguments[1].shape
            return weight[2:] == (3, 3) and weight[0] % GROUPS == 0
        return self.op == "group_norm" and self.keywords.get("skip") is None


def _as_kernels_leave_it(t: Tensor) -> TensorOf:
    """Images channels last and tokens contiguous, whatever torch makes of tensors without values."""
    strides = t.stride()
    if t.dim() == 4:
        _, c, h, w = t.shape
        strides = (c * h * w, 1, c * w, c)
    elif t.dim() == 3:
        strides = (t.shape[1] * t.shape[2], t.shape[2], 1)
    return TensorOf(tuple(t.shape), strides, t.dtype)


def record(works: dict[str, Work], dtype: torch.dtype) -> list[RecordedCall]:
    """The calls that the models make, no two of them alike."""
    found: dict[str, RecordedCall] = {}

    def described(value: Any) -> Any:
        return _as_kernels_leave_it(value) if isinstance(value, Tensor) else value

    def as_it_lies(value: Any) -> Any:
        return (
            TensorOf(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value
        )

    def wrapped(work: str, op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            kind = as_it_lies if op == "attention" else described
            args, kwargs = pytree.tree_map(kind, (arguments, keywords))
            key = repr((op, args, kwargs))
            counts = found.setdefault(key, RecordedCall(op, args, kwargs, {})).counts
            counts[work] = counts.get(work, 0) + 1
            return function(*arguments, **keywords)

        return call

    for name, work in works.items():
        if work.kind == "train":
            continue
        with torch.device("meta"):
            model = (
                work.ours(config_from_dict(work.ours, work.config))
                .to(dtype)
                .to(memory_format=torch.channels_last)
                .eval()
            )
        with torch.device("meta"), torch.no_grad():
            x = torch.empty(
                work.samples, 3 if work.kind == "encode" else 4, work.size, work.size, dtype=dtype
            )
            x = x.to(memory_format=torch.channels_last)
            with use_backend("torch"), contextlib.ExitStack() as patches:
                patches.enter_context(mock.patch.object(ops, "reads_skip", lambda x, w: True))
                for op in OPERATIONS:
                    patches.enter_context(mock.patch.object(ops, op, wrapped(name, op, getattr(ops, op))))
                if work.kind == "step":
                    _denoise(model, work, x, found)
                elif work.kind == "decode":
                    model.decode(x)
                else:
                    model.encode(x)
    return list(found.values())


def _denoise(model: Any, work: Work, x: Tensor, found: dict[str, RecordedCall]) -> None:
    """Text and timestep are projected before the loop: these calls are none of the step's."""
    before = {key: dict(recorded.counts) for key, recorded in found.items()}
    added = None
    if "addition_embed_type" in work.config:
        pooled = work.config["projection_class_embeddings_input_dim"] - 6 * 256
        added = {"text_embeds": x.new_empty(2, pooled), "time_ids": x.new_empty(2, 6)}
    time_embedding = model.encode_time(torch.tensor([500]), added)[0]
    context = model.encode_context(x.new_empty(2, work.tokens, work.config["cross_attention_dim"]))
    for key in list(found):
        if key in before:
            found[key].counts.clear()
            found[key].counts.update(before[key])
        else:
            del found[key]
    model(x, time_embedding, context)
