"""RePaint against diffusers' scheduler and pipeline, and against the distribution that it is to sample from."""

import math

import diffusers
import pytest
import torch
from diffusers_runs import TOLERANCE, denoiser

from sdfast.diffusion import SAMPLERS, NoiseSchedule, ddim, ddpm, sample
from sdfast.diffusion.repaint import RePaint, resampled_steps
from sdfast.models import UNet2D
from sdfast.models.unet import UNet2DConfig


def seeded(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def run(repaint, model, x0, mask, seed, x_T=None):
    draw = seeded(seed)
    start = (draw(x0) if x_T is None else x_T) * repaint.plan.initial_sigma
    noise_of_step, on_step = repaint.callbacks(x0, mask, draw)
    return sample(repaint.plan, model, start, draw_noise=noise_of_step, on_step=on_step)


@pytest.mark.parametrize(
    ("steps", "jump_length", "resamplings"), [(50, 10, 10), (250, 10, 10), (7, 3, 2), (7, 2, 1), (9, 3, 4)]
)
def test_the_walk_is_diffusers(steps, jump_length, resamplings):
    walk = resampled_steps(steps, jump_length, resamplings)
    jumps = -(-steps // jump_length) - 1
    assert len(walk) == steps + (resamplings - 1) * jump_length * jumps
    scheduler = diffusers.RePaintScheduler(num_train_timesteps=steps)
    scheduler.set_timesteps(steps, jump_length, resamplings)
    visited = []
    for row, jump in walk:
        visited.append(steps - 1 - row)
        visited += range(steps - row, steps - row + jump)
    assert visited == scheduler.timesteps.tolist()


def test_whole_runs_are_diffusers_pipeline():
    """The pixel model, over all steps of a short schedule, where diffusers' jumps are exact."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    other = diffusers.UNet2DModel(**sizes, **blocks, attention_head_dim=8).eval()
    ours = UNet2D(UNet2DConfig(**sizes, **blocks, attention_head_dim=8)).eval()
    ours.load_state_dict(other.state_dict())
    T, options = 12, {"jump_length": 3, "jump_n_sample": 3}
    scheduler = diffusers.RePaintScheduler(num_train_timesteps=T, clip_sample=True)
    pipe = diffusers.RePaintPipeline(other, scheduler)
    pipe.set_progress_bar_config(disable=True)
    x0 = torch.rand(2, 3, 8, 8) * 2 - 1
    known = torch.zeros(1, 1, 8, 8)
    known[..., :4] = 1
    for eta in (0.0, 1.0):
        generator = torch.Generator().manual_seed(3)
        expected = pipe(x0, known, T, eta=eta, generator=generator, output_type="np", **options).images
        plan = ddim(NoiseSchedule.linear(T), T, eta=eta, clip_sample=True)
        actual = run(RePaint(plan, 3, 3), ours, x0, known == 0, 3)
        actual = (actual / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        assert (actual - torch.from_numpy(expected)).abs().max() < TOLERANCE
        assert torch.equal(actual[:, :, :4], (x0 / 2 + 0.5).permute(0, 2, 3, 1)[:, :, :4])


def test_steps_that_skip_are_diffusers_scheduler():
    """Without jumps; the ancestral sampler is the scheduler's η = 1."""
    T, steps = 1000, 20
    scheduler = diffusers.RePaintScheduler(num_train_timesteps=T, eta=1.0, clip_sample=False)
    scheduler.set_timesteps(steps, 5, 1)
    x0, known = torch.randn(2, 3, 6, 5), (torch.rand(1, 1, 6, 5) < 0.5).float()
    x = expected = torch.randn(2, 3, 6, 5)
    generator = torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        output = denoiser(expected, t)
        expected = scheduler.step(output, t, expected, x0, known, generator).prev_sample
    repaint = RePaint(ddpm(NoiseSchedule.linear(T), steps, variance="fixed_small"), 5, 1)
    actual = run(repaint, denoiser, x0, known == 0, 7, x_T=x)
    assert (actual - expected).abs().max() / expected.abs().max() < TOLERANCE


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "euler_a"])
def test_a_jump_reaches_its_level(sampler):
    """Up by single levels is q(x_t | x_s) as a whole: x_0 noised to a level and lifted is x_0 noised further."""
    base = SAMPLERS[sampler](NoiseSchedule.scaled_linear(), 20)
    repaint = RePaint(base, 5, 2)
    x0 = torch.full((1,), 0.7, dtype=torch.float64)
    for level in (20, 11):  # the clean one, and one on the way
        x, variance = base.add_noise(x0, torch.zeros_like(x0), level), 0.0
        if level < 20:
            variance = base.noise_sigma[level].item() ** 2
        for row in range(level, level - 5, -1):
            scaled = repaint._up(x, torch.zeros_like(x), row)
            std = (repaint._up(x, torch.ones_like(x), row) - scaled).item()
            variance = variance * (scaled / x).item() ** 2 + std**2
            x = scaled
        assert math.isclose(x.item(), 0.7 * base.noise_alpha[level - 5].item(), rel_tol=1e-9)
        assert math.isclose(math.sqrt(variance), base.noise_sigma[level - 5].item(), rel_tol=1e-9)


