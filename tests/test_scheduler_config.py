"""Plans from a diffusers scheduler_config.json."""

import pytest
from diffusers_runs import CLASSES, STABLE_DIFFUSION, assert_same_run, config_of

from sdfast.diffusion import plan_from_config


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
