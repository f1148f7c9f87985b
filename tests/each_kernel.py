"""Runs every Triton kernel at small, odd sizes: for compute-sanitizer, and to see that none is forgotten.

    compute-sanitizer --tool memcheck python tests/each_kernel.py [group_norm ...]

Fails where a kernel that could be launched was not, or an operation has no call here. An operation that has no
Triton kernel yet is named.
Without a GPU the kernels run in the interpreter, if TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sdfast import _library, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Calls = Iterator[Callable[[], object]]


def randn(*shape: int, channels_last: bool = False) -> Tensor:
    x = torch.randn(shape).to(DEVICE, torch.float16)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def with_gradients(call: Callable[..., Any], *tensors: Tensor | None) -> Callable[[], object]:
    """The call without and with gradients, and these."""

    def run() -> None:
        with torch.no_grad():
            call(*tensors)
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        y = call(*leaves)
        y.backward(torch.ones_like(y))

    return run


def linear() -> Calls:
    x, weight, bias = randn(50, 77), randn(34, 77), randn(34)
    for activation in (None, "silu", "gelu", "quick_gelu", "geglu"):
        yield with_gradients(
            lambda x, w, b, activation=activation: ops.linear(x, w, b, activation=activation, backend="triton"),
            x, weight, bias,
        )  # fmt: skip
    long, short = randn(40, 1600), randn(3, 2100)  # K is split
    yield with_gradients(lambda x, w: ops.linear(x, w, backend="triton"), long, randn(32, 1600))
    yield lambda: ops.linear(short, randn(64, 2100), residual=randn(3, 64), backend="triton")
    yield lambda: torch.ops.sdfast.sum_rows_triton(randn(1, 700, 33))


def group_norm() -> Calls:
    def normed(
        x: Tensor, w: Tensor, b: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        return ops.group_norm(x, 4, w, b, activation="silu", scale=scale, shift=shift, backend="triton")

    for channels_last in (False, True):
        for size in (5, 64):  # one pass, and two
            x = randn(2, 20, size, size, channels_last=channels_last)
            yield with_gradients(normed, x, randn(20), randn(20))
    yield with_gradients(normed, randn(2, 20, 5, 5), randn(20), randn(20), randn(2, 20), randn(2, 20))
    more: list[dict[str, Any]] = []
    if _library.has_kernel("group_norm_pair", "triton"):
        more.append({"skip": randn(2, 12, 5, 5, channels_last=True)})
    if _library.has_kernel("group_norm_apply", "triton"):
        more.append({"statistics": (torch.zeros(2, 4, device=DEVICE), torch.ones(2, 4, device=DEVICE))})
    for operand in more:
        x = randn(2, 20, 5, 5, channels_last=True)
        yield lambda x=x, operand=operand: ops.group_norm(x, 4, **operand, backend="triton")


def layer_norm() -> Calls:
    for rows, c in ((33, 77), (33, 320), (2, 8193)):  # the last in strips
        yield with_gradients(
            lambda x, w, b, c=c: ops.layer_norm(x, (c,), w, b, backend="triton"),
            randn(rows, c),
            randn(c),
            randn(c),
        )


def attention() -> Calls:
    for heads, queries, keys, dim, causal in (
        (2, 33, 17, 40, False),
        (1, 20, 20, 64, True),
        (1, 9, 70, 160, False),
        (1, 5, 600, 40, False),  # keys are split
        (1, 600, 5, 40, False),  # queries are, for the gradients of few keys
    ):
        yield with_gradients(
            lambda q, k, v, causal=causal: ops.attention(q, k, v, is_causal=causal, backend="triton"),
            randn(1, heads, queries, dim), randn(1, heads, keys, dim), randn(1, heads, keys, dim),
        )  # fmt: skip
    yield lambda: ops.attention(*(randn(1, 1, 18, 512) for _ in range(3)), backend="triton")


def conv2d() -> Calls:
    def convolved(stride: int, padding: int, upsample: bool = False) -> Callable[..., Any]:
        return lambda x, w, b: ops.conv2d(x, w, b, stride, padding, upsample=upsample, backend="triton")

    x = randn(2, 17, 9, 7, channels_last=True)
    for kernel, stride, upsample in ((3, 1, False), (3, 2, False), (1, 1, False), (3, 1, True)):
        weight = randn(20, 17, kernel, kernel)
        yield with_gradients(convolved(stride, kernel // 2, upsample), x, weight, randn(20))
    many = randn(1, 5, 33, 34, channels_last=True)  # pixels are split, for the weight's gradient
    yield with_gradients(convolved(1, 1), many, randn(20, 5, 3, 3), randn(20))
    deep, wide = randn(1, 256, 4, 4, channels_last=True), randn(32, 256, 3, 3)  # C is split
    yield with_gradients(convolved(1, 1), deep, wide, randn(32))
    yield lambda: ops.conv2d(deep, wide, None, 1, 1, stats_groups=4, backend="triton")


def diffusion_step() -> Calls:
    x, m = randn(2, 4, 9, 7), randn(4, 4, 9, 7)
    k = torch.linspace(0.1, 0.7, 7, dtype=torch.float64)
    more = {"guidance_scale": 2.0, "previous_x0": x, "clip": 1.0, "backend": "triton"}
    yield lambda: ops.diffusion_step(x, m, k, noise=x, **more)
    seeds = torch.tensor([3, 5])
    for latent, output in ((x, m), (t.to(memory_format=torch.channels_last) for t in (x, m))):
        yield lambda x=latent, m=output: ops.diffusion_step(
            x, m, k, seeds=seeds, step=3, **{**more, "previous_x0": x}
        )


def diffusion_step_from_table() -> Calls:
    x, m = randn(2, 4, 9, 7), randn(4, 4, 9, 7)
    table = torch.linspace(0.1, 0.7, 21, dtype=torch.float64, device=DEVICE).view(3, 7)
    ones, counter = torch.ones(3, device=DEVICE), torch.ones((), dtype=torch.int64, device=DEVICE)
    seeds = torch.tensor([3, 5], device=DEVICE)
    yield lambda: ops.diffusion_step_from_table(
        x, m, table, ones, counter, guidance_scale=2 * ones, previous_x0=x, seeds=seeds, backend="triton"
    )
    noise = torch.stack([x] * 3)
    yield lambda: ops.diffusion_step_from_table(x, x, table, ones, counter, noise=noise, backend="triton")


def add_noise() -> Calls:
    x, level = randn(2, 4, 9, 7), torch.full((2,), 0.5, device=DEVICE)
    for prediction in ("epsilon", "v_prediction"):
        yield lambda p=prediction: ops.add_noise(x, x, level, level, prediction=p, backend="triton")


def reparameterize() -> Calls:
    x = randn(2, 4, 9, 7)
    yield with_gradients(lambda m, v: ops.reparameterize(m, v, x, backend="triton"), x, x)


# Each with the operation whose kernel it cannot do without.
CALLS: dict[str, tuple[str, Callable[[], Calls]]] = {
    "linear": ("linear_rows", linear), "group_norm": ("group_norm_forward", group_norm),
    "layer_norm": ("layer_norm_forward", layer_norm), "attention": ("attention_forward", attention),
    "conv2d": ("conv2d_kernel", conv2d), "diffusion_step": ("diffusion_step", diffusion_step),
    "diffusion_step_from_table": ("diffusion_step_from_table", diffusion_step_from_table),
    "add_noise": ("add_noise", add_noise), "reparameterize": ("reparameterize", reparameterize),
}  # fmt: skip


class Met(TorchDispatchMode):
    """Keeps the names of the Triton operations that run, and whether each gave finite numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "sdfast" and func._schema.name.endswith("_triton"):
            name = func._schema.name.removeprefix("sdfast::").removesuffix("_triton")
            self.names.add(name)
            for t in pytree.tree_leaves(result):
                if isinstance(t, Tensor) and not t.isfinite().all():
                    raise AssertionError(f"{name}: a result is not finite")
        return result


