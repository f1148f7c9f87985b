"""Where the time of one step goes, by operation: Stable Diffusion 1.5's U-Net and VAE decoder in sdfast.

    python benchmarks/bench_profile.py [--work unet vae] [--dtype float32 bfloat16] [--tiny]

torch.profiler over one call of a model that has run before. Arithmetic is that of the direct algorithms, two a
multiplication: Winograd and the folded upsample need less, so their rate is an effective one and may exceed the
peak. "other" is every operation below a percent, "outside" what the call took beyond its operations.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence

import torch
from _models import TINY_WORKS, WORKS, Work
from _record import results_path, table, write_json
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sdfast import ops
from sdfast.memory import keep_freed_memory
from sdfast.testing import peak_gflop_per_s

Shape = Sequence[int]


def _linear_flops(
    x: Shape, packed: Shape, bias: Shape | None, residual: Shape | None, weight_rows: int, *_: object, **__: object
) -> int:
    return 2 * math.prod(x) * weight_rows


def _conv2d_flops(
    x: Shape, packed: Shape, bias: Shape | None, time_embedding: Shape | None, residual: Shape | None,
    algorithm: int, out_channels: int, kernel_height: int, kernel_width: int, *_: object,
    out_shape: Shape, **__: object,
) -> int:  # fmt: skip
    return 2 * math.prod(out_shape) * x[1] * kernel_height * kernel_width


def _attention_flops(q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    return 4 * math.prod(q) * k[-2]


FLOPS: dict[str, Callable[..., int]] = {
    "linear_packed": _linear_flops,
    "conv2d_packed": _conv2d_flops,
    "attention_forward": _attention_flops,
}


def flops_by_operation(step: Callable[[], object]) -> dict[str, int]:
    """Of our kernels and of torch's, by the profiler's names."""
    counter = FlopCounterMode(
        display=False, custom_mapping={getattr(torch.ops.sdfast, name): f for name, f in FLOPS.items()}
    )
    with counter:
        step()
    return {str(op).replace(".", "::"): flops for op, flops in counter.get_flop_counts()["Global"].items()}
