"""sample_on_device: the latents of sample, bit for bit, and nothing that comes from the host in between."""

import pytest
import torch
from diffusers_runs import CLASSES, start
from on_device import OnTheDevice
from recorded_graphs import Recorder, Scaled

from sdfast import diffusion, graphs
from sdfast.diffusion import SAMPLERS, NoiseSchedule, sample, sample_on_device
from sdfast.diffusion.device_loop import LoopStep, repeat_step
from sdfast.dispatch import use_backend

SEEDS = torch.tensor([11, -12])


def denoiser(x, timestep):
    """As that of diffusers_runs, without reading the timestep on the host."""
    t = timestep.float() / 1000
    wide = x.float()
    y = torch.tanh(0.6 * wide + 0.3 * wide.roll(1, -1)) * (0.8 + 0.2 * t) + 0.1 * torch.sin(3 * wide + t)
    return y.to(x.dtype)


def halves(x, timestep):
    """The unconditional and the conditional output of a batch that holds the latents twice."""
    unconditional, conditional = x.chunk(2)
    return torch.cat([denoiser(unconditional, timestep), denoiser(0.9 * conditional + 0.1, timestep)])


def both_ways(plan, x, guidance_scale, seeds=SEEDS, **options):
    if guidance_scale is None:
        plain, on_device = denoiser, denoiser
    else:
        plain, on_device = lambda x, t: halves(torch.cat([x, x]), t), halves
    common = {"guidance_scale": guidance_scale, "seeds": seeds}
    return sample(plan, plain, x, **common), sample_on_device(plan, on_device, x, **common, **options)


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("guidance_scale", [None, 7.5])
@pytest.mark.parametrize("name", CLASSES)
def test_is_the_loop_of_sample(name, guidance_scale, dtype, backend):
    plan = SAMPLERS[name](NoiseSchedule.scaled_linear(), 7)
    x = (start() * plan.initial_sigma).to(dtype)
    if backend is None:
        expected, actual = both_ways(plan, x, guidance_scale)
    else:
        with use_backend(backend):
            expected, actual = both_ways(plan, x, guidance_scale)
    assert actual.dtype == dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("make", [diffusion.ddpm, diffusion.ddim])
@pytest.mark.parametrize("guidance_scale", [None, 7.5])
def test_clip_strength_and_layout(make, guidance_scale):
    plan = make(NoiseSchedule.linear(), 12, clip_sample=True, clip_sample_range=0.8, strength=0.6)
    x = start().to(memory_format=torch.channels_last)
    expected, actual = both_ways(plan, x, guidance_scale)
    assert len(plan) == 7 and torch.equal(actual, expected) and actual.stride() == expected.stride()
    free = make(NoiseSchedule.linear(), 12, strength=0.6)
    assert not torch.equal(both_ways(free, x, guidance_scale)[1], actual)


def test_more_steps_than_a_table_has_rows():
    for steps in (63, 64, 65):
        plan = SAMPLERS["euler_a"](NoiseSchedule.linear(), steps)
        expected, actual = both_ways(plan, start() * plan.initial_sigma, None)
        assert torch.equal(actual, expected)


def test_noise_is_not_added_where_the_plan_draws_none():
    plan = SAMPLERS["euler_a"](NoiseSchedule.linear(), 4)
    plan.draws_noise[1:3] = False
    assert (plan.coefficients[1:3, 6] != 0).all()
    expected, actual = both_ways(plan, start(), None)
    assert torch.equal(actual, expected)


class Table:
    """Times made of the timesteps by a model, as a pytree with an `at`."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, step):
        return self.rows[step]

    def at(self, step):
        return self.rows.index_select(0, step[None])[0]


torch.utils._pytree.register_pytree_node(Table, lambda t: ([t.rows], None), lambda rows, _: Table(*rows))


def test_the_denoiser_may_be_given_something_else_and_something_more():
    plan = diffusion.euler(NoiseSchedule.scaled_linear(), 4)
    table = Table(torch.stack([plan.timesteps.float(), torch.ones(4)], 1))

    def conditioned(x, time, shift, more):
        return denoiser(x, time[0] * time[1]) + shift * more["by"][0]

    shift, more = torch.tensor(0.25), {"by": [torch.tensor(2.0)]}
    actual = sample_on_device(plan, conditioned, start(), conditioning=[shift, more], timesteps=table)
    assert torch.equal(actual, sample(plan, lambda x, t: denoiser(x, t) + 0.5, start()))
    assert torch.equal(
        actual, sample(plan, lambda x, time: conditioned(x, time, shift, more), start(), timesteps=table)
    )


@pytest.mark.parametrize("name", CLASSES)
def test_one_graph_for_all_steps_and_any_number_of_them(name, monkeypatch):
    """Constants are the graph's inputs: other tables, seeds and guidance capture nothing."""
    monkeypatch.setattr(graphs, "_can_capture", lambda owner, tensors: True)
    cache, model = Recorder(), Scaled()

    def repeat(*arguments):
        return graphs.repeat(*arguments, model=model, cache=cache)

    for steps, guidance_scale, seeds in ((7, 7.5, SEEDS), (12, 2.0, SEEDS + 1)):
        plan = SAMPLERS[name](NoiseSchedule.scaled_linear(), steps)
        expected, actual = both_ways(plan, start(), guidance_scale, seeds, repeat=repeat)
        assert torch.equal(actual, expected)
    assert (cache.captured, cache.replayed) == (1, 19)
    both_ways(plan, start()[..., :4], 2.0, repeat=repeat)
    assert (cache.captured, cache.replayed) == (2, 31)


