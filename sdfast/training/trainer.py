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
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdfast.training.distributed import ALONE, Processes, restarts
from sdfast.training.optimizer import EMA, Schedule, adamw, trained_state
from sdfast.training.run_folder import RunFolder

__all__ = [
    "EMA", "Schedule", "Step", "TrainingInterrupted", "seeded", "step_generator", "train", "train_steps",
]  # fmt: skip

# Draws whatever the step needs from the generator it is given, and nothing from the global one.
Loss = Callable[[torch.Generator], Tensor]
StepLoss = Callable[[int], Tensor | Iterable[Tensor]]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C: the state is saved, and the text says how to go on. The process should end with status 130."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that was just taken, for whoever watches.

    Attributes:
        number: how many are done.
        loss: of this one, over all processes.
        learning_rate: that it was taken with.
        averaged: () -> a context in which the module has its averaged weights, if there is an average.
    """

    number: int
    loss: float
    learning_rate: float
    averaged: Callable[[], contextlib.AbstractContextManager[None]]


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
        resume: False deletes the checkpoints in `folder` and starts anew; a job that torchrun has restarted
            goes on.
        checkpoint_seconds: a checkpoint is written when the last one is this old, and at the end.
        checkpoint_steps: also whenever so many steps are done.
        progress: show a bar with loss, steps per second and time left.

    Returns:
        `module`, in eval mode.

    Raises:
        ValueError: `folder` holds checkpoints of other settings.
        TrainingInterrupted: Ctrl-C; a checkpoint was written.
        FloatingPointError: the loss or its gradient is no longer finite.
    """
    run = RunFolder(folder, {**settings, "schedule": dataclasses.asdict(schedule), "seed": seed})
    return train_steps(
        module,
        lambda step: loss(step_generator(seed, step)),
        schedule,
        run=run,
        title=title,
        resume=resume,
        checkpoint_seconds=checkpoint_seconds,
        checkpoint_steps=checkpoint_steps,
        progress=progress,
    )


def train_steps(
    module: nn.Module,
    losses: StepLoss,
    schedule: Schedule,
    *,
    run: RunFolder,
    processes: Processes = ALONE,
    title: str = "training",
    resume: bool = True,
    checkpoint_seconds: float = 30.0,
    checkpoint_steps: int | None = None,
    progress: bool = True,
    on_step: Callable[[Step], None] | None = None,
) -> nn.Module:
    """`train`, with what several processes, accumulated gradients and onlookers need.

    Args:
        module: what is trained, in place: its parameters that ask for gradients.
        losses: number of the step -> its loss on this process, or micro-batches' losses that sum to it, each
            of which is differentiated before the next one is asked for.
        run: where checkpoints go.
        processes: who takes part; gradients are averaged by whatever `losses` calls.
        on_step: called after every step, on every process.

    Raises:
        ValueError, TrainingInterrupted, FloatingPointError: as `train`.
        OSError: the last checkpoint could not be written.
    """
    # torchrun repeats the command when a process died, and what the job itself has saved is to stay. Machines
    # count restarts each for itself.
    (repeated,) = processes.sum(restarts())
    if not resume and not repeated:
        processes.main_first(run.clear)
    module.train()
    optimizer = adamw(module, schedule)
    ema = EMA(module, schedule.ema_decay) if schedule.ema_decay else None
    step, seconds_before, began = 0, 0.0, time.monotonic()

    def state() -> dict[str, Any]:
        parts: dict[str, Any] = {"module": trained_state(module), "optimizer": optimizer.state_dict()}
        if ema is not None:
            parts["ema"] = ema.state_dict()
        return parts | {"seconds": seconds_before + time.monotonic() - began}

    checkpoint = run.latest(into=state())
    if checkpoint is not None:
        step, seconds_before = checkpoint["step"], checkpoint["seconds"]
        _load(module, checkpoint["module"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if ema is not None:
            ema.load_state_dict(checkpoint["ema"])

    def averaged() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if ema is None else ema.applied(module)

    saved_at = time.monotonic()
    shown: float | None = None
    with _interrupts_deferred() as interrupted, _bar(title, schedule.steps, step, progress) as bar:
        while step < schedule.steps:
            _set_rate(optimizer, schedule.rate(step))
            optimizer.zero_grad(set_to_none=True)
            local = _differentiate(losses(step))
            # One message for all that the processes have to agree on.
            due = time.monotonic() - saved_at >= checkpoint_seconds
            total, stops, dues = processes.sum(local, interrupted(), due)
            value = total / processes.world
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}; try a lower learning rate")
            norm = _whole(nn.utils.clip_grad_norm_(module.parameters(), schedule.max_grad_norm))
            if not math.isfinite(norm):  # the weights would follow, and then the checkpoints
                raise FloatingPointError(
                    f"the gradient's norm is {norm} at step {step}; try a lower learning rate"
                )
            optimizer.step()
            if ema is not None:
                ema.update(module)
            step += 1
            shown = value if shown is None else shown + (value - shown) / 50  # the loss of one step is noisy
            bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
            bar.update()
            if on_step is not None:
                on_step(Step(step, value, schedule.rate(step - 1), averaged))
            last = bool(stops) or step == schedule.steps
            if last or dues or (checkpoint_steps is not None and step % checkpoint_steps == 0):
                _save(run, step, state(), last=last, tell=processes.is_main)
                saved_at = time.monotonic()
            if stops:
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


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, the CPU's global generator starts from `seed`; afterwards no generator is another one."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed is for every GPU, too
        yield


def _differentiate(losses: Tensor | Iterable[Tensor]) -> float:
    """Accumulate the gradients of one loss or of several; returns their sum."""
    total = 0.0
    for value in [losses] if isinstance(losses, Tensor) else losses:
        value.backward()
        total += float(value.detach())
    return total


def _whole(norm: Tensor) -> float:
    """A norm; that of shards is put together, which every process has to call."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """What was trained; frozen parameters are in no checkpoint."""
    expected = trained_state(module).keys()
    if expected != state.keys():
        raise ValueError(f"checkpoint: has other tensors than this model: {sorted(expected ^ state.keys())}")
    module.load_state_dict(state, strict=False)


def _save(run: RunFolder, step: int, state: Mapping[str, Any], *, last: bool, tell: bool) -> None:
    """Write a checkpoint. Where the disk refuses it, training goes on and tries again, but not at the end."""
    try:
        run.save(step, state)
    except OSError as error:
        text = (
            f"{run.folder}: the checkpoint of step {step} could not be written ({error}); the one before it,"
            " if any, is whole. Make room on the disk"
        )
        if last:
            raise OSError(f"{text}, and run the same command again to go on from there") from error
        if tell:
            warnings.warn(f"{text}; training goes on and tries again")


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
