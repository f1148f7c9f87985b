"""Calls of the diffusion operations at real sizes, for recording and compiling their kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OPS = torch.ops.sdfast


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


def _step(size: int, channels_last: bool = False, drawn: bool = False) -> object:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, m = empty(1, 4, size, size), empty(2, 4, size, size)
    x, m = x.to(memory_format=layout), m.to(memory_format=layout)
    seeds = empty(1, dtype=torch.int64) if drawn else None
    k = empty(7, dtype=torch.float64)
    return OPS.diffusion_step_triton(
        x, m, k, guidance_scale=7.5, previous_x0=x, noise=None if drawn else x, clip=1.0, seeds=seeds, step=3
    )


def _table_step(size: int, steps: int = 64, channels_last: bool = False, drawn: bool = False) -> object:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, m = empty(1, 4, size, size), empty(2, 4, size, size)
    x, m = x.to(memory_format=layout), m.to(memory_format=layout)
    k, scale = empty(steps, 7, dtype=torch.float64), empty(steps, dtype=torch.float64)
    return OPS.diffusion_step_from_table_triton(
        x, m, k, scale, empty(dtype=torch.int64), guidance_scale=scale, previous_x0=x, clip=1.0,
        seeds=empty(1, dtype=torch.int64) if drawn else None,
        noise=empty(1, 1, 4, size, size) if steps == 1 else None,  # of a longer table one row is read
    )  # fmt: skip


def _noised(name: str) -> object:
    x, level = empty(8, 4, 64, 64), empty(8, dtype=torch.float32)
    return getattr(OPS, name)(x, x, level, level)


def _sampled(name: str) -> object:
    x = empty(8, 4, 64, 64, dtype=torch.float32)
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
        "add_noise": lambda: _noised("add_noise_triton"),
        "add_noise_velocity": lambda: _noised("add_noise_velocity_triton"),
        "reparameterize": lambda: _sampled("reparameterize_triton"),
        "reparameterize_backward": lambda: _sampled("reparameterize_backward_triton"),
    }
