"""The bound in bits per dimension: against closed forms, and against eq. 16 written out in fp64."""

import math

import pytest
import tiny_models
import torch
from torch import distributions

from sdfast import diffusion
from sdfast.diffusion import NoiseSchedule
from sdfast.models import UNet2D, UNet2DConfig

SHORT = NoiseSchedule.linear(T=12, beta_start=3e-3, beta_end=0.4)
VARIANCES = ("fixed_large", "fixed_small")


def schedule_of(prediction, schedule=SHORT):
    return NoiseSchedule(schedule.betas, prediction)


def exact_denoiser(schedule, std):
    """E[target | x_t] where x_0 ~ N(0, std²): ε, v or x_0."""

    def denoise(x_t, _, t):
        alpha, sigma = schedule.alpha_sigma(t)
        x0 = alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x_t
        return schedule.convert(x0, x_t, t, to=schedule.prediction, prediction="sample")

    return denoise


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_gaussian_data_with_the_exact_model_give_the_analytic_bound(prediction, variance):
    """Every term is a quadratic form in (x_0, ε), so that the four corners (±s, ±1) have its expectation.

    Then KL = ½ (ln σ²/β̃ + (β̃ + w² r) / σ² - 1), w the weight of x_0 in the posterior's mean (eq. 18) and
    r = s² (1-ᾱ) / (ᾱ s² + 1-ᾱ) the variance of x_0 given x_t.
    """
    std, schedule = 0.7, schedule_of(prediction)
    x0 = std * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
    corners = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    found = diffusion.variational_bound(
        schedule, exact_denoiser(schedule, std), x0, variance=variance, discrete=False, dtype=torch.float64,
        draw_noise=lambda t, part: corners[part], batch_size=3,
    )[variance]  # fmt: skip

    bits = 1 / math.log(2)
    betas = schedule.betas.tolist()
    alpha_bar, terms, errors = 1.0, [], []
    for t, beta in enumerate(betas):
        previous, alpha_bar = alpha_bar, alpha_bar * (1 - beta)
        r = std**2 * (1 - alpha_bar) / (alpha_bar * std**2 + 1 - alpha_bar)
        errors.append(r)
        small = (1 - previous) / (1 - alpha_bar) * beta
        if variance == "fixed_large":
            sigma2 = beta
        elif t == 0:  # that of the next
            after = alpha_bar * (1 - betas[1])
            sigma2 = (1 - alpha_bar) / (1 - after) * betas[1]
        else:
            sigma2 = small
        if t == 0:
            terms.append(0.5 * (math.log(2 * math.pi * sigma2) + r / sigma2) * bits)
        else:
            w2 = previous * beta**2 / (1 - alpha_bar) ** 2
            terms.append(0.5 * (math.log(sigma2 / small) + (small + w2 * r) / sigma2 - 1) * bits)
    prior = 0.5 * (alpha_bar * std**2 + 1 - alpha_bar - 1 - math.log(1 - alpha_bar)) * bits

    def close(ours, theirs):
        expected = torch.as_tensor(theirs, dtype=torch.float64)
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)

    close(found.prior.mean(), prior)
    close(found.terms.mean(0), terms)
    close(found.total.mean(), prior + sum(terms))
    close(found.x0_mse.mean(0), errors)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * std**2)
    assert found.total.mean() > entropy  # it is an upper bound
    if variance == "fixed_large":
        assert found.total.mean() < entropy + 0.6  # as close as twelve coarse steps come


def test_more_steps_bring_the_bound_to_the_entropy():
    std, distances = 0.7, []
    corners = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    for T in (10, 100, 1000):
        schedule = NoiseSchedule.linear(T, 0.1 / T, 20 / T if T > 20 else 0.9)
        found = diffusion.variational_bound(
            schedule, exact_denoiser(schedule, std), std * corners.abs(), variance="fixed_large",
            discrete=False, dtype=torch.float64, draw_noise=lambda t, part: corners[part],
        )["fixed_large"]  # fmt: skip
        # Where little noise is on the data, σ² = β is the true variance. x_0 = s alone will do: with ε = ±1 no term has a part odd in x_0.
        distances.append(found.total.mean().item() - 0.5 * math.log2(2 * math.pi * math.e * std**2))
    assert distances[0] > distances[1] > distances[2] > 0 and distances[2] < 0.03


