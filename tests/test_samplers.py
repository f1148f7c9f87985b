"""Every sampler against diffusers' scheduler, whole runs, and the loop that runs a plan."""

import diffusers
import numpy as np
import pytest
import torch

from sdfast import diffusion
from sdfast.diffusion import SAMPLERS, NoiseSchedule, plan_from_config, sample

CLASSES = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
}
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
SHAPE = (2, 3, 6, 5)
# Beyond the rounding of fp32 latents, diffusers' tables are fp32 and ours fp64.
TOLERANCE = 1e-5


def config_of(name, **settings):
    return {"_class_name": CLASSES[name], **STABLE_DIFFUSION, **settings}


def denoiser(x, timestep):
    """A smooth nonlinear stand-in for a model: it mixes pixels and depends on the step."""
    t = float(timestep) / 1000
    return torch.tanh(0.6 * x + 0.3 * x.roll(1, -1)) * (0.8 + 0.2 * t) + 0.1 * torch.sin(3 * x + t)


def noise_of(generator):
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def run_diffusers(config, steps, latents=None, *, strength=1.0, x0=None, eta=None, our_table=False):
    """The loop of a diffusers pipeline; image-to-image as in StableDiffusionImg2ImgPipeline.

    our_table: give it our ᾱ, where its own lose digits: 1 - (1 - β) in fp32 is off by 6e-5 at β = 0.999.
    """
    scheduler = getattr(diffusers, config["_class_name"]).from_config(
        {k: v for k, v in config.items() if k != "_class_name"}
    )
    if our_table:
        alphas_cumprod = NoiseSchedule.from_config(config).alphas_cumprod.float()
        in_sigmas = config["_class_name"] not in (CLASSES["ddpm"], CLASSES["ddim"])
        scheduler.alphas_cumprod = alphas_cumprod.clamp(min=2**-24 * in_sigmas * (alphas_cumprod[-1] == 0))
    scheduler.set_timesteps(steps)
    first = steps - min(int(steps * strength), steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    timesteps = scheduler.timesteps[first:]
    if x0 is not None:
        x = scheduler.add_noise(x0, latents, timesteps[:1].repeat(len(x0)))
    else:
        x = latents * scheduler.init_noise_sigma
    generator = torch.Generator().manual_seed(7)
    options = {} if config["_class_name"] == CLASSES["dpm++2m"] else {"generator": generator}
    if eta is not None:
        options["eta"] = eta
    for t in timesteps:
        model_output = denoiser(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(model_output, t, x, **options).prev_sample
    return x, timesteps


def run_plan(plan, latents=None, *, x0=None):
    x = plan.add_noise(x0, latents) if x0 is not None else latents * plan.initial_sigma
    return sample(plan, denoiser, x, draw_noise=noise_of(torch.Generator().manual_seed(7)))


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def assert_same_run(plan, config, steps, **kwargs):
    expected, timesteps = run_diffusers(config, steps, start(), **kwargs)
    assert plan.timesteps.tolist() == timesteps.tolist()
    actual = run_plan(plan, start(), x0=kwargs.get("x0"))
    # diffusers' Euler computes x + (s' - s) d with |x| up to s, which costs it s * 2^-24. Ours does not cancel.
    allowed = TOLERANCE + 2**-24 * plan.initial_sigma
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < allowed, f"relative error {error:.2e}"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", CLASSES)
def test_whole_runs_equal_diffusers(name, spacing, prediction):
    if name == "euler_a" and prediction == "sample":
        pytest.skip("diffusers has no such step; see test_euler_ancestral_of_sample_prediction")
    for steps in (7, 20, 50):
        for offset in {0, int(spacing == "leading")}:
            config = config_of(
                name, timestep_spacing=spacing, prediction_type=prediction, steps_offset=offset
            )
            assert_same_run(plan_from_config(config, steps), config, steps)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", CLASSES)
def test_other_beta_schedules(name, schedule):
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
    """Where the last step is not index 0, diffusers adds noise to the finished picture; Algorithm 2 does not."""
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


# From a scheduler_config.json


def test_stable_diffusion_1_config_runs_as_ddim():
    config = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert_same_run(plan_from_config(config, 20), {**config, "_class_name": "DDIMScheduler"}, 20)
    bare = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"}
    plan = plan_from_config(bare, 20)
    assert plan.clip is None  # PNDM does not clip, so its successor must not
    assert plan.coefficients[-1, 2] < 1  # and keeps its set_alpha_to_one=False


@pytest.mark.parametrize("name", CLASSES)
def test_sampler_overrides_the_config(name):
    config = {
        "_class_name": "PNDMScheduler",
        **STABLE_DIFFUSION,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    assert_same_run(plan_from_config(config, 20, sampler=name), {**config, "_class_name": CLASSES[name]}, 20)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "LCMScheduler"}, "_class_name: got 'LCMScheduler'.*dpm"),
        ({}, "_class_name: got None"),
        (config_of("dpm++2m", solver_order=3), "solver_order: 3 is not supported by 'dpm\\+\\+2m'"),
        (config_of("dpm++2m", algorithm_type="sde-dpmsolver++"), "algorithm_type"),
        (config_of("ddim", thresholding=True), "thresholding: True"),
        (config_of("ddpm", variance_type="learned_range"), "variance_type: 'learned_range'"),
        (config_of("euler", use_beta_sigmas=True), "use_beta_sigmas"),
        (config_of("ddim", beta_schedule="sigmoid"), "beta_schedule: got 'sigmoid'"),
        (config_of("ddim", timestep_spacing="karras"), "spacing: got 'karras'"),
        (config_of("ddim", prediction_type="flow"), "prediction: got 'flow'"),
    ],
)
def test_unsupported_configs_say_so(config, message):
    with pytest.raises(ValueError, match=message):
        plan_from_config(config, 20)