def kernels() -> dict[str, Any]:
    """Every `triton.jit` function of the operations' modules that no other calls, by module and name."""
    names = [module.name for module in pkgutil.iter_modules(ops.__path__) if module.name.endswith("_triton")]
    modules = [vars(importlib.import_module(f"{ops.__name__}.{name}")) for name in names]
    functions = {
        name_of(f): f for module in modules for f in module.values() if isinstance(f, triton.KernelInterface)
    }
    mentioned = [f.fn.__globals__.get(name) for f in functions.values() for name in f.fn.__code__.co_names]
    called = {id(f) for f in mentioned}
    return {name: f for name, f in functions.items() if id(f) not in called}


def name_of(kernel: Any) -> str:
    return f"{kernel.fn.__module__.removeprefix('sdfast.ops.')}.{kernel.fn.__name__}"


@contextlib.contextmanager
def launched() -> Iterator[set[str]]:
    """Keeps the names of the kernels that run."""
    met: set[str] = set()
    (kind,) = {type(kernel) for kernel in kernels().values()}  # compiled, or interpreted
    run = kind.run

    def noted(kernel: Any, *arguments: Any, **keywords: Any) -> Any:
        met.add(name_of(kernel))
        return run(kernel, *arguments, **keywords)

    with mock.patch.object(kind, "run", noted):
        yield met


def main() -> None:
    """Print what ran; fail with what did not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", default=list(CALLS))
    options = parser.parse_args()
    torch.manual_seed(0)
    met, met_kernels = Met(), set[str]()
    for op in options.ops:
        kernel, calls = CALLS[op]
        if not _library.has_kernel(kernel, "triton"):
            print(f"{op}: no Triton kernel yet", flush=True)
            continue
        with met, launched() as ran:
            for call in calls():
                call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        met_kernels |= ran
        print(f"{op}: ran", flush=True)
    forgotten = []
    if options.ops == list(CALLS):
        forgotten = sorted(_library.launchers.keys() - met.names) + sorted(kernels().keys() - met_kernels)
    print(f"{len(met.names)} operations and {len(met_kernels)} kernels ran")
    if forgotten:
        sys.exit(f"no call here runs {', '.join(forgotten)}")


if __name__ == "__main__":
    main()
