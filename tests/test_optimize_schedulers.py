"""The fused steps of diffusers' schedulers: whole runs equal to the schedulers' own."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import pickle

import diffusers
import pytest
import torch
from test_optimize import unconditional

import sdfast
from sdfast import ops
from sdfast.drop_in import schedulers
from sdfast.testing import relative_error

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
    "euler, ancestral": (diffusers.EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}, {}),
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
    "pndm": (diffusers.PNDMScheduler, {}, {}),
    "pndm, stable diffusion": (
        diffusers.PNDMScheduler,
        {"skip_prk_steps": True, "steps_offset": 1, "beta_schedule": "scaled_linear"},
        {},
    ),
    "pndm, to x0": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True}, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}, {}),
    "unipc, bh1": (
        diffusers.UniPCMultistepScheduler,
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
        {},
    ),
    "unipc, first order": (diffusers.UniPCMultistepScheduler, {"solver_order": 1}, {}),
    "unipc, third order": (diffusers.UniPCMultistepScheduler, {"solver_order": 3}, {}),
    "unipc, corrected late": (diffusers.UniPCMultistepScheduler, {"disable_corrector": [0, 1]}, {}),
    "unipc, epsilon": (
        diffusers.UniPCMultistepScheduler,
        {"predict_x0": False, "final_sigmas_type": "sigma_min"},
        {},
    ),
}
TAKES_NO_SAMPLE = (diffusers.EulerAncestralDiscreteScheduler, diffusers.PNDMScheduler)  # as a model's output


class Pipeline:
    """The least that is one: a model and a scheduler."""

    def __init__(self, scheduler):
        self.components = {"unet": torch.nn.Linear(2, 2), "scheduler": scheduler}


def sample(scheduler, steps, dtype=torch.float32, around_step=contextlib.nullcontext, **keywords):
    """A run with a made-up model; every x' and, where it is told, x̂₀."""
    scheduler.set_timesteps(steps)
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(SHAPE, generator=draw) * scheduler.init_noise_sigma).to(dtype)
    results = []
    if "generator" in inspect.signature(scheduler.step).parameters:
        keywords["generator"] = draw
    for t in scheduler.timesteps:
        m = torch.tanh(scheduler.scale_model_input(x, t).float() + t / 1000).to(dtype)
        with around_step():
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
    if prediction == "sample" and make in TAKES_NO_SAMPLE:
        with pytest.raises((ValueError, NotImplementedError), match="prediction_type"):
            sample(ours, steps, **keywords)
        return
    assert relative_error(sample(ours, steps, **keywords), sample(theirs, steps, **keywords)) < 2e-5
    sdfast.restore(Pipeline(ours))
    assert type(ours) is make
    assert torch.equal(sample(ours, steps, **keywords), sample(theirs, steps, **keywords))


@pytest.mark.parametrize("kind", ["dpm++", "pndm, stable diffusion", "unipc"])
def test_switched_from_step_to_step(kind):
    """What a scheduler remembers is kept as its own step keeps it, whichever step runs."""
    make, config, keywords = KINDS[kind]
    scheduler = make(**config)
    schedulers.replace(scheduler)
    turns = itertools.cycle([contextlib.nullcontext, sdfast.disabled, sdfast.disabled])
    switched = sample(scheduler, 11, around_step=lambda: next(turns)(), **keywords)
    assert relative_error(switched, sample(make(**config), 11, **keywords)) < 2e-5


@pytest.mark.parametrize("kind", ["dpm++", "pndm, stable diffusion", "unipc"])
def test_dtypes_that_change_from_step_to_step(kind):
    """What is remembered in another dtype: the scheduler's own step, and the fused one again when all is alike."""
    make, config, _ = KINDS[kind]
    runs = []
    for fused in (True, False):
        scheduler = make(**config)
        if fused:
            schedulers.replace(scheduler)
        scheduler.set_timesteps(9)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).half()
        for i, t in enumerate(scheduler.timesteps):
            m = torch.tanh(x.float() + t / 1000)  # fp32 beside half at first
            x = scheduler.step(m if i < 3 else m.to(x.dtype), t, x.float() if i == 4 else x).prev_sample
        runs.append(x.float())
    assert relative_error(*runs) < 2e-3


