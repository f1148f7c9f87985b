"""The fused steps of diffusers' schedulers: whole runs equal to the schedulers' own."""

from __future__ import annotations

import copy
import inspect
import pickle

import diffusers
import pytest
import torch

import sdfast
from sdfast.drop_in import schedulers
from sdfast.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny models: threads would wait for each other

SHAPE = (2, 4, 6, 5)
KINDS = {
    "ddim": (diffusers.DDIMScheduler, {}, {}),
    "ddim, eta": (diffusers.DDIMScheduler, {}, {"eta": 0.7}),
    "ddim, clipped output": (diffusers.DDIMScheduler, {}, {"use_clipped_model_output": True}),
    "ddim, stable diffusion": (
        diffusers.DDIMScheduler,
        {
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "beta_schedule": "scaled_linear",
        },
        {},
    ),
    "ddpm": (diffusers.DDPMScheduler, {}, {}),
    "ddpm, large": (diffusers.DDPMScheduler, {"variance_type": "fixed_large", "clip_sample": False}, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "leading"}, {}),
    "euler, karras": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True}, {}),
    "euler, churn": (diffusers.EulerDiscreteScheduler, {}, {"s_churn": 3.0}),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {}, {}),
    "dpm++, heun": (diffusers.DPMSolverMultistepScheduler, {"solver_type": "heun"}, {}),
    "dpm++, first order": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 1}, {}),
    "dpm++, third order": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}, {}),
    "dpm++, sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpm++, karras": (
        diffusers.DPMSolverMultistepScheduler,
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "euler_at_final": True},
        {},
    ),
}


class Pipeline:
    """The least that is one: a model and a scheduler."""

    def __init__(self, scheduler):
        self.components = {"unet": torch.nn.Linear(2, 2), "scheduler": scheduler}


def sample(scheduler, steps, dtype=torch.float32, **keywords):
    """A run with a made-up model; every x' and, where it is told, x̂₀."""
    scheduler.set_timesteps(steps)
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(SHAPE, generator=draw) * scheduler.init_noise_sigma).to(dtype)
    results = []
    if "generator" in inspect.signature(scheduler.step).parameters:
        keywords["generator"] = draw
    for t in scheduler.timesteps:
        m = torch.tanh(scheduler.scale_model_input(x, t).float() + t / 1000).to(dtype)
        x, *rest = scheduler.step(m, t, x, return_dict=False, **keywords)
        results += [x, *rest]
    return torch.stack([r.float() for r in results])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_runs(kind, steps, prediction):
    make, config, keywords = KINDS[kind]
    theirs = make(prediction_type=prediction, **config)
    ours = copy.deepcopy(theirs)
    sdfast.optimize(Pipeline(ours))
    assert schedulers.is_replaced(ours)
    assert relative_error(sample(ours, steps, **keywords), sample(theirs, steps, **keywords)) < 2e-5
    sdfast.restore(Pipeline(ours))
    assert "step" not in ours.__dict__
    assert torch.equal(sample(ours, steps, **keywords), sample(theirs, steps, **keywords))


@pytest.mark.parametrize("kind", ["ddim", "euler", "dpm++"])
def test_half_precision(kind):
    """bf16 latents: not further from fp32's run than the scheduler's own."""
    make, config, keywords = KINDS[kind]
    exact = sample(make(**config), 6, **keywords)
    own = relative_error(sample(make(**config), 6, torch.bfloat16, **keywords), exact)
    scheduler = make(**config)
    schedulers.replace(scheduler)
    assert relative_error(sample(scheduler, 6, torch.bfloat16, **keywords), exact) < 1.5 * own


def test_one_step_is_one_operation(monkeypatch):
    """Not the scheduler's own arithmetic: the kernel is reached, once a step."""
    calls = []
    step = schedulers.ops.diffusion_step
    monkeypatch.setattr(schedulers.ops, "diffusion_step", lambda *a, **k: calls.append(1) or step(*a, **k))
    for kind in ("ddim", "ddim, eta", "ddpm", "euler", "dpm++"):
        make, config, keywords = KINDS[kind]
        scheduler = make(**config)
        schedulers.replace(scheduler)
        calls.clear()
        sample(scheduler, 5, **keywords)
        assert len(calls) == 5, kind
        with sdfast.disabled():
            sample(scheduler, 5, **keywords)
        assert len(calls) == 5, kind


def test_copies():
    scheduler = diffusers.DDIMScheduler()
    schedulers.replace(scheduler)
    copied = copy.deepcopy(scheduler)
    assert schedulers.is_replaced(copied) and copied.step.__self__ is copied
    loaded = pickle.loads(pickle.dumps(scheduler))
    assert torch.equal(sample(loaded, 4), sample(diffusers.DDIMScheduler(), 4))


def test_unknown_scheduler_is_left():
    scheduler = diffusers.PNDMScheduler()
    with pytest.warns(UserWarning, match="PNDMScheduler"):
        report = sdfast.optimize(Pipeline(scheduler))
    assert any(row.name == "scheduler" and row.served_by != "sdfast" for row in report.rows)
    assert "step" not in scheduler.__dict__


def test_excluded_scheduler_is_left():
    for patterns in ({"include": "unet*"}, {"exclude": "scheduler"}):
        scheduler = diffusers.DDIMScheduler()
        sdfast.optimize(Pipeline(scheduler), **patterns)
        assert not schedulers.is_replaced(scheduler)
