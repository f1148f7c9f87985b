"""The arguments of the samplers, and the loop that runs a plan."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers_runs import CLASSES, SHAPE, STABLE_DIFFUSION, config_of, denoiser, noise_of, start

from sdfast import diffusion
from sdfast.diffusion import SAMPLERS, NoiseSchedule, plan_from_config, sample


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


def test_the_denoiser_may_be_given_something_else_than_timesteps():
    plan = diffusion.euler(NoiseSchedule.scaled_linear(), 4)
    timesteps = [(t,) for t in plan.timesteps.float()]
    actual = sample(plan, lambda x, time: denoiser(x, time[0]), start(), timesteps=timesteps)
    assert torch.equal(actual, sample(plan, denoiser, start()))
    with pytest.raises(ValueError, match="timesteps: got 3, expected 4, one for each step"):
        sample(plan, denoiser, start(), timesteps=timesteps[1:])


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


def test_seeds_make_a_sample_the_same_in_any_batch():
    seeds = torch.tensor([11, 12])
    for name in CLASSES:
        plan = SAMPLERS[name](NoiseSchedule.linear(), 6)
        together = sample(plan, denoiser, start(), seeds=seeds)
        alone = [sample(plan, denoiser, start()[i : i + 1], seeds=seeds[i : i + 1]) for i in range(2)]
        assert torch.equal(together, torch.cat(alone))
        other = sample(plan, denoiser, start(), seeds=seeds + 2)
        assert torch.equal(together, other) == (not plan.draws_noise.any())
    with pytest.raises(ValueError, match="seeds: got them beside draw_noise"):
        sample(plan, denoiser, start(), seeds=seeds, draw_noise=torch.randn_like)


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