@pytest.mark.parametrize("kind", ["ddim", "euler", "dpm++", "pndm, stable diffusion", "unipc"])
def test_half_precision(kind):
    """bf16 latents: not further from fp32's run than the scheduler's own."""
    make, config, keywords = KINDS[kind]
    exact = sample(make(**config), 6, **keywords)
    own = relative_error(sample(make(**config), 6, torch.bfloat16, **keywords), exact)
    scheduler = make(**config)
    schedulers.replace(scheduler)
    assert relative_error(sample(scheduler, 6, torch.bfloat16, **keywords), exact) < 1.5 * own


def test_one_step_is_one_operation(monkeypatch):
    """Not the scheduler's own arithmetic: the kernel is reached, once a step; thrice for UniPC."""
    calls = []
    step = ops.diffusion_step
    monkeypatch.setattr(ops, "diffusion_step", lambda *a, **k: calls.append(1) or step(*a, **k))
    expected = dict.fromkeys(("ddim", "ddim, eta", "ddpm", "euler", "euler, ancestral", "dpm++"), 5)
    expected |= {"pndm, stable diffusion": 6, "unipc": 1 + 3 * 4}  # PNDM runs the model once more
    for kind, launches in expected.items():
        make, config, keywords = KINDS[kind]
        scheduler = make(**config)
        schedulers.replace(scheduler)
        calls.clear()
        sample(scheduler, 5, **keywords)
        assert len(calls) == launches, kind
        with sdfast.disabled():
            sample(scheduler, 5, **keywords)
        assert len(calls) == launches, kind


@pytest.mark.parametrize("kind", ["ddim", "euler", "dpm++", "pndm, stable diffusion", "unipc"])
def test_copies_step_themselves(kind):
    """In the middle of a run, too; the original is where it was."""
    make, config, keywords = KINDS[kind]
    scheduler, expected = make(**config), sample(make(**config), 4, **keywords)
    schedulers.replace(scheduler)
    sample(scheduler, 7, **keywords)
    for copied in (copy.copy(scheduler), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert schedulers.is_replaced(copied) and copied.step.__self__ is copied
        assert pickle.loads(pickle.dumps(copied.step)).__func__ is copied.step.__func__
        assert relative_error(sample(copied, 4, **keywords), expected) < 2e-5
        assert (copied.num_inference_steps, scheduler.num_inference_steps) == (4, 7)
        schedulers.restore(copied)
        assert type(copied) is make and schedulers.is_replaced(scheduler)


def test_of_another_class_it_still_has_its_own_step():
    make, config, keywords = KINDS["ddim"]
    scheduler, expected = make(**config), sample(make(**config), 4, **keywords)
    schedulers.replace(scheduler)
    scheduler.__class__ = type("Mine", (type(scheduler),), {})
    assert relative_error(sample(scheduler, 4, **keywords), expected) < 2e-5
    assert torch.equal(sample(scheduler, 4, around_step=sdfast.disabled, **keywords), expected)


def test_it_is_written_down_as_diffusers(tmp_path):
    """In configurations, in a pipeline's, and by what makes another of its kind."""
    scheduler, plain = (diffusers.DDIMScheduler(beta_end=0.1) for _ in range(2))
    schedulers.replace(scheduler)
    assert isinstance(scheduler, diffusers.DDIMScheduler) and type(scheduler).__name__ == "DDIMScheduler"
    assert repr(scheduler) == repr(plain) and set(scheduler.compatibles) == set(plain.compatibles)
    assert diffusers.EulerDiscreteScheduler.from_config(scheduler.config).config.beta_end == 0.1
    assert type(scheduler).from_config(scheduler.config).config == plain.config
    pipe = diffusers.DDIMPipeline(unet=unconditional(), scheduler=scheduler)
    pipe.scheduler = copy.copy(scheduler)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDIMPipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is diffusers.DDIMScheduler and loaded.config.beta_end == 0.1


def test_unknown_scheduler_is_left():
    scheduler = diffusers.HeunDiscreteScheduler()
    with pytest.warns(UserWarning, match="HeunDiscreteScheduler"):
        report = sdfast.optimize(Pipeline(scheduler))
    assert any(row.name == "scheduler" and row.served_by != "sdfast" for row in report.rows)
    assert type(scheduler) is diffusers.HeunDiscreteScheduler


def test_excluded_scheduler_is_left():
    for patterns in ({"include": "unet*"}, {"exclude": "scheduler"}):
        scheduler = diffusers.DDIMScheduler()
        sdfast.optimize(Pipeline(scheduler), **patterns)
        assert not schedulers.is_replaced(scheduler)
