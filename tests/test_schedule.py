"""Noise schedules against diffusers' tables and against Gaussian algebra done by brute force."""

import math

import diffusers
import pytest
import torch

from sdfast.diffusion import NoiseSchedule

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "zero_snr": NoiseSchedule.scaled_linear().zero_terminal_snr(),
}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("schedule", "config"),
    [
        (NoiseSchedule.linear(), {}),
        (
            NoiseSchedule.linear(50, 1e-3, 0.1),
            {"num_train_timesteps": 50, "beta_start": 1e-3, "beta_end": 0.1},
        ),
        (
            NoiseSchedule.scaled_linear(),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (NoiseSchedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            NoiseSchedule.scaled_linear().zero_terminal_snr(),
            {
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "rescale_betas_zero_snr": True,
            },
        ),
        (NoiseSchedule(torch.tensor([0.1, 0.2, 0.3])), {"trained_betas": [0.1, 0.2, 0.3]}),
    ],
)
def test_tables_equal_diffusers(schedule, config):
    theirs = diffusers.DDPMScheduler(**config)
    for ours in (schedule, NoiseSchedule.from_config(config)):
        assert len(theirs.betas) == ours.T
        assert ours.betas.dtype == ours.alphas_cumprod.dtype == torch.float64
        for name in ("betas", "alphas", "alphas_cumprod"):
            # Rescaling in fp32 subtracts nearly equal numbers near the last step: those betas lose digits.
            atol = 1e-4 if "rescale_betas_zero_snr" in config and name != "alphas_cumprod" else 1e-6
            torch.testing.assert_close(
                getattr(ours, name), getattr(theirs, name).double(), rtol=1e-5, atol=atol
            )


def test_the_default_is_section_3_3():
    schedule = NoiseSchedule.linear()
    assert schedule.T == 1000
    assert schedule.betas[0].item() == 1e-4
    assert schedule.betas[-1].item() == 0.02
    assert schedule.prediction == "epsilon"


def test_zero_terminal_snr_keeps_the_start_and_empties_the_end():
    before, after = SCHEDULES["scaled_linear"], SCHEDULES["zero_snr"]
    assert after.alphas_cumprod[-1] == 0
    torch.testing.assert_close(after.alphas_cumprod[0], before.alphas_cumprod[0])
    assert after.snr(999) == 0
    assert (after.alphas_cumprod.diff() < 0).all()


