"""diffusion_step, add_noise and reparameterize against the same formulas in eager torch, fp32 and bf16.

    python benchmarks/bench_diffusion_step.py [--output FILE] [--rounds N] [--threads N]
    pytest benchmarks/bench_diffusion_step.py

Eager is the operation's own composite: torch has no such functions. The step that draws its noise is beside
torch.randn and the composite; each draws numbers of its own. Every result is checked against fp64 before
it is timed. Both take turns in one process, and with them a copy of the sample (`of_copy`).
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import sdfast.ops as ops
from sdfast.testing import assert_within_budget, copy_gb_per_s

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from _beside_eager import measure_beside_eager  # noqa: E402
from _record import results_path, table, write_json  # noqa: E402

# (N, C, H, W): latents of one picture of 512x512 and of 1024x1024, and of batches.
SHAPES = ((1, 4, 64, 64), (1, 4, 128, 128), (8, 4, 64, 64), (16, 4, 128, 128))
COEFFICIENTS = torch.tensor([1.3, -0.8, 0.6, 0.35, 0.2, -0.15, 0.5], dtype=torch.float64)

Results = Sequence[Tensor]
Work = Callable[[Sequence[Tensor], "str | None"], Results]


def guided_step(t: Sequence[Tensor], backend: str | None) -> Results:
    """DDIM: no noise, no previous x0."""
    return ops.diffusion_step(t[0], t[1], COEFFICIENTS, guidance_scale=7.5, backend=backend)


def full_step(t: Sequence[Tensor], backend: str | None) -> Results:
    """Every term there is."""
    return ops.diffusion_step(
        t[0], t[1], COEFFICIENTS, guidance_scale=7.5, noise=t[2], previous_x0=t[3], clip=1.0, backend=backend
    )


def drawn_step(t: Sequence[Tensor], backend: str | None) -> Results:
    """Ancestral sampling: fresh noise, drawn in the same pass."""
    seeds = torch.arange(len(t[0]))
    return ops.diffusion_step(
        t[0], t[1], COEFFICIENTS, guidance_scale=7.5, seeds=seeds, step=3, backend=backend
    )


def step_of_randn(t: Sequence[Tensor]) -> Results:
    noise = torch.randn(t[0].shape, dtype=t[0].dtype)
    return ops.diffusion_step(t[0], t[1], COEFFICIENTS, guidance_scale=7.5, noise=noise, backend="torch")


def noised(t: Sequence[Tensor], backend: str | None) -> Results:
    level = torch.linspace(0.1, 0.9, len(t[0]))
    return ops.add_noise(t[0], t[2], level, level, backend=backend)[:1]


def noised_with_velocity(t: Sequence[Tensor], backend: str | None) -> Results:
    level = torch.linspace(0.1, 0.9, len(t[0]))
    return ops.add_noise(t[0], t[2], level, level, prediction="v_prediction", backend=backend)


def reparameterized(t: Sequence[Tensor], backend: str | None) -> Results:
    return [ops.reparameterize(t[0], t[3], t[2], backend=backend)]


def reparameterized_with_gradients(t: Sequence[Tensor], backend: str | None) -> Results:
    leaves = t[0].detach().requires_grad_(), t[3].detach().requires_grad_()
    z = ops.reparameterize(*leaves, t[2], backend=backend)
    return [z, *torch.autograd.grad(z, leaves, t[2])]


# What is done, how often it reads or writes as much as the sample holds, and whether it takes gradients.
WORKS: dict[str, tuple[Work, int, bool]] = {
    "guided step": (guided_step, 5, False),
    "guided step, every term": (full_step, 7, False),
    "guided step, noise drawn": (drawn_step, 5, False),
    "add_noise": (noised, 3, False),
    "add_noise, velocity": (noised_with_velocity, 4, False),
    "reparameterize": (reparameterized, 4, False),
    "reparameterize, gradients": (reparameterized_with_gradients, 8, True),
}
# What eager would do instead, where that is not the composite.
EAGER: dict[Work, Callable[[Sequence[Tensor]], Results]] = {drawn_step: step_of_randn}


def make_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """The sample, a guided model output, noise, and another sample."""
    torch.manual_seed(0)
    leading = (1, 2, 1, 1)
    return [torch.randn(n * shape[0], *shape[1:]).to(dtype) for n in leading]


def check(work: Work, tensors: Sequence[Tensor]) -> None:
    exact = work([t.double() for t in tensors], "torch")
    for actual, eager, right in zip(work(tensors, None), work(tensors, "torch"), exact, strict=True):
        assert_within_budget(actual, eager, right)


def measure(name: str, shape: tuple[int, ...], dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """Check and time one setting."""
    work, passes, training = WORKS[name]
    tensors = make_tensors(shape, dtype)
    check(work, tensors)
    eager = EAGER.get(work, lambda tensors: work(tensors, "torch"))
    times = measure_beside_eager(
        lambda: eager(tensors), lambda: work(tensors, None),
        like=tensors[0], passes=passes, rounds=rounds, training=training,
    )  # fmt: skip
    return {
        "work": name, "shape": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch."), **times,
    }  # fmt: skip


COLUMNS = {
    "work": "", "shape": "", "dtype": "", "eager_ms": ".3f", "sdfast_ms": ".3f", "sdfast_p20_ms": ".3f",
    "sdfast_p80_ms": ".3f", "ratio": ".2f", "ratio_p20": ".2f", "gb_per_s": ".1f", "of_copy": ".0%",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=results_path("diffusion_step"))
    parser.add_argument(
        "--rounds", type=int, default=30, help="of a setting of 64 MiB; smaller ones take more"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bandwidth = copy_gb_per_s(2**27)
    print(f"{options.threads} threads, copy {bandwidth:.1f} GB/s (128 MiB)")
    rows = [
        measure(name, shape, dtype, options.rounds)
        for name in WORKS
        for dtype in (torch.float32, torch.bfloat16)
        for shape in SHAPES
    ]
    print(table(rows, COLUMNS))
    write_json(options.output, rows, copy_gb_per_s=bandwidth)
    print(f"\nwritten to {options.output}")


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WORKS)
def test_diffusion_step(
    benchmark: Callable[..., object], name: str, dtype: torch.dtype, backend: str
) -> None:
    work, _, training = WORKS[name]
    tensors = make_tensors(SHAPES[1], dtype)
    check(work, tensors)
    eager = EAGER.get(work) if backend == "torch" else None
    with torch.set_grad_enabled(training):
        benchmark(lambda: eager(tensors) if eager else work(tensors, backend))


if __name__ == "__main__":
    main()
