"""What a training step does with gradients: its learning rate, AdamW, the average of the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

DECAYS = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: optimizer steps of the whole run.
        learning_rate: the highest; it rises over `warmup_steps`, then follows `decay`.
        weight_decay: AdamW's, on matrices and convolutions only.
        max_grad_norm: gradients are scaled down to this norm.
        ema_decay: of the averaged weights; 0 keeps no average.
        decay: "cosine" or "linear" fall to 0 at the end of the run, "constant" stays.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    decay: str = "cosine"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, expected at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: got {self.ema_decay}, expected a number in [0, 1)")
        if self.decay not in DECAYS:
            raise ValueError(f"decay: got {self.decay!r}, expected one of {', '.join(DECAYS)}")

    def rate(self, step: int) -> float:
        """The learning rate of step 0 … steps-1."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        done = step / self.steps
        decay = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
        return self.learning_rate * warmup * decay[self.decay]


class EMA:
    """Exponential moving average of what is trained, θ' <- d θ' + (1-d) θ.

    d = min(decay, (1+n) / (10+n)) after n updates, so that the first, bad parameters are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {name: p.detach().clone() for name, p in _trained(module)}

    def update(self, module: nn.Module) -> None:
        """Take the parameters of `module` into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [p.detach() for _, p in _trained(module)]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Give `module` the averaged parameters."""
        for name, parameter in _trained(module):
            parameter.copy_(self.average[name])

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Within, `module` has the averaged parameters; afterwards its own, bit for bit."""
        own = {name: p.detach().clone() for name, p in _trained(module)}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in _trained(module):
                    parameter.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint."""
        self.updates = state["updates"]
        for name, tensor in self.average.items():
            tensor.copy_(state["average"][name])


def adamw(module: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) on the parameters of `module` that ask for gradients.

    Its moments are there from the start, as zeros, so that a checkpoint can be read into them.
    """
    parameters = [p for _, p in _trained(module)]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.99))
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of `module` that training changes: all but frozen parameters."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
