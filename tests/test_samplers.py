"""Every sampler against diffusers' scheduler: whole runs."""

import diffusers
import pytest
import torch
from diffusers_runs import (
    CLASSES,
    SHAPE,
    TOLERANCE,
    assert_same_run,
    config_of,
    denoiser,
    noise_of,
    run_diffusers,
    run_plan,
    start,
)

from sdfast import diffusion
from sdfast.diffusion import SAMPLERS, NoiseSchedule, plan_from_config, sample


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        (name, prediction)
        for name in CLASSES
        for prediction in ("epsilon", "v_prediction", "sample")
        # diffusers has no such step; see test_euler_ancestral_of_sample_prediction
        if (name, prediction) != ("euler_a", "sample")
    ],
)
def test_whole_runs_equal_diffusers(name, prediction, spacing):
    for steps in (7, 20, 50):
        for offset in {0, int(spacing == "leading")}:
            config = config_of(
                name, timestep_spacing=spacing, prediction_type=prediction, steps_offset=offset
            )
            assert_same_run(plan_from_config(config, steps), config, steps)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", CLASSES)
def test_other_beta_schedules(name, schedule):
    """The same run from the same table of ᾱ.

    Of "squaredcos_cap_v2" no claim is made that diffusers' own table gives this run: `our_table` puts ours in
    its place, since its fp32 loses digits of ᾱ where β is 0.999. Our table is test_schedule's subject.
    """
    config = {
        "_class_name": CLASSES[name],
        "beta_schedule": schedule,
        "timestep_spacing": "linspace",
        "prediction_type": "v_prediction",
    }
    assert_same_run(plan_from_config(config, 20), config, 20, our_table=schedule == "squaredcos_cap_v2")


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m"])
@pytest.mark.parametrize("config", [{"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}])
def test_fp32_runs_equal_fp64_runs(name, config):
    """Also where the first noise level is in the thousands."""
    schedule = NoiseSchedule.from_config({**config, "prediction_type": "v_prediction"})
    plan = SAMPLERS[name](schedule, 20, spacing="trailing")
    expected = run_plan(plan, start().double())
    error = (run_plan(plan, start()) - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE, f"relative error {error:.2e}"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_clipping(name, prediction):
    for bound in (1.0, 0.4):
        config = config_of(
            name,
            clip_sample=True,
            clip_sample_range=bound,
            prediction_type=prediction,
            beta_schedule="linear",
        )
        plan = plan_from_config(config, 20)
        assert plan.clip == bound
        assert_same_run(plan, config, 20)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("name", CLASSES)
def test_zero_terminal_snr(name, spacing):
    """Equal to rounding from the same table of ᾱ (`our_table`); from diffusers' own fp32 one to 1e-4 only."""
    for steps in (7, 20):
        config = config_of(
            name, rescale_betas_zero_snr=True, timestep_spacing=spacing, prediction_type="v_prediction"
        )
        plan = plan_from_config(config, steps)
        assert_same_run(plan, config, steps, our_table=True)
        expected, _ = run_diffusers(config, steps, start())
        assert (run_plan(plan, start()) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_epsilon_cannot_start_from_zero_terminal_snr():
    for name in ("ddpm", "ddim"):
        config = config_of(name, rescale_betas_zero_snr=True, timestep_spacing="trailing")
        with pytest.raises(ValueError, match="zero terminal SNR.*v_prediction"):
            plan_from_config(config, 20)


@pytest.mark.parametrize("strength", [0.04, 0.3, 0.58, 0.99, 1.0])
@pytest.mark.parametrize("name", CLASSES)
def test_image_to_image(name, strength):
    x0 = 0.5 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(11))
    for steps in (25, 50):
        config = config_of(name, timestep_spacing="leading", steps_offset=1)
        plan = plan_from_config(config, steps, strength=strength)
        assert len(plan) == int(steps * strength)
        assert_same_run(plan, config, steps, strength=strength, x0=x0)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_eta_and_final_alpha(eta, set_alpha_to_one):
    for spacing in ("leading", "trailing"):
        config = config_of("ddim", set_alpha_to_one=set_alpha_to_one, timestep_spacing=spacing)
        schedule = NoiseSchedule.from_config(config)
        plan = diffusion.ddim(schedule, 20, eta=eta, spacing=spacing, set_alpha_to_one=set_alpha_to_one)
        assert plan.draws_noise.all() == (eta > 0)
        assert_same_run(plan, config, 20, eta=eta)


def test_ddpm_fixed_large():
    config = config_of("ddpm", variance_type="fixed_large")
    assert_same_run(plan_from_config(config, 20), config, 20)
    default = diffusion.ddpm(NoiseSchedule.from_config(config), 20)
    assert torch.equal(default.coefficients, plan_from_config(config, 20).coefficients)


def test_ddpm_ends_without_noise():
    """Unless the last step is index 0, diffusers adds noise to the finished picture; Algorithm 2 does not."""
    config = config_of("ddpm", variance_type="fixed_large", timestep_spacing="trailing")
    plan = plan_from_config(config, 20)
    drawn = []

    def draw(like):
        drawn.append(noise_of(generator)(like))
        return drawn[-1]

    generator = torch.Generator().manual_seed(7)
    actual = sample(plan, denoiser, start(), draw_noise=draw)
    expected, timesteps = run_diffusers(config, 20, start())
    last_noise = NoiseSchedule.from_config(config).alpha_sigma(int(timesteps[-1]))[1] * drawn[-1]
    assert len(drawn) == 20
    assert last_noise.abs().max() > 0.1
    torch.testing.assert_close(actual + last_noise.float(), expected, rtol=1e-5, atol=1e-5)


def test_ddpm_over_all_steps_is_equation_22():
    schedule = NoiseSchedule.linear(T=40)
    plan = diffusion.ddpm(schedule, 40)
    x = start().double()
    generator = torch.Generator().manual_seed(7)
    expected = x
    for t in range(39, -1, -1):
        beta, alpha, alpha_bar = schedule.betas[t], schedule.alphas[t], schedule.alphas_cumprod[t]
        z = noise_of(generator)(x) if t > 0 else 0
        epsilon = denoiser(expected, torch.tensor(t))
        expected = (expected - beta / (1 - alpha_bar).sqrt() * epsilon) / alpha.sqrt() + beta.sqrt() * z
    actual = sample(plan, denoiser, x, draw_noise=noise_of(torch.Generator().manual_seed(7)))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", ["euler", "dpm++2m"])
def test_karras_and_final_sigmas(name, spacing):
    for karras in (True, False):
        for final in ("zero", "sigma_min"):
            for steps in (7, 20):
                config = config_of(
                    name, timestep_spacing=spacing, use_karras_sigmas=karras, final_sigmas_type=final
                )
                plan = plan_from_config(config, steps)
                expected, timesteps = run_diffusers(config, steps, start())
                # Karras steps are found by interpolation in fp32 there.
                torch.testing.assert_close(plan.timesteps.float(), timesteps.float(), rtol=0, atol=2e-3)
                torch.testing.assert_close(
                    run_plan(plan, start()), expected, rtol=0, atol=2e-5 * expected.abs().max()
                )


@pytest.mark.parametrize("settings", [{"euler_at_final": True}, {"lower_order_final": False}])
def test_dpm_solver_last_step(settings):
    for steps in (7, 20):
        config = config_of("dpm++2m", final_sigmas_type="sigma_min", **settings)
        assert_same_run(plan_from_config(config, steps), config, steps)


def test_euler_ancestral_of_sample_prediction():
    """A model that predicts x_0 and one that predicts the same thing as ε give the same run."""
    schedule = NoiseSchedule.scaled_linear()
    by_epsilon = diffusion.euler_ancestral(schedule, 20)
    by_sample = diffusion.euler_ancestral(schedule, 20, prediction="sample")

    def predict_x0(x, t):  # x is α (x_0 + s ε)
        i = by_epsilon.timesteps.float().tolist().index(float(t))
        s = by_epsilon.noise_sigma[i]
        return x * (1 + s**2).sqrt() - s * denoiser(x, t)

    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    x = start().double() * by_epsilon.initial_sigma
    expected = sample(by_epsilon, denoiser, x, draw_noise=noise_of(generators[0]))
    actual = sample(by_sample, predict_x0, x, draw_noise=noise_of(generators[1]))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_timesteps_for_every_number_of_steps():
    schedule = NoiseSchedule.linear()
    for name, class_name in CLASSES.items():
        for spacing in ("linspace", "leading", "trailing"):
            scheduler = getattr(diffusers, class_name)(timestep_spacing=spacing)
            for steps in [*range(1, 60), 99, 100, 142, 250, 333, 500, 999]:
                scheduler.set_timesteps(steps)
                # In floating point `arange(1000, 0, -1000 / n)` may run to n + 1 elements, the last -1.
                expected = scheduler.timesteps.tolist()[:steps]
                assert SAMPLERS[name](schedule, steps, spacing=spacing).timesteps.tolist() == expected


@pytest.mark.parametrize("name", CLASSES)
def test_exact_denoiser_is_recovered(name):
    """A model that knows x_0 leads every sampler to x_0, from any level of noise and any prediction."""
    schedule = NoiseSchedule.scaled_linear()
    x0 = 0.5 * torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for prediction in ("epsilon", "v_prediction", "sample"):
        plan = SAMPLERS[name](schedule, 10, prediction=prediction, strength=0.7)

        def oracle(x, t, plan=plan, prediction=prediction):
            i = plan.timesteps.float().tolist().index(float(t))
            norm = torch.hypot(plan.noise_alpha[i], plan.noise_sigma[i])
            alpha, sigma = plan.noise_alpha[i] / norm, plan.noise_sigma[i] / norm
            epsilon = (x - alpha * x0) / sigma
            return {"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0}[
                prediction
            ]

        result = sample(plan, oracle, plan.add_noise(x0, start().double()))
        torch.testing.assert_close(result, x0, rtol=1e-6, atol=1e-6)
