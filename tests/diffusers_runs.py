"""Runs of diffusers' schedulers with a stand-in for the model, for the tests of samplers to compare with."""

import diffusers
import torch

from sdfast.diffusion import NoiseSchedule, sample

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
    # diffusers' Euler computes x + (s' - s) d with |x| up to s, which costs it s * 2^-24.
    allowed = TOLERANCE + 2**-24 * plan.initial_sigma
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < allowed, f"relative error {error:.2e}"
