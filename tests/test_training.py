"""Training: the resumable loop, autoencoder and denoiser. tests/test_digits.py has the recipe."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from sdfast.diffusion import NoiseSchedule
from sdfast.models import AutoencoderKLConfig, CLIPTextConfig, DiagonalGaussian, UNet2DConditionConfig
from sdfast.training import trainer
from sdfast.training.ddpm import CaptionedLatents, DDPMTraining, train_ddpm
from sdfast.training.run_folder import RunFolder
from sdfast.training.trainer import EMA, Schedule, TrainingInterrupted, train
from sdfast.training.vae import VAETraining, encode, scaling_factor, train_vae

SHORT = Schedule(steps=30, learning_rate=5e-3, warmup_steps=3, max_grad_norm=100.0)


# The loop


def _toy(
    folder, *, steps=20, seed=0, ema_decay=0.9, checkpoint_steps=None, resume=True, loss=None, interrupt_at=0
):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))

    calls = 0

    def default_loss(generator):
        nonlocal calls
        calls += 1
        if calls == interrupt_at:
            signal.raise_signal(signal.SIGINT)
        x = torch.randn(16, 6, generator=generator)
        return (module(x) - x.flip(1)).square().mean()

    return train(
        module, loss or default_loss, Schedule(steps=steps, learning_rate=1e-2, ema_decay=ema_decay),
        folder=folder, settings={"kind": "toy"}, seed=seed, resume=resume, progress=False,
        checkpoint_steps=checkpoint_steps,
    )  # fmt: skip


def _same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_ema_formula():
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    ema = EMA(module, decay=0.5)
    expected = 1.0
    for n, value in enumerate([3.0, -2.0, 7.0, 0.5, 1.5, 9.0, 4.0, 4.5, 1.0, 2.0], start=1):
        nn.init.constant_(module.weight, value)
        ema.update(module)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    ema.copy_to(module)
    assert module.weight.item() == pytest.approx(expected, rel=1e-6)


def test_learning_rate_rises_then_falls_to_nothing():
    rates = [Schedule(steps=100, learning_rate=2.0, warmup_steps=10).rate(step) for step in range(100)]
    assert rates[0] < 0.2 and max(rates) == rates[10] == pytest.approx(2.0, rel=0.03) and rates[-1] < 0.001
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_randomness_depends_on_seed_and_step():
    def draw(seed, step):
        return torch.randn(4, generator=trainer.step_generator(seed, step)).tolist()

    assert draw(1, 2) == draw(1, 2)
    assert len({tuple(draw(seed, step)) for seed in range(4) for step in range(4)}) == 16


def test_a_gradient_that_is_not_finite_is_refused_before_it_reaches_weights_and_checkpoints(tmp_path):
    weight = nn.Parameter(torch.tensor([0.0, 1.0]))
    module = nn.ParameterList([weight])
    calls = 0

    def loss(_):
        nonlocal calls
        calls += 1
        return weight.square().sum() if calls < 4 else weight[0].abs().sqrt()  # 0, its derivative infinite

    with pytest.raises(FloatingPointError, match="the gradient's norm is nan at step 3"):
        train(
            module, loss, Schedule(steps=4, learning_rate=1e-2), folder=tmp_path, settings={}, seed=0,
            checkpoint_steps=1, progress=False,
        )  # fmt: skip
    assert weight.isfinite().all() and _names(tmp_path)[-1] == "checkpoint-00000003.pt"


def test_restart_forgets_the_runs_before_but_not_what_torchruns_job_has_saved(tmp_path, monkeypatch):
    _toy(tmp_path)

    def fails(_):
        raise ZeroDivisionError

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the same command, after a process died
    _toy(tmp_path, resume=False, loss=fails)  # all is done
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(ZeroDivisionError):
        _toy(tmp_path, resume=False, loss=fails)
    assert _names(tmp_path) == []


def test_only_two_checkpoints_are_kept(tmp_path):
    _toy(tmp_path, checkpoint_steps=5)
    assert _names(tmp_path) == ["checkpoint-00000015.pt", "checkpoint-00000020.pt"]


def test_finished_run_is_not_trained_again(tmp_path):
    first = _toy(tmp_path)

    def fails(_):
        raise AssertionError("trained again")

    assert _same(first, _toy(tmp_path, loss=fails))


@pytest.mark.parametrize("damage", [_cut, _flip_a_bit, lambda path: path.write_bytes(b"")])
def test_damaged_checkpoint_falls_back_and_ends_the_same(tmp_path, damage):
    reference = _toy(tmp_path / "a")
    _toy(tmp_path / "b", checkpoint_steps=8)
    damage(tmp_path / "b" / "checkpoint-00000020.pt")
    with pytest.warns(UserWarning, match="00000020.pt: damaged"):
        assert _same(reference, _toy(tmp_path / "b", checkpoint_steps=8))
    assert RunFolder(tmp_path / "b", {})._newest_first()[0].name == "checkpoint-00000020.pt"


def test_interrupted_write_leaves_no_trace(tmp_path):
    _toy(tmp_path, checkpoint_steps=10)
    (tmp_path / ".checkpoint-00000030.pt.123.7.tmp").write_bytes(b"half")
    (tmp_path / "checkpoint-00000020.pt").unlink()
    _toy(tmp_path, checkpoint_steps=10)
    assert _names(tmp_path) == ["checkpoint-00000010.pt", "checkpoint-00000020.pt"]


def test_checkpoints_of_other_settings_are_refused(tmp_path):
    _toy(tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(schedule.steps is 20 there and 30 here; seed"):
        _toy(tmp_path, steps=30, seed=1)
    _toy(tmp_path, steps=30, seed=1, resume=False)


def test_non_finite_loss_stops_with_the_step(tmp_path):
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        _toy(tmp_path, loss=lambda _: torch.tensor(float("nan"), requires_grad=True))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    reference = _toy(tmp_path / "a")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=r"stopped at step 8 of 20.*Run the same command") as error:
        _toy(tmp_path / "b", interrupt_at=8)
    assert isinstance(error.value, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is before
    assert _same(reference, _toy(tmp_path / "b"))


def test_trains_in_a_thread(tmp_path):
    # Only the main thread may handle signals; elsewhere training goes without.
    results = []
    thread = threading.Thread(target=lambda: results.append(_toy(tmp_path / "a")))
    thread.start()
    thread.join()
    assert _same(results[0], _toy(tmp_path / "b"))


# The two phases

TINY_VAE = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 8), layers_per_block=1, latent_channels=2, norm_num_groups=4, sample_size=8,
)  # fmt: skip
TINY_UNET = UNet2DConditionConfig(
    sample_size=4, in_channels=2, out_channels=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
    attention_head_dim=2,
)  # fmt: skip
TINY_TEXT = CLIPTextConfig(
    vocab_size=8, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=4, bos_token_id=6, eos_token_id=7, pad_token_id=7,
)  # fmt: skip


def _tiny_vae(folder, *, steps=30, kl_weight=0.02):
    # Two kinds of pictures: bright above, or bright to the left.
    pictures = torch.full((40, 3, 8, 8), -1.0)
    pictures[:20, :, :4] = 1.0
    pictures[20:, :, :, :4] = 1.0
    schedule = dataclasses.replace(SHORT, steps=steps)
    settings = VAETraining(schedule, batch_size=16, kl_weight=kl_weight)
    vae = train_vae(
        TINY_VAE, pictures, settings, folder=folder, data_settings={}, progress=False, checkpoint_seconds=1e9
    )
    return vae, pictures


def _tiny_ddpm(folder, *, steps=60, checkpoint_seconds=1e9, dropout=0.1):
    # Two kinds of latents, told apart by their caption.
    mean = torch.ones(40, 2, 4, 4)
    mean[20:] = -1.0
    posterior = DiagonalGaussian(torch.cat([mean, torch.full_like(mean, -6.0)], dim=1))
    data = CaptionedLatents(
        posterior, scaling_factor=1.0, labels=torch.arange(2).repeat_interleave(20),
        captions=torch.tensor([[[6, 0, 7, 7]], [[6, 1, 7, 7]]]), empty_caption=torch.tensor([6, 7, 7, 7]),
        settings={},
    )  # fmt: skip
    schedule = Schedule(steps=steps, learning_rate=1e-2, warmup_steps=5, ema_decay=0.99)
    return train_ddpm(
        TINY_UNET, TINY_TEXT, data, NoiseSchedule.linear(),
        DDPMTraining(schedule, batch_size=16, caption_dropout=dropout),
        folder=folder, progress=False, checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip


def test_vae_learns_and_measures_its_latents(tmp_path):
    early, pictures = _tiny_vae(tmp_path / "a", steps=1)
    late, _ = _tiny_vae(tmp_path / "b", steps=60)
    errors = []
    for vae in (early, late):
        with torch.no_grad():
            errors.append((vae.decode(encode(vae, pictures).mode()) - pictures).square().mean().item())
    assert errors[1] < 0.3 * errors[0]
    posterior = encode(late, pictures)
    factor = late.config.scaling_factor
    draws = [posterior.sample(torch.randn(posterior.mean.shape)) * factor for _ in range(20)]
    assert factor == scaling_factor(posterior)
    assert torch.stack(draws).std().item() == pytest.approx(1.0, abs=0.05)
    assert not late.training


def test_kl_weight_pulls_the_latents_to_the_prior(tmp_path):
    kl = []
    for weight in (0.0, 10.0):
        vae, pictures = _tiny_vae(tmp_path / str(weight), kl_weight=weight)
        kl.append(encode(vae, pictures).kl().mean().item())
    assert kl[1] < 0.5 * kl[0]


def test_ddpm_learns_what_the_caption_says(tmp_path):
    model = _tiny_ddpm(tmp_path / "late", steps=150)
    t = torch.full((2,), 900)
    alpha, sigma = (float(c[0]) for c in NoiseSchedule.linear().alpha_sigma(t))
    noise = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    x_t = sigma * noise  # as likely the one kind as the other: only the caption tells
    with torch.no_grad():
        epsilon = model(x_t, t, torch.tensor([[6, 0, 7, 7], [6, 1, 7, 7]]))
    x0 = (x_t - sigma * epsilon) / alpha
    assert x0[0].mean() - x0[1].mean() > 0.5
    early = _tiny_ddpm(tmp_path / "early", steps=1)
    empty = torch.tensor([[6, 7, 7, 7]] * 2)
    with torch.no_grad():
        errors = [(m(x_t, t, empty) - noise).square().mean() for m in (early, model)]
    assert errors[1] < 0.5 * errors[0]


def test_ddpm_without_captions_ignores_them(tmp_path):
    # With every caption dropped the network never hears of the others' tokens.
    model = _tiny_ddpm(tmp_path, steps=3, dropout=1.0)
    fresh = _tiny_ddpm(tmp_path / "fresh", steps=1, dropout=1.0)
    tokens = [m.text_encoder.text_model.embeddings.token_embedding.weight[:2] for m in (model, fresh)]
    assert torch.allclose(tokens[0], tokens[1], rtol=1e-3)


_KILLED = """
import sys, torch
torch.set_num_threads(1)
sys.path[:0] = [{tests!r}, {root!r}]
from test_training import _tiny_ddpm
_tiny_ddpm({folder!r}, checkpoint_seconds=0.0)
"""


def test_killed_run_resumes_to_the_same_bits(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        reference = _tiny_ddpm(tmp_path / "a")
        tests = Path(__file__).parent
        code = _KILLED.format(tests=str(tests), root=str(tests.parent), folder=str(tmp_path / "b"))
        process = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.monotonic() + 60
        while not list((tmp_path / "b").glob("checkpoint-*[5-9].pt")):
            assert process.poll() is None and time.monotonic() < deadline, "wrote no checkpoint"
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        reached = max(path.name for path in (tmp_path / "b").glob("checkpoint-*.pt"))
        assert reached < "checkpoint-00000060.pt"
        assert _same(reference, _tiny_ddpm(tmp_path / "b"))
    finally:
        torch.set_num_threads(threads)
