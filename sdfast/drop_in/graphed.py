"""Whole models of diffusers' by CUDA graphs: `sdfast.optimize(pipe, cuda_graphs=True)`.

The model's `forward` is replaced on the object, not by a class: pipelines write down the classes of their
components. What a replay would not see runs as it is, decided per call: attention processors that somebody
put in, LoRA's layers, offloaded weights, hooks, gradients, FreeU's factors, which are numbers in Python, and
convolutions that `ops.conv2d` does not compute. Other numbers of its modules are those of the capture.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sdfast._graph_keys import modules_of
from sdfast.drop_in import text
from sdfast.drop_in.blocks import STOCK_PROCESSORS
from sdfast.drop_in.layers import is_enabled
from sdfast.graphs import GraphCache, graphed
from sdfast.models import layers

_MODELS = (UNet2DConditionModel, UNet2DModel, ControlNetModel, Encoder, Decoder)
_FREE_U = ("s1", "s2", "b1", "b2")


class Forward:
    """A model's forward, by a graph for each kind of call.

    Args:
        model: one of diffusers'.
        cache: where its graphs are kept; copies and pickles of the model start with one of their own.
    """

    def __init__(self, model: nn.Module, cache: GraphCache | None = None) -> None:
        self.model = model
        self.cache = GraphCache() if cache is None else cache

    def __reduce__(self) -> tuple[type[Forward], tuple[nn.Module]]:
        return Forward, (self.model,)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if not is_enabled() or torch.compiler.is_compiling() or not _is_captured_whole(self.model):
            return self._compute(*arguments, **keywords)
        if not isinstance(self.model, (Encoder, Decoder)):
            arguments, keywords = self._with_timestep_on_device(arguments, keywords)
        leaves = pytree.tree_leaves((arguments, keywords))
        if not all(isinstance(leaf, (Tensor, Hashable)) for leaf in leaves):
            return self._compute(*arguments, **keywords)
        return graphed(self._compute, self.model, self.cache)(*arguments, **keywords)

    def _compute(self, *arguments: Any, **keywords: Any) -> Any:
        with text.computed_anew():  # a replay finds another text in the same tensor
            return type(self.model).forward(self.model, *arguments, **keywords)

    def _with_timestep_on_device(
        self, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As a number it would be a graph of its own for each of its values."""
        device = next(self.model.parameters()).device
        if "timestep" in keywords:
            return arguments, {**keywords, "timestep": torch.as_tensor(keywords["timestep"], device=device)}
        if len(arguments) < 2:
            return arguments, keywords  # the model says what is missing
        sample, timestep, *others = arguments
        return (sample, torch.as_tensor(timestep, device=device), *others), keywords


def _is_captured_whole(model: nn.Module) -> bool:
    """Whether a call depends on nothing but tensors, weights, and what `sdfast.graphs` watches besides."""
    for module in modules_of(model):
        state = module.__dict__
        processor = state.get("processor", module._modules.get("processor"))
        if (
            (isinstance(module, layers.Conv2d) and not module.is_served())
            or not {"_hf_hook", "_diffusers_hook"}.isdisjoint(state)
            or type(module).__module__.startswith("peft.")
            or (processor is not None and type(processor) not in STOCK_PROCESSORS)
            or any(state.get(factor) is not None for factor in _FREE_U)
        ):
            return False
    return True


def replace(modules: Iterable[nn.Module]) -> bool:
    """Let the models among these be replayed, out of one cache; whether there are any, or were before."""
    cache, models = GraphCache(), [module for module in modules if type(module) in _MODELS]
    for model in models:
        if "forward" not in model.__dict__:
            model.forward = Forward(model, cache)
    return any(is_replaced(model) for model in models)


def is_replaced(module: nn.Module) -> bool:
    """Whether CUDA graphs replay this module's forward."""
    return isinstance(module.__dict__.get("forward"), Forward)
