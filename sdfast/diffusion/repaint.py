"""RePaint (Lugmayr et al. 2022, algorithm 1): a model of whole samples completes one that is known in part.

    x' = m · (a reverse step from x) + (1 - m) · (x_0 noised to the level of x'),    m = 1 where it is painted
    and now and then j levels back up, x_t ~ q(x_t | x_{t-1}), r times from the same level

Both parts have the noise of one draw, as in diffusers' `RePaintScheduler`: they are different elements of it,
hence independent. What that scheduler does with η is the sampler's here: `ddpm`, or `ddim` with any eta.
It takes β from one step too high where its steps skip some of the schedule; here a jump reaches its level.
A reverse step does, too, but for some of `ddim`'s, which go down T // n whatever the spacing: past or short
of the next level with "linspace", and with "trailing" where n does not divide T; the last goes to index 0
without `set_alpha_to_one`. What is known gets the next step's level there, or is clean, as in diffusers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from sdfast.diffusion.plan import SamplingPlan
from sdfast.ops import add_noise
from sdfast.ops._checks import check_tensor

DrawNoise = Callable[[Tensor], Tensor]
OnStep = Callable[[int, int, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class RePaint:
    """A plan with its resampling.

    Attributes:
        base: the plan, n steps of it.
        jump_length: j, how many levels a jump goes back up; less than n.
        resamplings: r, how often the levels of a jump are sampled in all; 1 jumps never.
        steps: of each reverse step in turn, m >= n of them, its row in `base` and the levels to jump then.
        plan: what `sample` is to run: the rows of `base` in that order.

    Raises:
        ValueError: a number is out of its range, or the sampler remembers the step before, as dpm++2m does.
    """

    base: SamplingPlan
    jump_length: int = 10
    resamplings: int = 10
    steps: list[tuple[int, int]] = dataclasses.field(init=False)
    plan: SamplingPlan = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if self.base.takes_previous_x0:
            raise ValueError(
                "sampler: it remembers the step before, which jumps break; take another, such as 'ddpm'"
            )
        steps = resampled_steps(len(self.base), self.jump_length, self.resamplings)
        rows = torch.tensor([row for row, _ in steps])
        tables = {
            field.name: getattr(self.base, field.name)[rows]
            for field in dataclasses.fields(self.base)
            if isinstance(getattr(self.base, field.name), Tensor)
        }
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "plan", dataclasses.replace(self.base, **tables))

    def callbacks(self, x0: Tensor, mask: Tensor, draw_noise: DrawNoise) -> tuple[DrawNoise, OnStep]:
        """The `draw_noise` and the `on_step` that `sample` is to call for `plan`.

        Args:
            x0: the sample of which a part is known, (N, ...).
            mask: what to paint, bool, of a shape that broadcasts to that of `x0`.
            draw_noise: latents -> standard normal noise like them. Called once for each reverse step, whether
                or not its sampler takes noise, and once for each level of a jump.

        Raises:
            TypeError: the mask is not bool.
        """
        check_tensor("x0", x0)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: got dtype {mask.dtype}, expected bool")
        drawn: list[Tensor] = []

        def noise_of_step(latents: Tensor) -> Tensor:
            drawn.append(draw_noise(latents))
            return drawn[-1]

        def on_step(i: int, _: int, latents: Tensor) -> Tensor:
            row, jump = self.steps[i]
            noise = drawn.pop() if drawn else draw_noise(latents)
            latents = torch.where(mask, latents, self.base.add_noise(x0, noise, row + 1))
            for level in range(row + 1, row + 1 - jump, -1):
                latents = self._up(latents, draw_noise(latents), level)
            return latents

        return noise_of_step, on_step

    def _up(self, x: Tensor, noise: Tensor, level: int) -> Tensor:
        """From the level at which step `level` begins to that of the step before: eq. 13 over all between."""
        alpha, sigma = (
            torch.cat([levels, levels.new_tensor([clean])])
            for levels, clean in ((self.base.noise_alpha, 1.0), (self.base.noise_sigma, 0.0))
        )
        scale = alpha[level - 1] / alpha[level]
        std = (sigma[level - 1] ** 2 - (scale * sigma[level]) ** 2).clamp(min=0).sqrt()
        return add_noise(x, noise, *(one.to(x.device).expand(x.shape[:1]) for one in (scale, std)))[0]


def resampled_steps(steps: int, jump_length: int, resamplings: int) -> list[tuple[int, int]]:
    """The walk of `RePaint.steps`, as `RePaintScheduler.set_timesteps` (Lugmayr et al. 2022, figure 9).

    From each level that is a multiple of `jump_length` above the clean one, the uppermost excepted, the walk
    goes `jump_length` levels up, `resamplings` - 1 times: n + (r - 1) j ⌈n/j - 1⌉ steps.

    Args:
        steps: n, of the plan.
        jump_length, resamplings: j and r.

    Returns:
        (row of the plan, levels to go up afterwards, 0 or `jump_length`) of each reverse step.

    Raises:
        ValueError: j or r is less than 1, or there are jumps, but none of this length fits.
    """
    for name, value in (("jump_length", jump_length), ("resamplings", resamplings)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a whole number >= 1")
    if resamplings > 1 and jump_length >= steps:
        raise ValueError(
            f"jump_length: got {jump_length} for {steps} steps, expected less; take more steps, or"
            " resamplings=1 for no jumps"
        )
    left = dict.fromkeys(range(0, steps - jump_length, jump_length), resamplings - 1)
    walk, level = [], steps  # counted upwards from the clean one
    while level > 0:
        level -= 1
        jump = jump_length if left.get(level) else 0
        walk.append((steps - 1 - level, jump))
        if jump:
            left[level] -= 1
            level += jump
    return walk
