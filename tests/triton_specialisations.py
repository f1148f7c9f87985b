"""How many kernels calls of several resolutions and batches would compile, as Triton tells them apart.

    python tests/triton_specialisations.py

prints, by operation and kernel, how often one with the same constants and options is compiled: JSON. Needs a
process without TRITON_INTERPRET.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.runtime.jit import MockTensor
from triton_code import _Driver, record

from sdfast.ops._triton import Launch

# images, height, width: odd ones, one that 16 divides, one pixel
_SIZES = ((1, 32, 32), (2, 33, 34), (3, 17, 23), (1, 8, 8), (5, 40, 24), (1, 1, 1), (16, 64, 64))


def specialisation(launch: Launch) -> tuple[str, str, str]:
    """Kernel, constants and options, and what else Triton compiles another kernel for."""
    arguments = [MockTensor(a.dtype, a.shape) if isinstance(a, Tensor) else a for a in launch.arguments]
    *_, binder = launch.kernel.device_caches[90]
    _, found, _ = binder(*arguments, **launch.keywords, debug=False)
    named = dict(zip(launch.kernel.arg_names, found, strict=False))
    tensors = [str(a.dtype) if isinstance(a, Tensor) else a and type(a).__name__ for a in launch.arguments]
    kind = json.dumps(
        [launch.keywords, [t for t in tensors if t is None or "torch" in str(t)]], sort_keys=True
    )
    return launch.kernel.fn.__name__, kind, str(sorted(named.items()))


def _linear(images: int, height: int, width: int) -> None:
    x, weight, sdfast = _empty(images * height * width, 320), _empty(640, 320), torch.ops.sdfast
    sdfast.linear_rows_triton(x, weight, None, None, 0)
    sdfast.linear_rows_triton(x, weight, None, None, 4)


def _linear_input_gradient(images: int, height: int, width: int) -> None:
    torch.ops.sdfast.linear_input_gradient_triton(_empty(images * height * width, 640), _empty(640, 320))


def _linear_weight_gradient(images: int, height: int, width: int) -> None:
    tokens, sdfast = images * height * width, torch.ops.sdfast
    sdfast.linear_weight_gradient_triton(_empty(tokens, 640), _empty(tokens, 320))
    sdfast.sum_rows_triton(_empty(1, tokens, 640))


def _attention(images: int, height: int, width: int) -> None:
    sdfast = torch.ops.sdfast

    def heads(rows: int) -> Tensor:
        return _empty(images, rows, 8, 40).transpose(1, 2)

    q = heads(height * width)
    for k in (q, heads(77)):
        sdfast.attention_forward_triton(q, k, k, False, 0.1)
        o, lse = sdfast.attention_with_lse_triton(q, k, k, False, 0.1)
        sdfast.attention_backward_triton(q, q, k, k, o, lse, False, 0.1)


def _image(images: int, height: int, width: int) -> Tensor:
    return _empty(images, height, width, 64).permute(0, 3, 1, 2)


def _conv2d(images: int, height: int, width: int) -> None:
    x, weight, sdfast = _image(images, height, width), _image(64, 3, 3), torch.ops.sdfast
    sdfast.conv2d_kernel_triton(x, weight, None, 1, [1] * 4, False, None, None, None, [], False)
    sdfast.conv2d_statistics_triton(x, weight, None, 1, [1] * 4, False, None, x, None, [], False, 2, 1e-5)


def _conv2d_gradients(images: int, height: int, width: int) -> None:
    x, weight, sdfast = _image(images, height, width), _image(64, 3, 3), torch.ops.sdfast
    sdfast.conv2d_input_gradient_triton(x, weight, height, width, 1, [1] * 4, False)
    sdfast.conv2d_weight_gradient_triton(x, x, 3, 3, 1, [1] * 4, False)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float16, device="cuda")


_CALLS: dict[str, Callable[[int, int, int], None]] = {
    "linear": _linear, "linear's input gradient": _linear_input_gradient,
    "linear's weight gradient": _linear_weight_gradient,
    "attention": _attention, "conv2d": _conv2d, "conv2d's gradients": _conv2d_gradients,
}  # fmt: skip


def main() -> None:
    triton.runtime.driver.set_active(_Driver(90))
    counted: dict[str, dict[str, int]] = {}
    for op, call in _CALLS.items():
        variants: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
        for size in _SIZES:
            for launch in record(lambda call=call, size=size: call(*size)):
                name, kind, more = specialisation(launch)
                variants[name, kind].add(more)
        counted[op] = {f"{name} {kind}": len(found) for (name, kind), found in variants.items()}
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
