"""How many variants of its kernels Triton compiles for calls that differ in images and batches alone.

    python tests/triton_variants.py [group_norm layer_norm]

prints, for each kind of call and each kernel, the variants that the sizes below take. Nothing is compiled: the
launches are recorded, and Triton's own code says what each is specialised for. Needs a process without
TRITON_INTERPRET.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor
from triton.runtime.jit import MockTensor
from triton_code import _Driver, record

from sdfast.ops._triton import Launch

OPS = torch.ops.sdfast
# Images of 8x8 to 144x144 pixels, of sides that 16 divides, that 8 does and that are odd; batches of 1 to 16.
SIDES = ((8, 8), (8, 12), (13, 11), (16, 16), (24, 24), (32, 32), (37, 41), (64, 64), (72, 96), (144, 144))
BATCHES = (1, 2, 3, 8, 16)


def variant(launch: Launch) -> str:
    """What Triton would look a compiled kernel up by."""
    triton.runtime.driver.set_active(_Driver(90))
    arguments = [MockTensor(a.dtype, a.shape) if isinstance(a, Tensor) else a for a in launch.arguments]
    binder = launch.kernel.device_caches[90][-1]
    return str(binder(*arguments, **launch.keywords)[1:])


def _image(batch: int, channels: int, sides: tuple[int, int], last: bool) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(
        (batch, channels, *sides), device="cuda", dtype=torch.float16, memory_format=layout
    )  # fmt: skip


def _group_norm(what: str, channels: int, last: bool, batch: int, sides: tuple[int, int]) -> None:
    x = _image(batch, channels, sides, last)
    weight = torch.empty(channels, device="cuda", dtype=torch.float16)
    scale, shift = torch.empty(batch, 2 * channels, device="cuda", dtype=torch.float16).chunk(2, dim=1)
    mean = torch.empty(batch, 32, device="cuda")
    if what == "forward":
        OPS.group_norm_triton(x, 32, weight, weight, 1e-5, True, scale, shift)
    elif what == "skip":
        weight = torch.empty(2 * channels, device="cuda", dtype=torch.float16)
        OPS.group_norm_pair_triton(x, x, 32, weight, weight, 1e-5, True, None, None)
    elif what == "statistics":
        OPS.group_norm_apply_triton(x, mean, mean, 32, weight, weight, True, None, None)
    else:
        OPS.group_norm_backward_triton(x, x, mean, mean, 32, weight, weight, True, scale, shift)


def _layer_norm(what: str, width: int, batch: int, sides: tuple[int, int]) -> None:
    x = torch.empty(batch * sides[0] * sides[1], width, device="cuda", dtype=torch.float16)
    weight = torch.empty(width, device="cuda", dtype=torch.float16)
    mean = torch.empty(len(x), device="cuda")
    if what == "forward":
        OPS.layer_norm_triton(x, 1, weight, weight, 1e-5)
    else:
        OPS.layer_norm_backward_triton(x, x, mean, mean, 1, weight, weight)


def kinds(op: str) -> Iterator[tuple[str, Callable[[int, tuple[int, int]], None]]]:
    """Kinds of calls by name, each a function of the batch and the image's sides."""
    if op == "group_norm":
        for what, channels, last in itertools.product(
            ("forward", "skip", "statistics", "backward"), (320, 1280), (True, False)
        ):
            layout = "last" if last else "first"
            yield (
                f"{what} {channels} {layout}",
                lambda *size, k=(what, channels, last): _group_norm(*k, *size),
            )
    else:
        for what, width in itertools.product(("forward", "backward"), (320, 1280, 10240)):
            yield f"{what} {width}", lambda *size, k=(what, width): _layer_norm(*k, *size)


def count(call: Callable[[int, tuple[int, int]], None]) -> dict[str, int]:
    """Variants of each kernel over all sizes."""
    found: dict[str, set[str]] = defaultdict(set)
    for size in itertools.product(BATCHES, SIDES):
        for launch in record(lambda size=size: call(*size)):
            found[launch.kernel.__name__].add(variant(launch))
    return {name: len(variants) for name, variants in found.items()}


def main() -> None:
    """Print a line for each kind of call and kernel."""
    for op in sys.argv[1:] or ("group_norm", "layer_norm"):
        for kind, call in kinds(op):
            for kernel, variants in count(call).items():
                print(f"{op} {kind}: {kernel} {variants}")


if __name__ == "__main__":
    main()