def tiny_unet(prediction):
    torch.manual_seed(0)
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in tiny_models.DDPM.items()}
    return UNet2D(UNet2DConfig(sample_size=8, **settings)).eval(), schedule_of(prediction)


def pictures(n, size=8):
    levels = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(1))
    levels[0, 0, 0, :2] = torch.tensor([0, 255])  # the open ends of the discretised Gaussian
    return levels.float() / 127.5 - 1


@pytest.mark.parametrize(
    ("prediction", "clip"), [("epsilon", False), ("v_prediction", True), ("sample", False)]
)
def test_a_unet_against_equation_16_written_out(prediction, clip):
    unet, schedule = tiny_unet(prediction)
    unet = unet.double()

    def model(x_t, t):  # near x_0 where it is index 0's that is predicted, or no fp64 would hold the mass
        return x_t + 0.02 * unet(x_t, t) if prediction == "sample" else unet(x_t, t)

    x0 = pictures(2).double()
    noise = torch.randn(
        schedule.T, 2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    found = diffusion.variational_bound(
        schedule, lambda x_t, _, t: model(x_t, t), x0, variance=VARIANCES, clip=clip, dtype=torch.float64,
        draw_noise=lambda t, part: noise[t, part],
    )  # fmt: skip

    bar = torch.cat(
        [torch.ones(1, dtype=torch.float64), (1 - schedule.betas).cumprod(0)]
    )  # ᾱ of the paper's t
    bits = 3 * 64 * math.log(2)

    def standard(mean, variance):
        return distributions.Normal(mean, torch.as_tensor(variance).sqrt())

    for t in range(1, schedule.T + 1):  # the paper's
        beta = schedule.betas[t - 1]
        x_t = bar[t].sqrt() * x0 + (1 - bar[t]).sqrt() * noise[t - 1]
        with torch.no_grad():
            output = model(x_t, torch.full((2,), t - 1))
        if prediction == "epsilon":
            guess = (x_t - (1 - bar[t]).sqrt() * output) / bar[t].sqrt()
        elif prediction == "v_prediction":
            guess = bar[t].sqrt() * x_t - (1 - bar[t]).sqrt() * output
        else:
            guess = output
        if clip:
            assert guess.abs().max() > 1
            guess = guess.clamp(-1, 1)

        def mean_of(x, t=t, beta=beta, x_t=x_t):
            of_x0 = bar[t - 1].sqrt() * beta / (1 - bar[t])
            return of_x0 * x + (1 - beta).sqrt() * (1 - bar[t - 1]) / (1 - bar[t]) * x_t

        def small(t):
            return (1 - bar[t - 1]) / (1 - bar[t]) * schedule.betas[t - 1]

        for variance in VARIANCES:
            p = standard(mean_of(guess), beta if variance == "fixed_large" else small(max(t, 2)))
            if t == 1:
                above = torch.where(x0 == 1, torch.ones_like(x0), p.cdf(x0 + 1 / 255))
                below = torch.where(x0 == -1, torch.zeros_like(x0), p.cdf(x0 - 1 / 255))
                # Far from the mean both are 1 or 0 to rounding; by the complement the mass is not lost.
                mirrored = standard(-p.mean, p.variance)
                other = torch.where(x0 == -1, torch.ones_like(x0), mirrored.cdf(-x0 + 1 / 255))
                under = torch.where(x0 == 1, torch.zeros_like(x0), mirrored.cdf(-x0 - 1 / 255))
                term = -torch.maximum(above - below, other - under).log()
            else:
                term = distributions.kl_divergence(standard(mean_of(x0), small(t)), p)
            ours = found[variance].terms[:, t - 1]
            torch.testing.assert_close(
                ours, term.sum((1, 2, 3)) / bits, rtol=1e-6 if t == 1 else 1e-9, atol=1e-10
            )
        torch.testing.assert_close(
            found["fixed_large"].x0_mse[:, t - 1], ((guess - x0) ** 2).mean((1, 2, 3)), rtol=1e-9, atol=0
        )
        epsilon = (x_t - bar[t].sqrt() * guess) / (1 - bar[t]).sqrt()
        torch.testing.assert_close(
            found["fixed_large"].epsilon_mse[:, t - 1],
            ((epsilon - noise[t - 1]) ** 2).mean((1, 2, 3)), rtol=1e-7, atol=1e-12,
        )  # fmt: skip
    q = standard(bar[-1].sqrt() * x0, 1 - bar[-1])
    prior = distributions.kl_divergence(q, distributions.Normal(0.0, 1.0)).sum((1, 2, 3)) / bits
    torch.testing.assert_close(found["fixed_small"].prior, prior)


def test_the_discretised_term_of_the_bound_is_a_distribution():
    """2^(-bits) of index 0 adds up to 1 over the 256 values of a single pixel, for one x_1 and one model."""
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1)
    alpha, sigma = SHORT.alpha_sigma(0)
    for target in (-1.2, 0.1):  # the noise that makes one x_1 of every x_0
        found = diffusion.variational_bound(
            schedule_of("sample"), lambda x_t, _, t: torch.full_like(x_t, 0.3), levels, dtype=torch.float64,
            draw_noise=lambda t, part, target=target: (target - alpha * levels[part]) / sigma,
        )["fixed_large"]  # fmt: skip
        torch.testing.assert_close((2 ** -found.terms[:, 0]).sum().item(), 1.0, rtol=1e-9, atol=0)


