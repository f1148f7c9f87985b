"""Calls of the diffusion operations at real sizes and of size 1, for recording and compiling their kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OPS = torch.ops.sdfast


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


def _step(size: int, channels_last: bool = False, drawn: bool = False, channels: int = 4) -> object:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, m = empty(1, channels, size, size), empty(2, channels, size, size)
    x, m = x.to(memory_format=layout), m.to(memory_format=layout)
    seeds = empty(1, dtype=torch.int64) if drawn else None
    k = empty(7, dtype=torch.float64)
    return OPS.diffusion_step_triton(
        x, m, k, guidance_scale=7.5, previous_x0=x, noise=None if drawn else x, clip=1.0, seeds=seeds, step=3
    )


def _table_step(
    size: int, steps: int = 64, channels_last: bool = False, drawn: bool = False, channels: int = 4
) -> object:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, m = empty(1, channels, size, size), empty(2, channels, size, size)
    x, m = x.to(memory_format=layout), m.to(memory_format=layout)
    k, scale = empty(steps, 7, dtype=torch.float64), empty(steps, dtype=torch.float64)
    return OPS.diffusion_step_from_table_triton(
        x, m, k, scale, empty(dtype=torch.int64), guidance_scale=scale, previous_x0=x, clip=1.0,
        seeds=empty(1, dtype=torch.int64) if drawn else None,
        noise=empty(1, 1, 4, size, size) if steps == 1 else None,  # of a longer table one row is read
    )  # fmt: skip


def _noised(name: str, *shape: int) -> object:
    x, level = empty(*shape), empty(shape[0], dtype=torch.float32)
    return getattr(OPS, name)(x, x, level, level)


def _sampled(name: str, *shape: int) -> object:
    x = empty(*shape, dtype=torch.float32)
    return getattr(OPS, name)(x, x, x)


def code_cases() -> dict[str, Callable[[], object]]:
    return {
        "diffusion_step, 512": lambda: _step(64),
        "diffusion_step, 512, drawn": lambda: _step(64, drawn=True),
        "diffusion_step, 1024, channels_last, drawn": lambda: _step(128, True, True),
        "diffusion_step_from_table, 512": lambda: _table_step(64),
        "diffusion_step_from_table, 512, noise": lambda: _table_step(64, steps=1),
        "diffusion_step_from_table, 512, 30 steps, drawn": lambda: _table_step(64, steps=30, drawn=True),
        "diffusion_step_from_table, 1024, channels_last, drawn": lambda: _table_step(128, 64, True, True),
        "diffusion_step, of one": lambda: _step(1, channels=1),
        "diffusion_step, of one, drawn": lambda: _step(1, drawn=True, channels=1),
        "diffusion_step_from_table, of one": lambda: _table_step(1, 1, channels=1),
        "diffusion_step_from_table, of one, drawn": lambda: _table_step(1, 1, drawn=True, channels=1),
        "add_noise, of one": lambda: _noised("add_noise_triton", 1, 1, 1, 1),
        "reparameterize, of one": lambda: _sampled("reparameterize_triton", 1, 1, 1, 1),
        "add_noise": lambda: _noised("add_noise_triton", 8, 4, 64, 64),
        "add_noise_velocity": lambda: _noised("add_noise_velocity_triton", 8, 4, 64, 64),
        "reparameterize": lambda: _sampled("reparameterize_triton", 8, 4, 64, 64),
        "reparameterize_backward": lambda: _sampled("reparameterize_backward_triton", 8, 4, 64, 64),
    }