def test_from_config_reads_the_prediction():
    assert NoiseSchedule.from_config({"prediction_type": "v_prediction"}).prediction == "v_prediction"
    kept = NoiseSchedule.from_config({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    assert kept.prediction == kept.to("cpu").prediction == "v_prediction"


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_by_brute_force(name):
    """q(x_{t-1}|x_t, x_0) ∝ q(x_t|x_{t-1}) q(x_{t-1}|x_0): multiply the two densities on a grid."""
    schedule = SCHEDULES[name]
    grid = torch.linspace(-12, 12, 48001, dtype=torch.float64)
    for t in (100, 500, 998, 999):
        x0, x_t = 0.7, -0.4
        previous = schedule.alphas_cumprod[t - 1]
        log_prior = -((grid - previous.sqrt() * x0) ** 2) / (2 * (1 - previous))
        log_step = -((x_t - schedule.alphas[t].sqrt() * grid) ** 2) / (2 * schedule.betas[t])
        weight = torch.softmax(log_prior + log_step, 0)
        mean = (weight * grid).sum()
        variance = (weight * (grid - mean) ** 2).sum()
        one = torch.ones(1, 1, dtype=torch.float64)
        got_mean, got_variance = schedule.q_posterior(x0 * one, x_t * one, torch.tensor([t]))
        torch.testing.assert_close(got_mean.squeeze(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got_variance.squeeze(), variance, rtol=1e-5, atol=1e-7)


def test_posterior_at_index_0_is_x0():
    x0, x_t = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    mean, variance = SCHEDULES["linear"].q_posterior(x0, x_t, 0)
    torch.testing.assert_close(mean, x0)
    assert variance == 0


def test_posterior_mean_is_equation_21():
    """With x_0 of the predicted ε, μ̃ is (x_t - β/√(1-ᾱ) ε)/√α."""
    schedule = SCHEDULES["linear"]
    x_t, epsilon = randn(4, 3, 2), randn(4, 3, 2, seed=1)
    t = torch.tensor([0, 10, 500, 999])
    x0 = schedule.convert(epsilon, x_t, t, to="sample")
    mean, _ = schedule.q_posterior(x0, x_t, t)
    beta, alpha, alpha_bar = (
        v[t].view(-1, 1, 1) for v in (schedule.betas, schedule.alphas, schedule.alphas_cumprod)
    )
    expected = (x_t - beta / (1 - alpha_bar).sqrt() * epsilon) / alpha.sqrt()
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [0, 250, 999])
def test_q_sample_moments(t):
    schedule = SCHEDULES["linear"]
    n = 200_000
    x0 = torch.full((n, 1), 0.8, dtype=torch.float64)
    x_t = schedule.q_sample(x0, torch.full((n,), t), randn(n, 1))
    alpha_bar = schedule.alphas_cumprod[t]
    band = 5 / math.sqrt(n)  # five standard errors of a unit variance
    assert abs(x_t.mean() - alpha_bar.sqrt() * 0.8) < band * (1 - alpha_bar).sqrt()
    assert abs(x_t.var() / (1 - alpha_bar) - 1) < 2 * band


def test_q_sample_equals_the_chain_of_single_steps():
    """Eq. 15 is eq. 13 applied t times: propagate mean and variance."""
    schedule = SCHEDULES["cosine"]
    mean, variance = 1.0, 0.0
    for beta in schedule.betas[:300].tolist():
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    alpha, sigma = schedule.alpha_sigma(299)
    assert alpha.item() == pytest.approx(mean)
    assert sigma.item() ** 2 == pytest.approx(variance)


def test_q_sample_equals_diffusers():
    theirs = diffusers.DDPMScheduler()
    x0, noise = randn(4, 3, 5, 5, dtype=torch.float32), randn(4, 3, 5, 5, seed=1, dtype=torch.float32)
    t = torch.tensor([0, 3, 500, 999])
    schedule = SCHEDULES["linear"]
    torch.testing.assert_close(
        schedule.q_sample(x0, t, noise), theirs.add_noise(x0, noise, t), rtol=1e-5, atol=1e-5
    )
    _, velocity = schedule.training_pair(x0, t, noise, prediction="v_prediction")
    torch.testing.assert_close(velocity, theirs.get_velocity(x0, noise, t), rtol=1e-5, atol=1e-5)
    one_t = schedule.q_sample(x0, 500, noise)
    torch.testing.assert_close(one_t[2], schedule.q_sample(x0, t, noise)[2])


def test_training_pair_follows_the_schedules_prediction():
    x0, noise, t = randn(2, 3), randn(2, 3, seed=1), torch.tensor([5, 900])
    for prediction in ("epsilon", "v_prediction", "sample"):
        schedule = NoiseSchedule.linear(prediction=prediction)
        x_t, target = schedule.training_pair(x0, t, noise)
        for to, expected in {"epsilon": noise, "sample": x0}.items():
            torch.testing.assert_close(
                schedule.convert(target, x_t, t, to=to), expected, rtol=1e-8, atol=1e-8
            )


@pytest.mark.parametrize("source", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("to", ["epsilon", "v_prediction", "sample"])
def test_conversions_agree_and_invert(source, to):
    schedule = NoiseSchedule.linear(prediction=source)
    x0, noise, t = randn(3, 2, 2), randn(3, 2, 2, seed=1), torch.tensor([1, 400, 999])
    x_t, given = schedule.training_pair(x0, t, noise)
    _, wanted = schedule.training_pair(x0, t, noise, prediction=to)
    converted = schedule.convert(given, x_t, t, to=to)
    torch.testing.assert_close(converted, wanted, rtol=1e-8, atol=1e-8)
    back = schedule.convert(converted, x_t, t, to=source, prediction=to)
    torch.testing.assert_close(back, given, rtol=1e-8, atol=1e-8)


def test_velocity_is_finite_at_zero_terminal_snr():
    schedule, v, x = SCHEDULES["zero_snr"], randn(1, 4), randn(1, 4, seed=1)
    x0 = schedule.convert(v, x, 999, to="sample", prediction="v_prediction")
    torch.testing.assert_close(x0, -v)


def test_snr():
    schedule = SCHEDULES["linear"]
    t = torch.tensor([[0, 5], [10, 999]])
    expected = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    assert torch.equal(schedule.snr(t), expected)
    assert schedule.snr(999) == expected[1, 1]


def test_model_variance():
    schedule = SCHEDULES["linear"]
    small = schedule.model_variance("fixed_small")
    assert torch.equal(schedule.model_variance(), schedule.betas)
    assert torch.equal(small[1:], schedule.posterior_variance[1:])
    assert small[0] == small[1] > 0
    assert (small[1:] <= schedule.betas[1:]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_rounded_once(dtype):
    schedule, t = SCHEDULES["linear"], torch.tensor([7, 900])
    x0, x_t = randn(2, 50).to(dtype), randn(2, 50, seed=1).to(dtype)
    mean, variance = schedule.q_posterior(x0, x_t, t)
    wide, _ = schedule.q_posterior(x0.float(), x_t.float(), t)
    assert mean.dtype == dtype and variance.dtype == torch.float32
    assert torch.equal(mean, wide.to(dtype))
    velocity = schedule.convert(x0, x_t, t, to="v_prediction")
    assert torch.equal(velocity, schedule.convert(x0.float(), x_t.float(), t, to="v_prediction").to(dtype))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NoiseSchedule(torch.tensor([])), r"betas: got shape \(0,\)"),
        (lambda: NoiseSchedule(torch.tensor([0.1, 1.5])), r"betas: got values from 0.1 to 1.5"),
        (lambda: NoiseSchedule(torch.tensor([0.0, 0.5])), r"expected \(0, 1\]"),
        (lambda: NoiseSchedule.linear(0), "T: got 0"),
        (lambda: NoiseSchedule.linear(beta_end=2.0), "beta_end: got 2.0"),
        (
            lambda: NoiseSchedule.linear(prediction="noise"),
            "prediction: got 'noise', expected one of epsilon",
        ),
        (lambda: NoiseSchedule.linear(1).zero_terminal_snr(), "expected at least 2"),
        (lambda: NoiseSchedule.linear().snr(1000), r"t: got 1000, expected an index in \[0, 1000\)"),
        (lambda: NoiseSchedule.linear().snr(torch.tensor([3, -1])), "t: got indices from -1 to 3"),
        (lambda: NoiseSchedule.linear().model_variance("learned"), "variance: got 'learned'"),
        (lambda: NoiseSchedule.from_config({"beta_schedule": "laplace"}), "beta_schedule: got 'laplace'"),
        (
            lambda: NoiseSchedule.linear().q_sample(randn(2, 3), torch.tensor([1, 2, 3]), randn(2, 3)),
            r"t: got shape \(3,\), expected \(2,\)",
        ),
        (
            lambda: NoiseSchedule.linear().q_posterior(randn(2, 3), randn(2, 3), torch.tensor([1, 2, 3])),
            r"t: got shape \(3,\), expected \(2,\)",
        ),
        (
            lambda: NoiseSchedule.linear().convert(randn(2, 3), randn(2, 3), 5, to="x0"),
            "to: got 'x0', expected one of epsilon, v_prediction, sample",
        ),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_fractional_indices_are_refused():
    with pytest.raises(TypeError, match="t: got dtype torch.float32, expected int64"):
        NoiseSchedule.linear().snr(torch.tensor([1.5]))
