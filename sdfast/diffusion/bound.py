"""The variational bound of a diffusion model over a data set, in bits per dimension, term by term.

    -ln p_θ(x_0) <= E_q[L_T + Σ_{t=1}^{T-1} L_t + L_0]        eq. 16 (Ho et al. 2020, eq. 5)

L_T does not depend on the model; L_t, that of index t, is the KL of two Gaussians, in closed form given the
noised sample; L_0 is the discretised Gaussian. Every term is estimated from one draw for each sample, as
improved-diffusion's `calc_bpd_loop` does (Nichol & Dhariwal 2021). 1 bit per dimension is D ln 2 nats, D the
number of elements of x_0.

σ_0² of "fixed_large" is β of index 0, as the report has it (§3.2.2). improved-diffusion takes the smaller
variance for L_0 there: its number is L_0 of "fixed_small" with all other terms of "fixed_large".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdfast.diffusion.losses import prior_term, reconstruction_term, transition_term
from sdfast.diffusion.schedule import NoiseSchedule
from sdfast.ops._checks import check_tensor
from sdfast.ops._philox import philox_normals

# (x_t of the samples in a slice, that slice, index t) -> the model's output, of the shape of x_t
Denoiser = Callable[[Tensor, slice, int], Tensor]
# (index t, the samples in a slice) -> their noise, standard normal
DrawNoise = Callable[[int, slice], Tensor]


@dataclasses.dataclass(frozen=True)
class Bound:
    """The bound of N samples, fp64 on the CPU.

    Attributes:
        prior: L_T, bits per dimension, (N,).
        terms: of index t = 0 … T-1, bits per dimension, (N, T); index 0 is L_0.
        x0_mse: mean squared error of the x_0 that the model amounts to, (N, T).
        epsilon_mse: the same of ε, (N, T).
    """

    prior: Tensor
    terms: Tensor
    x0_mse: Tensor
    epsilon_mse: Tensor

    @property
    def total(self) -> Tensor:
        """Bits per dimension, (N,): an upper bound of -log2 p(x_0) / D, in expectation over the noise."""
        return self.prior + self.terms.sum(dim=1)


@torch.no_grad()
def variational_bound(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x0: Tensor,
    *,
    variance: str | Sequence[str] = "fixed_large",
    prediction: str | None = None,
    discrete: bool = True,
    clip: bool = False,
    batch_size: int = 256,
    dtype: torch.dtype = torch.float32,
    draw_noise: DrawNoise | None = None,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Bound]:
    """Evaluate every term at every t.

    The model is called once for each batch and t, whatever the number of variances. Everything but the model
    is computed in fp64: late steps have variances so alike that fp32 would leave little of their difference.

    Args:
        schedule: T steps.
        denoiser: the model, in evaluation mode. T calls for each batch.
        x0: the data, (N, ...), floating; for `discrete` 256 levels scaled to [-1, 1].
        variance: σ_t² of p_θ, "fixed_large", "fixed_small" or both.
        prediction: what the model outputs; None for the schedule's own.
        discrete: L_0 by the discretised Gaussian; False by its density, for latents.
        clip: clamp the predicted x_0 to [-1, 1] first, as improved-diffusion does for pictures.
        batch_size: samples in one call of the model.
        dtype: what the model reads. x_t is rounded to it for the model alone.
        draw_noise: where the noise comes from; None draws that of sample i from seed + i and t, so that it
            does not depend on `batch_size`.
        on_step: called as on_step(done, total) after each call of the model, in samples; the total is N T.

    Returns:
        the bound for each variance asked for.

    Raises:
        ValueError: an argument is out of range, or x0 has no such levels.
        FloatingPointError: a term is not finite, such as ε-prediction's at zero terminal SNR.
    """
    check_tensor("x0", x0)
    if x0.dim() < 2 or x0.numel() == 0:
        raise ValueError(f"x0: got shape {tuple(x0.shape)}, expected (N, ...) with N >= 1")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if discrete:
        _check_levels(x0)
    variances = (variance,) if isinstance(variance, str) else tuple(variance)
    for name in variances:
        schedule.model_variance(name)
    draw = draw_noise or _noise_by_sample(x0, seed)
    data, N, T = x0.double(), len(x0), schedule.T
    bits = 1 / (data[0].numel() * math.log(2))
    prior = prior_term(schedule, data) * bits
    terms = {name: torch.empty(N, T, dtype=torch.float64) for name in variances}
    x0_mse, epsilon_mse = (torch.empty(N, T, dtype=torch.float64) for _ in range(2))
    for first in range(0, N, batch_size):
        part = slice(first, min(first + batch_size, N))
        x = data[part]
        for t in reversed(range(T)):
            noise = draw(t, part).to(x)
            x_t = schedule.q_sample(x, t, noise)
            output = denoiser(x_t.to(dtype), part, t)
            guess = schedule.convert(output.to(x), x_t, t, to="sample", prediction=prediction)
            if clip:
                guess = guess.clamp(-1, 1)
            x0_mse[part, t] = _mean_square(guess - x)
            epsilon = schedule.convert(guess, x_t, t, to="epsilon", prediction="sample")
            epsilon_mse[part, t] = _mean_square(epsilon - noise)
            for name in variances:
                terms[name][part, t] = bits * _term(schedule, x, x_t, t, guess, name, discrete).cpu()
            if on_step is not None:
                on_step(first * T + (T - t) * len(x), N * T)
    result = {name: Bound(prior.cpu(), terms[name], x0_mse, epsilon_mse) for name in variances}
    for one in result.values():
        if not one.total.isfinite().all():
            t = int((~one.terms.isfinite()).any(dim=0).nonzero()[0])
            raise FloatingPointError(f"the bound's term of index {t} is not finite")
    return result


def _term(
    schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: int, guess: Tensor, variance: str, discrete: bool
) -> Tensor:
    """The term of index t for a predicted x_0, in nats: (N,)."""
    if t == 0:
        return reconstruction_term(
            schedule, x0, x_t, guess, variance=variance, prediction="sample", discrete=discrete
        )
    index = torch.full((len(x0),), t, dtype=torch.int64, device=x0.device)
    return transition_term(schedule, x0, x_t, index, guess, variance=variance, prediction="sample")


def _mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(dim=1).cpu()


def _noise_by_sample(x0: Tensor, seed: int) -> DrawNoise:
    seeds = torch.arange(len(x0), device=x0.device) + seed
    return lambda t, part: philox_normals(seeds[part], x0[part].shape, t)


def _check_levels(x0: Tensor) -> None:
    level = (x0.double() + 1) * 127.5
    if not (level.min() > -0.01 and level.max() < 255.01 and (level - level.round()).abs().max() < 0.01):
        raise ValueError(
            "x0: has values that are none of 256 levels from -1 to 1; round pictures to 8 bits, or pass"
            " discrete=False for data without levels"
        )