def test_a_sample_has_its_noise_whatever_the_batch():
    unet, schedule = tiny_unet("epsilon")
    x0, calls = pictures(5), []

    def denoise(x_t, part, t):
        assert x_t.dtype == torch.float32 and len(x_t) == part.stop - part.start
        calls.append(len(x_t))
        return unet(x_t, t)

    seen = []
    whole = diffusion.variational_bound(schedule, denoise, x0, on_step=lambda *done: seen.append(done))[
        "fixed_large"
    ]
    assert calls == [5] * schedule.T
    assert seen[-1] == (5 * schedule.T, 5 * schedule.T) and len(seen) == schedule.T
    parts = diffusion.variational_bound(schedule, denoise, x0, batch_size=2)["fixed_large"]
    torch.testing.assert_close(parts.total, whole.total, rtol=1e-4, atol=0)
    last = diffusion.variational_bound(schedule, denoise, x0[4:], seed=4)["fixed_large"]
    torch.testing.assert_close(last.total, whole.total[4:], rtol=1e-4, atol=0)
    other = diffusion.variational_bound(schedule, denoise, x0, seed=9)["fixed_large"]
    assert (other.epsilon_mse - whole.epsilon_mse).abs().min() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x0": torch.full((2, 3), 0.3)}, "x0: has values that are none of 256 levels"),
        ({"x0": torch.full((2, 3), 3.0)}, "x0: has values that are none of 256 levels"),
        (
            {"x0": torch.zeros(0, 3), "discrete": False},
            r"x0: got shape \(0, 3\), expected \(N, ...\) with N >= 1",
        ),
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
        ({"variance": "learned"}, "variance: got 'learned', expected one of fixed_large, fixed_small"),
        ({"prediction": "noise"}, "prediction: got 'noise'"),
    ],
)
def test_errors_name_the_argument(options, message):
    options = {"x0": torch.ones(2, 3)} | options
    with pytest.raises(ValueError, match=message):
        diffusion.variational_bound(SHORT, lambda x_t, _, t: x_t, **options)


def test_a_term_that_is_not_finite_is_named():
    with pytest.raises(FloatingPointError, match="the bound's term of index 11 is not finite"):
        diffusion.variational_bound(SHORT.zero_terminal_snr(), lambda x_t, _, t: x_t, torch.ones(2, 3))