def test_unknown_sampler():
    with pytest.raises(
        ValueError, match="sampler: got 'plms', expected one of ddpm, ddim, euler, euler_a, dpm"
    ):
        plan_from_config(config_of("ddim"), 20, sampler="plms")


# Arguments


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected a whole number from 1 to the schedule's 1000"),
        ({"steps": 1001}, "steps: got 1001"),
        ({"steps": 2.5}, "steps: got 2.5"),
        ({"steps": 1000, "spacing": "leading", "steps_offset": 1}, "steps"),
        ({"spacing": "even"}, "spacing: got 'even', expected one of linspace, leading, trailing"),
        ({"prediction": "noise"}, "prediction: got 'noise', expected one of epsilon"),
        ({"strength": 0}, r"strength: got 0, expected a number in \(0, 1\]"),
        ({"strength": 1.5}, "strength: got 1.5"),
        ({"strength": 0.01}, "strength: 0.01 of 20 steps leaves none; take at least 100 steps or a strength"),
        ({"spacing": "leading", "steps_offset": 60}, "steps_offset: 60 puts 20 steps at .* to 10"),
        ({"spacing": "leading", "steps_offset": -60}, "steps_offset: -60 puts"),
    ],
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name](NoiseSchedule.linear(), **{"steps": 20, **arguments})


def test_bad_options():
    schedule = NoiseSchedule.linear()
    with pytest.raises(ValueError, match="variance: got 'learned', expected one of fixed_large, fixed_small"):
        diffusion.ddpm(schedule, 20, variance="learned")
    with pytest.raises(ValueError, match=r"eta: got 1.5, expected a number in \[0, 1\]"):
        diffusion.ddim(schedule, 20, eta=1.5)
    with pytest.raises(ValueError, match="clip_sample_range: got 0"):
        diffusion.ddim(schedule, 20, clip_sample=True, clip_sample_range=0)
    with pytest.raises(ValueError, match="final_sigmas: got 'one'"):
        diffusion.euler(schedule, 20, final_sigmas="one")
    with pytest.raises(
        ValueError, match="steps: 1000 are too many for 'linspace' spacing here; take at most 999"
    ):
        diffusion.dpm_solver_pp_2m(schedule, 1000)
    with pytest.raises(ValueError, match="step: got 21, expected 0 to 20"):
        diffusion.ddim(schedule, 20).add_noise(start(), start(), 21)


# The loop


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents(name, dtype):
    """The latents keep their dtype, and each step is the fp32 step rounded once."""
    plan = SAMPLERS[name](NoiseSchedule.scaled_linear(), 6)
    x = (start() * plan.initial_sigma).to(dtype)
    seen = []

    def record(x, t):
        assert x.dtype == dtype
        seen.append(denoiser(x.float(), t).to(dtype))
        return seen[-1]

    zeros = torch.zeros_like
    steps = [x]
    sample(plan, record, x, draw_noise=zeros, on_step=lambda i, n, latents: steps.append(latents))
    previous = None
    for i in range(6):
        assert steps[i + 1].dtype == dtype
        k = plan.coefficients[i].float()
        wide, m = steps[i].float(), seen[i].float()
        x0 = k[0] * wide + k[1] * m
        expected = k[2] * x0 + k[3] * wide + k[4] * m
        if previous is not None:
            expected = expected + k[5] * previous.float()
        previous = x0.to(dtype)
        assert torch.equal(steps[i + 1], expected.to(dtype))


