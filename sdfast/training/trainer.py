"""A training loop that can be killed at any moment and goes on where it was.

    for each step k: randomness <- (seed, k);  AdamW on the gradient of loss(randomness);  EMA

Everything random in step k is drawn from a generator seeded with (seed, k), and the learning rate is a
function of k. So parameters, their average, optimizer moments and k are the whole state: a resumed run equals
an uninterrupted one bit for bit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdfast.training.run_folder import RunFolder

# Draws whatever the step needs from the generator it is given, and nothing from the global one.
Loss = Callable[[torch.Generator], Tensor]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C: the state is saved, and the text says how to go on. The process should end with status 130."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: optimizer steps of the whole run.
        learning_rate: the highest; it rises over `warmup_steps`, then falls to 0 along a cosine.
        weight_decay: AdamW's, on matrices and convolutions only.
        max_grad_norm: gradients are scaled down to this norm.
        ema_decay: of the averaged weights; 0 keeps no average.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, expected at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: got {self.ema_decay}, expected a number in [0, 1)")

    def rate(self, step: int) -> float:
        """The learning rate of step 0 … steps-1."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return self.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class EMA:
    """Exponential moving average of parameters, θ' <- d θ' + (1-d) θ.

    d = min(decay, (1+n) / (10+n)) after n updates, so that the first, bad parameters are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}

    def update(self, module: nn.Module) -> None:
        """Take the parameters of `module` into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Give `module` the averaged parameters."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.average[name])

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint."""
        self.updates = state["updates"]
        for name, tensor in self.average.items():
            tensor.copy_(state["average"][name])


def train(
    module: nn.Module,
    loss: Loss,
    schedule: Schedule,
    *,
    folder: str | Path,
    settings: Mapping[str, Any],
    seed: int,
    title: str = "training",
    resume: bool = True,
    checkpoint_seconds: float = 30.0,
    checkpoint_steps: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """Minimise `loss` over the parameters of `module`, resuming from `folder` if there is something.

    Args:
        module: what is trained, in place. With an EMA it holds the average at the end.
        loss: generator -> scalar.
        schedule: how long and how fast.
        folder: where checkpoints go.
        settings: JSON values that tell this run from another. Checkpoints of other settings are refused.
        seed: of the run's randomness.
        title: heads the progress bar.
        resume: False deletes the checkpoints in `folder` and starts anew.
        checkpoint_seconds: a checkpoint is written when the last one is this old, and at the end.
        checkpoint_steps: also whenever so many steps are done.
        progress: show a bar with loss, steps per second and time left.

    Returns:
        `module`, in eval mode.

    Raises:
        ValueError: `folder` holds checkpoints of other settings.
        TrainingInterrupted: Ctrl-C; a checkpoint was written.
        FloatingPointError: the loss is no longer finite.
    """
    run = RunFolder(folder, {**settings, "schedule": dataclasses.asdict(schedule), "seed": seed})
    if not resume:
        run.clear()
    module.train()
    optimizer = _optimizer(module, schedule)
    ema = EMA(module, schedule.ema_decay) if schedule.ema_decay else None
    step, seconds_before, began = 0, 0.0, time.monotonic()
    checkpoint = run.latest()
    if checkpoint is not None:
        step, seconds_before = checkpoint["step"], checkpoint["seconds"]
        module.load_state_dict(checkpoint["module"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if ema is not None:
            ema.load_state_dict(checkpoint["ema"])

    def save() -> None:
        state: dict[str, Any] = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
        state["seconds"] = seconds_before + time.monotonic() - began
        if ema is not None:
            state["ema"] = ema.state_dict()
        run.save(step, state)

    saved_at = time.monotonic()
    shown: float | None = None
    with _interrupts_deferred() as interrupted, _bar(title, schedule.steps, step, progress) as bar:
        while step < schedule.steps:
            value = _step(module, loss, optimizer, schedule, seed, step)
            shown = value if shown is None else shown + (value - shown) / 50  # the loss of one step is noisy
            bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
            if ema is not None:
                ema.update(module)
            step += 1
            bar.update()
            due = time.monotonic() - saved_at >= checkpoint_seconds
            due |= checkpoint_steps is not None and step % checkpoint_steps == 0
            if due or interrupted() or step == schedule.steps:
                save()
                saved_at = time.monotonic()
            if interrupted():
                raise TrainingInterrupted(
                    f"{title} stopped at step {step} of {schedule.steps}; nothing is lost. Run the same"
                    f" command again to go on (checkpoints are in {run.folder})."
                )
    if ema is not None:
        ema.copy_to(module)
    return module.eval()


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of everything random in one step."""
    # SeedSequence mixes the pair; torch's CPU generator itself would look at 32 bits of a plain sum.
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def _step(
    module: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, schedule: Schedule, seed: int, step: int
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step)
    optimizer.zero_grad(set_to_none=True)
    value = loss(step_generator(seed, step))
    number = float(value.detach())
    if not math.isfinite(number):
        raise FloatingPointError(f"the loss is {number} at step {step}; try a lower learning rate")
    value.backward()
    nn.utils.clip_grad_norm_(module.parameters(), schedule.max_grad_norm)
    optimizer.step()
    return number


def _optimizer(module: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.99))


def _bar(title: str, steps: int, done: int, progress: bool) -> tqdm:
    # In a log file every refresh is a line of its own.
    interval = 0.2 if sys.stderr.isatty() else 20.0
    return tqdm(
        total=steps, initial=done, desc=title, unit="step", disable=not progress, mininterval=interval
    )


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C only makes the yielded function answer True; a second interrupts at once."""
    asked = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return

    def note(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)
