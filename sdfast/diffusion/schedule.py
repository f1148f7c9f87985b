"""The forward process: the betas, what follows from them, and the Gaussians of §3.1.

t counts from 0, as in diffusers and as the model is fed: the paper's step t is index t - 1 here, and ᾱ before
index 0 is 1. Tables are float64; results have the dtype of the tensors that came in and are computed in fp32
(fp64 for fp64).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdfast.ops._checks import check_tensor
from sdfast.ops.add_noise import PREDICTIONS, add_noise

VARIANCES = ("fixed_large", "fixed_small")


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """β_t of every step and what the model predicts.

    Attributes:
        betas: β, (T,), float64, each in (0, 1].
        prediction: what the model is trained to output: "epsilon", "v_prediction" or "sample".
        alphas: α = 1 - β, (T,), float64.
        alphas_cumprod: ᾱ, (T,), float64.

    Raises:
        ValueError: `betas` is not a non-empty vector in (0, 1], or `prediction` is unknown.
    """

    betas: Tensor
    prediction: str = "epsilon"
    alphas: Tensor = dataclasses.field(init=False)
    alphas_cumprod: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        betas = torch.as_tensor(self.betas, dtype=torch.float64)
        if betas.dim() != 1 or betas.numel() == 0:
            raise ValueError(f"betas: got shape {tuple(betas.shape)}, expected (T,) with T >= 1")
        if not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError(
                f"betas: got values from {betas.min().item():g} to {betas.max().item():g}, expected (0, 1]"
            )
        check_prediction(self.prediction)
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas", 1 - betas)
        object.__setattr__(self, "alphas_cumprod", torch.cumprod(1 - betas, dim=0))

    @classmethod
    def linear(
        cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, *, prediction: str = "epsilon"
    ) -> NoiseSchedule:
        """β linear from `beta_start` to `beta_end`: §3.3."""
        _check_betas(T, beta_start, beta_end)
        return cls(torch.linspace(beta_start, beta_end, T, dtype=torch.float64), prediction)

    @classmethod
    def scaled_linear(
        cls,
        T: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        *,
        prediction: str = "epsilon",
    ) -> NoiseSchedule:
        """√β linear: the schedule of Stable Diffusion (Rombach et al. 2022)."""
        _check_betas(T, beta_start, beta_end)
        return cls(torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2, prediction)

    @classmethod
    def cosine(cls, T: int = 1000, *, max_beta: float = 0.999, prediction: str = "epsilon") -> NoiseSchedule:
        """ᾱ a squared cosine (Nichol & Dhariwal 2021, eq. 17), the "squaredcos_cap_v2" of diffusers."""
        _check_betas(T, max_beta, max_beta)

        def alpha_bar(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), max_beta) for i in range(T)]
        return cls(torch.tensor(betas, dtype=torch.float64), prediction)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule of a diffusers `scheduler_config.json`, with diffusers' defaults for what is missing.

        Read: num_train_timesteps, beta_start, beta_end, beta_schedule ("linear", "scaled_linear",
        "squaredcos_cap_v2"), trained_betas, rescale_betas_zero_snr, prediction_type.

        Raises:
            ValueError: the beta schedule or the prediction type is not one of these.
        """
        prediction = config.get("prediction_type", "epsilon")
        T = config.get("num_train_timesteps", 1000)
        ends = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        name = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            schedule = cls(torch.as_tensor(config["trained_betas"], dtype=torch.float64), prediction)
        elif name == "linear":
            schedule = cls.linear(T, *ends, prediction=prediction)
        elif name == "scaled_linear":
            schedule = cls.scaled_linear(T, *ends, prediction=prediction)
        elif name == "squaredcos_cap_v2":
            schedule = cls.cosine(T, prediction=prediction)
        else:
            raise ValueError(
                f"beta_schedule: got {name!r}, expected 'linear', 'scaled_linear' or 'squaredcos_cap_v2'; "
                "give any other schedule as trained_betas"
            )
        return schedule.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule

    def zero_terminal_snr(self) -> NoiseSchedule:
        """The same schedule stretched so that x_T keeps nothing of x_0 (Lin et al. 2023, algorithm 1).

        √ᾱ is shifted to end at 0 and scaled to begin where it began. The last step then holds no
        information about x_0 that "epsilon" could recover: train and sample with "v_prediction".
        """
        root = self.alphas_cumprod.sqrt()
        if len(root) < 2:
            raise ValueError("zero_terminal_snr: the schedule has 1 step, expected at least 2")
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alphas_cumprod = root**2
        alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
        return NoiseSchedule(1 - alphas, self.prediction)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its tables on `device`, so that a training step copies nothing."""
        return NoiseSchedule(self.betas.to(device), self.prediction)

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.betas)

    @property
    def alphas_cumprod_previous(self) -> Tensor:
        """ᾱ_{t-1}, (T,), float64; 1 before the first step."""
        return torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])

    @property
    def posterior_variance(self) -> Tensor:
        """β̃, (T,), float64: eq. 18. 0 at index 0, where x_0 is known."""
        return (1 - self.alphas_cumprod_previous) / (1 - self.alphas_cumprod) * self.betas

    def model_variance(self, variance: str = "fixed_large") -> Tensor:
        """σ² of p_θ(x_{t-1}|x_t), (T,), float64: β ("fixed_large", §3.2.2) or β̃ ("fixed_small").

        β̃ is 0 at index 0, which no density can have; it takes index 1's value there, as in Ho et al. 2020.
        """
        if variance not in VARIANCES:
            raise ValueError(f"variance: got {variance!r}, expected one of {', '.join(VARIANCES)}")
        if variance == "fixed_large" or self.T == 1:
            return self.betas
        small = self.posterior_variance
        return torch.cat([small[1:2], small[1:]])

    def snr(self, t: Tensor | int) -> Tensor:
        """Signal-to-noise ratio ᾱ_t / (1 - ᾱ_t), float64, in the shape of `t`."""
        alphas_cumprod = self._gather(self.alphas_cumprod, t)
        return alphas_cumprod / (1 - alphas_cumprod)

    def alpha_sigma(self, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 - ᾱ_t), float64, in the shape of `t`: the coefficients of eq. 15."""
        alphas_cumprod = self._gather(self.alphas_cumprod, t)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def q_sample(self, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε: eq. 15.

        Args:
            x0: (N, ...), floating.
            t: index of each sample, (N,) integers, or one int for all.
            noise: ε, the shape and dtype of `x0`.
        """
        return self.training_pair(x0, t, noise, prediction="epsilon")[0]

    def training_pair(
        self, x0: Tensor, t: Tensor | int, noise: Tensor, *, prediction: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_t of eq. 15 and what the model should output for it: one training example of Algorithm 1.

        Args:
            x0, t, noise: as in `q_sample`.
            prediction: None for the schedule's own.

        Returns:
            x_t and the target, (N, ...) in the dtype of `x0` (`sdfast.ops.add_noise`).
        """
        check_tensor("x0", x0)
        _check_batch(t, x0)
        alpha, sigma = (c.to(x0.device).expand(x0.shape[:1]) for c in self.alpha_sigma(t))
        return add_noise(x0, noise, alpha, sigma, prediction=prediction or self.prediction)

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean μ̃ and variance β̃ of q(x_{t-1}|x_t, x_0): eq. 17-18 (Ho et al. 2020, eq. 7).

            μ̃ = √ᾱ_{t-1} β_t / (1 - ᾱ_t) x_0 + √α_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t) x_t

        Args:
            x0, x_t: (N, ...), the same dtype.
            t: index of each sample, (N,) integers, or one int for all.

        Returns:
            mean (N, ...) in the dtype of `x0`; variance (N, 1, ..., 1), or a scalar for an int t,
            fp32 or fp64.
        """
        check_tensor("x0", x0)
        check_tensor("x_t", x_t, shape=tuple(x0.shape), like=x0, casts=True)
        rest = 1 - self.alphas_cumprod
        of_x0 = self.at(self.alphas_cumprod_previous.sqrt() * self.betas / rest, t, x0)
        of_xt = self.at(self.alphas.sqrt() * (1 - self.alphas_cumprod_previous) / rest, t, x0)
        mean = of_x0 * x0.to(of_x0.dtype) + of_xt * x_t.to(of_xt.dtype)
        return mean.to(x0.dtype), self.at(self.posterior_variance, t, x0)

    def convert(
        self, model_output: Tensor, x_t: Tensor, t: Tensor | int, *, to: str, prediction: str | None = None
    ) -> Tensor:
        """Restate a model's output as the ε, the v or the x_0 ("sample") that it amounts to at x_t.

        With α = √ᾱ_t, σ = √(1 - ᾱ_t), x_t = α x_0 + σ ε and v = α ε - σ x_0. Where α is 0 (the last step at
        zero terminal SNR) an ε says nothing about x_0 and the result is not finite.

        Args:
            model_output, x_t: (N, ...), the same dtype.
            t: index of each sample, (N,) integers, or one int for all.
            to: "epsilon", "v_prediction" or "sample".
            prediction: what `model_output` is; None for the schedule's own.

        Returns:
            (N, ...) in the dtype of `model_output`.
        """
        prediction = prediction or self.prediction
        check_prediction(prediction)
        check_prediction(to, name="to")
        check_tensor("model_output", model_output)
        check_tensor("x_t", x_t, shape=tuple(model_output.shape), like=model_output, casts=True)
        if prediction == to:
            return model_output
        alpha = self.at(self.alphas_cumprod.sqrt(), t, x_t)
        sigma = self.at((1 - self.alphas_cumprod).sqrt(), t, x_t)
        m, x = model_output.to(alpha.dtype), x_t.to(alpha.dtype)
        if prediction == "epsilon":
            x0, epsilon = (x - sigma * m) / alpha, m
        elif prediction == "v_prediction":
            x0, epsilon = alpha * x - sigma * m, alpha * m + sigma * x
        else:
            x0, epsilon = m, (x - alpha * m) / sigma
        result = {"sample": x0, "epsilon": epsilon}.get(to)
        if result is None:
            result = alpha * epsilon - sigma * x0
        return result.to(model_output.dtype)

    def at(self, table: Tensor, t: Tensor | int, x: Tensor) -> Tensor:
        """table[t] as (N, 1, ..., 1), or a scalar for an int t, to multiply `x` by.

        Args:
            table: (T,): one of this schedule's, or made of them.
            t: index of each sample, (N,) integers, or one int for all.
            x: (N, ...), floating; the result is on its device, fp32, or fp64 where `x` is fp64.
        """
        _check_batch(t, x)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        value = self._gather(table, t).to(device=x.device, dtype=wide)
        return value if value.dim() == 0 else value.view(-1, *(1,) * (x.dim() - 1))

    def _gather(self, table: Tensor, t: Tensor | int) -> Tensor:
        """table[t], with t checked; on the device of `t`."""
        if isinstance(t, int):
            if not 0 <= t < self.T:
                raise ValueError(f"t: got {t}, expected an index in [0, {self.T})")
            return table[t]
        if t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"t: got dtype {t.dtype}, expected int64 or int32 indices")
        # On another device the check would wait for it; there the gather itself stops on a bad index.
        if t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling():
            low, high = int(t.min()), int(t.max())
            if low < 0 or high >= self.T:
                raise ValueError(f"t: got indices from {low} to {high}, expected all in [0, {self.T})")
        return table.to(t.device)[t]


def check_prediction(prediction: str, name: str = "prediction") -> None:
    """Raise ValueError unless it is one of the three things a model can predict."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"{name}: got {prediction!r}, expected one of {', '.join(PREDICTIONS)}")


def _check_batch(t: Tensor | int, x: Tensor) -> None:
    if isinstance(t, Tensor) and t.dim() > 0 and t.shape != x.shape[:1]:
        raise ValueError(f"t: got shape {tuple(t.shape)}, expected ({x.shape[0]},) or an int")


def _check_betas(T: int, beta_start: float, beta_end: float) -> None:
    if not isinstance(T, int) or T < 1:
        raise ValueError(f"T: got {T!r}, expected a whole number of steps >= 1")
    for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < beta < 1:
            raise ValueError(f"{name}: got {beta}, expected a number in (0, 1)")