@pytest.mark.parametrize("name", CLASSES)
def test_guidance(name):
    """Guiding is the same as a model that mixes its two halves itself."""
    plan = SAMPLERS[name](NoiseSchedule.scaled_linear(), 8)

    def both(x, t):
        return torch.cat([denoiser(x, t), denoiser(0.9 * x + 0.1, t)])

    def mixed(x, t):
        unconditional, conditional = both(x, t).chunk(2)
        return unconditional + 7.5 * (conditional - unconditional)

    x = start() * plan.initial_sigma
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    guided = sample(plan, both, x, guidance_scale=7.5, draw_noise=noise_of(generators[0]))
    assert torch.equal(guided, sample(plan, mixed, x, draw_noise=noise_of(generators[1])))


def test_on_step_may_replace_the_latents():
    """Inpainting: the known half is noised to where the next step begins, and is exact at the end."""
    plan = diffusion.ddim(NoiseSchedule.scaled_linear(), 8)
    known, noise = start(), start().flip(0)
    mask = torch.zeros(SHAPE)
    mask[..., 3:] = 1
    calls = []

    def put_back(i, n, latents):
        calls.append((i, n))
        return mask * latents + (1 - mask) * plan.add_noise(known, noise, i + 1)

    result = sample(plan, denoiser, noise, on_step=put_back)
    assert calls == [(i, 8) for i in range(8)]
    assert torch.equal(result[..., :3], known[..., :3])
    free = sample(plan, denoiser, noise)
    assert not torch.allclose(result[..., 3:], free[..., 3:])


def test_inpainting_noise_equals_diffusers():
    for name, class_name in CLASSES.items():
        plan = plan_from_config(config_of(name), 10)
        scheduler = getattr(diffusers, class_name).from_config(STABLE_DIFFUSION)
        scheduler.set_timesteps(10)
        for step in range(10):
            expected = scheduler.add_noise(start(), start().flip(0), scheduler.timesteps[step : step + 1])
            actual = plan.add_noise(start(), start().flip(0), step)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_noise_is_drawn_only_where_the_plan_says():
    schedule = NoiseSchedule.linear()
    for name, draws in {"ddpm": 9, "ddim": 0, "euler": 0, "euler_a": 10, "dpm++2m": 0}.items():
        plan = SAMPLERS[name](schedule, 10)
        calls = []
        sample(
            plan, denoiser, start(), draw_noise=lambda x, calls=calls: calls.append(1) or torch.randn_like(x)
        )
        assert len(calls) == int(plan.draws_noise.sum()) == draws


def test_sampling_records_no_graph_and_leaves_its_input_alone():
    plan = diffusion.ddpm(NoiseSchedule.linear(), 5)
    x = start().requires_grad_()
    kept = x.detach().clone()
    assert not sample(plan, denoiser, x).requires_grad
    assert torch.equal(x.detach(), kept)


def test_empty_batch_and_a_model_of_another_dtype():
    plan = diffusion.euler(NoiseSchedule.linear(), 3)
    assert sample(plan, denoiser, torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    result = sample(plan, lambda x, t: denoiser(x, t).bfloat16(), start())
    assert result.dtype == torch.float32


def test_a_model_output_of_the_wrong_shape_is_named():
    plan = diffusion.ddim(NoiseSchedule.linear(), 3)
    with pytest.raises(ValueError, match=r"model_output: got shape \(2, 3, 6, 5\), expected \(4, 3, 6, 5\)"):
        sample(plan, denoiser, start(), guidance_scale=2.0)


def test_timesteps_reach_the_model_in_the_dtype_diffusers_feeds():
    seen = []
    for name in CLASSES:
        plan = SAMPLERS[name](NoiseSchedule.linear(), 2)
        sample(plan, lambda x, t: seen.append(t) or x, start())
    assert {t.dtype for t in seen if t.is_floating_point()} == {torch.float32}
    assert all(t.dim() == 0 for t in seen)
    assert np.array_equal([t.is_floating_point() for t in seen[::2]], [False, False, True, True, False])