@pytest.mark.parametrize("guidance_scale", [None, 7.5])
@pytest.mark.parametrize("name", ["ddpm", "euler_a"])
def test_noise_that_was_drawn_before_is_that_of_each_step(name, guidance_scale, monkeypatch):
    """Where a step draws none its row counts for nothing; other noise is an input of the same graph."""
    monkeypatch.setattr(graphs, "_can_capture", lambda owner, tensors: True)
    cache, model = Recorder(), Scaled()
    x = start().to(memory_format=torch.channels_last)
    for steps in (7, 65, 9):
        plan = SAMPLERS[name](NoiseSchedule.scaled_linear(), steps)
        noise = torch.randn(steps, *x.shape)
        rows = iter(noise[plan.draws_noise])
        plain = denoiser if guidance_scale is None else lambda x, t: halves(torch.cat([x, x]), t)
        expected = sample(plan, plain, x, guidance_scale=guidance_scale, draw_noise=lambda _, r=rows: next(r))
        actual = sample_on_device(
            plan, denoiser if guidance_scale is None else halves, x, guidance_scale=guidance_scale, noise=noise,
            repeat=lambda *arguments: graphs.repeat(*arguments, model=model, cache=cache),
        )  # fmt: skip
        assert torch.equal(actual, expected) and next(rows, None) is None
    assert (cache.captured, cache.replayed) == (2, 81)


def test_on_step_sees_the_latents():
    plan = SAMPLERS["ddim"](NoiseSchedule.linear(), 5)
    seen, expected = [], []
    result = sample_on_device(plan, denoiser, start(), on_step=lambda *now: seen.append(now))
    sample(plan, denoiser, start(), on_step=lambda *now: expected.append(now))
    assert [now[:2] for now in seen] == [(i, 5) for i in range(5)]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(seen, expected, strict=True))
    kept = result.clone()

    def spoil(i, n, latents):
        latents.zero_()

    assert torch.equal(sample_on_device(plan, denoiser, start(), on_step=spoil), kept)


@pytest.mark.parametrize("name", CLASSES)
def test_a_step_reads_nothing_on_the_host(name):
    plan = SAMPLERS[name](NoiseSchedule.linear(), 5)

    def watched(step, times, state, constants, observe):
        with OnTheDevice():
            return repeat_step(step, times, state, constants, observe)

    options = {"guidance_scale": 3.0, "seeds": SEEDS}
    with use_backend("torch"):
        result = sample_on_device(plan, halves, start(), **options, repeat=watched)
        assert torch.equal(result, sample_on_device(plan, halves, start(), **options))
    for reads, name in (
        (lambda x, t: halves(x, t) * float(t), "_local_scalar_dense"),
        (lambda x, t: halves(x, torch.tensor(3)), "lift_fresh"),
    ):
        with pytest.raises(AssertionError, match=name), use_backend("torch"):
            sample_on_device(plan, reads, start(), **options, repeat=watched)


def test_records_no_graph_and_leaves_its_inputs_alone():
    plan = SAMPLERS["dpm++2m"](NoiseSchedule.linear(), 5)
    x = start().requires_grad_()
    kept, table = x.detach().clone(), plan.coefficients.clone()
    assert not sample_on_device(plan, denoiser, x).requires_grad
    assert torch.equal(x.detach(), kept) and torch.equal(plan.coefficients, table)
    assert sample_on_device(plan, denoiser, torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_steps_of_one_denoiser_and_clip_are_equal():
    assert LoopStep(denoiser, 1.0) == LoopStep(denoiser, 1.0) != LoopStep(denoiser, None)
    assert len({LoopStep(denoiser, 1.0), LoopStep(denoiser, 1.0), LoopStep(halves, 1.0)}) == 2


def test_errors_name_the_argument():
    ancestral = SAMPLERS["euler_a"](NoiseSchedule.linear(), 3)
    plan = SAMPLERS["ddim"](NoiseSchedule.linear(), 3)
    for options, error, message in (
        ({"plan": ancestral}, ValueError, r"seeds: got None, expected \(N,\) or noise, as this"),
        ({"seeds": SEEDS, "noise": start()[None]}, ValueError, "seeds: got them beside noise"),
        ({"noise": start()}, ValueError, r"noise: got shape \(2, 3, 6, 5\), expected \(3, 2, 3, 6, 5\)"),
        ({"seeds": SEEDS.int()}, TypeError, "seeds: got dtype torch.int32, expected torch.int64"),
        ({"seeds": SEEDS[:1]}, ValueError, r"seeds: got shape \(1,\), expected \(2,\)"),
        ({"timesteps": Table(torch.ones(2))}, ValueError, "timesteps: got 2, expected 3, one for each step"),
        ({"guidance_scale": float("inf")}, ValueError, "guidance_scale: got inf, expected a finite number"),
        ({"guidance_scale": 2.0}, ValueError, r"model_output: got shape \(2, 3, 6, 5\), expected \(4, 3"),
        ({"on_step": lambda i, n, x: x}, ValueError, "on_step: returned something, expected None"),
        ({"latents": [1.0]}, TypeError, "latents: got list, expected a torch.Tensor"),
    ):
        latents = options.pop("latents", start())

        def broken(x, t, wanted=latents):
            return denoiser(x[: len(wanted)], t)

        with pytest.raises(error, match=message):
            sample_on_device(options.pop("plan", plan), broken, latents, **options)