def levels_reached(plan):
    """Mean and standard deviation of x' after each step from its level, for x_0 = 1, which the model knows."""
    k = dict(zip(("x0_x", "x0_m", "x0", "x", "m", "previous_x0", "noise"), plan.coefficients.T, strict=True))
    mean = k["x0"] + k["x"] * plan.noise_alpha + k["m"]  # a model that predicts x_0 gives 1
    std = ((k["x"] * plan.noise_sigma) ** 2 + k["noise"] ** 2).sqrt()
    return torch.stack([mean, std])


def levels_expected(plan):
    """Those at which the next step begins, and the clean one, to which what is known is noised."""
    clean = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    return torch.cat([torch.stack([plan.noise_alpha, plan.noise_sigma])[:, 1:], clean], dim=1)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddpm", {"variance": "fixed_small"}),
        ("ddpm", {"variance": "fixed_small", "spacing": "linspace"}),
        ("ddim", {}),
        ("ddim", {"eta": 1.0}),
        ("ddim", {"spacing": "trailing"}),
        ("euler", {}),
        ("euler_a", {}),
    ],
)
def test_a_step_reaches_the_level_of_the_next(sampler, options):
    """What is painted and what is known have one level, as the steps of these samplers have it."""
    plan = SAMPLERS[sampler](NoiseSchedule.scaled_linear(), 10, prediction="sample", **options)
    torch.testing.assert_close(levels_reached(plan), levels_expected(plan), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("steps", "options", "rows"),
    [
        (10, {"spacing": "linspace"}, range(9)),  # t = 999 goes to 899, the next is 888
        (30, {"spacing": "trailing"}, range(1, 30, 3)),  # 33 down, the next is 34 down
        (10, {"set_alpha_to_one": False}, [9]),
    ],
)
def test_steps_of_ddim_that_do_not(steps, options, rows):
    """Those that the module names, and no others."""
    plan = ddim(NoiseSchedule.scaled_linear(), steps, prediction="sample", **options)
    other = (levels_reached(plan) - levels_expected(plan)).abs().amax(dim=0) > 1e-6
    assert other.nonzero()[:, 0].tolist() == list(rows)


def test_what_is_painted_comes_from_the_conditional():
    """Two correlated normals, one known, and the exact denoiser: RePaint's samples follow p(x_1 | x_2).

    Blending without resampling does not: what it has painted does not know enough of what is known.
    """
    rho, known = 0.95, 1.5
    schedule = NoiseSchedule.linear(200, beta_end=0.1)

    def exact(x, t):
        alpha, sigma = schedule.alpha_sigma(int(t))
        covariance = alpha**2 * torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)
        precision = torch.linalg.inv(covariance + sigma**2 * torch.eye(2, dtype=torch.float64))
        return (sigma * x.double() @ precision).to(x.dtype)  # ε = -σ ∇ ln p(x_t)

    x0 = torch.tensor([0.0, known]).expand(4000, 2)
    mask = torch.tensor([True, False])
    base = ddpm(schedule, 50, variance="fixed_small")
    means, stds = {}, {}
    for resamplings in (1, 10):
        painted = run(RePaint(base, 5, resamplings), exact, x0, mask, 0)[:, 0]
        means[resamplings], stds[resamplings] = painted.mean().item(), painted.std().item()
    expected, std = rho * known, math.sqrt(1 - rho**2)
    assert abs(means[10] - expected) < 0.05 * expected and abs(stds[10] - std) < 0.05 * std
    assert abs(means[1] - expected) > 2 * abs(means[10] - expected)


def test_dtypes_and_masks():
    base = ddpm(NoiseSchedule.linear(), 6)
    x0 = torch.randn(1, 2, 4, 4).bfloat16()
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    out = run(RePaint(base, 2, 2), lambda x, _: x, x0, mask, 0)
    assert out.dtype == torch.bfloat16 and torch.equal(out, x0)
    with pytest.raises(TypeError, match="mask: got dtype torch.float32, expected bool"):
        RePaint(base, 2, 2).callbacks(x0, mask.float(), torch.randn_like)


@pytest.mark.parametrize(
    ("jump_length", "resamplings", "message"),
    [
        (6, 2, "jump_length: got 6 for 6 steps, expected less"),
        (0, 2, "jump_length: got 0"),
        (2, 0, "resamplings: got 0"),
        (2.0, 2, "jump_length: got 2.0"),
    ],
)
def test_bad_numbers(jump_length, resamplings, message):
    with pytest.raises(ValueError, match=message):
        RePaint(ddpm(NoiseSchedule.linear(), 6), jump_length, resamplings)


def test_samplers_with_memory_are_refused():
    with pytest.raises(ValueError, match="sampler: it remembers the step before"):
        RePaint(SAMPLERS["dpm++2m"](NoiseSchedule.linear(), 20))
