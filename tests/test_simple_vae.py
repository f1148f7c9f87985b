"""The VAE of §2.5: the networks, their training on digits, the pictures, and `sdfast train vae`."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sdfast import cli
from sdfast.diffusion import as_posterior, evidence_lower_bound
from sdfast.models import SimpleVAE, SimpleVAEConfig
from sdfast.models.checkpoint import CheckpointError, load_model, save_model
from sdfast.training.data import Digits
from sdfast.training.digit_vae import as_pictures, train_digit_vae
from sdfast.training.simple_vae import SimpleVAETraining, evaluate, train_simple_vae
from sdfast.training.trainer import Schedule

KINDS = ("fc", "conv")


def make(seed=0, **options):
    torch.manual_seed(seed)
    return SimpleVAE(SimpleVAEConfig(**options))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind):
    vae = make(kind=kind, latent_dim=3, image_size=12, channels=2, width=8)
    x = torch.rand(5, 2, 12, 12)
    mean, logvar = vae.encode(x)
    assert mean.shape == logvar.shape == (5, 3)
    assert vae.decode(mean).shape == x.shape


@pytest.mark.parametrize("latent_dim", [1, 4])
def test_the_cholesky_factor_is_one(latent_dim):
    vae = make(covariance="full", latent_dim=latent_dim)
    mean, L = vae.encode(8 * torch.rand(6, 1, 8, 8))
    assert mean.shape == (6, latent_dim) and L.shape == (6, latent_dim, latent_dim)
    assert torch.equal(L, L.tril())
    assert (L.diagonal(dim1=1, dim2=2) > 0).all()
    if latent_dim > 1:
        rows, columns = torch.tril_indices(latent_dim, latent_dim, -1)
        below = L[:, rows, columns]
        assert below.abs().min() > 0 and below.flatten().unique().numel() == below.numel()
    # What Cholesky's algorithm finds in L Lᵀ is L.
    torch.testing.assert_close(torch.linalg.cholesky((L @ L.mT).double()), L.double(), rtol=1e-4, atol=1e-5)


def test_a_factor_without_entries_off_the_diagonal_is_the_diagonal_model():
    diagonal, full = make(latent_dim=3), make(latent_dim=3, covariance="full")
    state = full.state_dict()
    for name, weight in diagonal.state_dict().items():
        state[name] = weight.clone()
        if weight.shape[0] == 6:  # mean and log-variance; the other three outputs stay at zero
            state[name] = torch.cat([weight, torch.zeros(3, *weight.shape[1:])])
    full.load_state_dict(state)
    x, noise = torch.rand(4, 1, 8, 8), torch.randn(2, 4, 3)
    ours, theirs = (
        evidence_lower_bound(x, as_posterior(*vae.encode(x)), vae.decode, noise) for vae in (full, diagonal)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_reaches_every_parameter(kind, covariance):
    vae = make(kind=kind, covariance=covariance, latent_dim=3, width=4)
    x = torch.rand(4, 1, 8, 8)
    (
        -evidence_lower_bound(x, as_posterior(*vae.encode(x)), vae.decode, torch.randn(1, 4, 3)).total.mean()
    ).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_an_untrained_encoder_that_overflows_gives_finite_numbers():
    for covariance in ("diagonal", "full"):
        vae = make(covariance=covariance, latent_dim=2)
        with torch.no_grad():
            vae.encoder[-1].bias[2:4] = torch.tensor([1e4, -1e4])  # the log-variances
        x = torch.rand(3, 1, 8, 8)
        bound = evidence_lower_bound(
            x, as_posterior(*vae.encode(x)), vae.decode, torch.randn(1, 3, 2), likelihood="bernoulli"
        )
        bound.total.sum().backward()
        assert bound.total.isfinite().all()
        assert all(p.grad.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, tmp_path):
    vae = make(kind=kind, covariance="full", likelihood="gaussian", std=0.2, latent_dim=3, width=4)
    save_model(vae, tmp_path)
    again = load_model(SimpleVAE, tmp_path)
    assert again.config == vae.config
    x = torch.rand(2, 1, 8, 8)
    for ours, theirs in zip(again.encode(x), vae.encode(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "transformer"}))
    with pytest.raises(CheckpointError, match="kind: got 'transformer', expected one of fc, conv"):
        load_model(SimpleVAE, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"covariance": "block"}, "covariance: got 'block', expected one of diagonal, full"),
        ({"likelihood": "laplace"}, "likelihood: got 'laplace', expected one of gaussian, bernoulli"),
        ({"latent_dim": 0}, "latent_dim: got 0, expected at least 1"),
        ({"std": 0.0}, "std: got 0.0, expected a number > 0"),
        ({"kind": "conv", "image_size": 10}, "image_size: got 10, expected a multiple of 4"),
    ],
)
def test_errors_name_the_setting(options, message):
    with pytest.raises(ValueError, match=message):
        SimpleVAEConfig(**options)


# Training

SHORT = SimpleVAETraining(Schedule(steps=60, learning_rate=5e-3, warmup_steps=3, max_grad_norm=100.0), 32)


def stripes(n=64):
    """Black and white pictures of two kinds, of ln 2 nats each."""
    x = torch.zeros(n, 1, 8, 8)
    x[::2, :, ::2], x[1::2, :, :, ::2] = 1, 1
    return x


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_training_finds_what_there_is_to_know(covariance, tmp_path):
    """Two pictures, equally likely: ln p(x) is at most -ln 2 on average, and training comes near."""
    config = SimpleVAEConfig(covariance=covariance, width=32)
    settings = dataclasses.replace(SHORT, schedule=dataclasses.replace(SHORT.schedule, steps=300))
    vae = train_simple_vae(config, stripes(), settings, folder=tmp_path, data_settings={}, progress=False)
    result = evaluate(vae, stripes(), samples=50)
    assert result.elbo == pytest.approx(result.reconstruction - result.kl)
    assert -2.0 < result.elbo < result.importance_weighted + 0.05
    assert result.importance_weighted < -0.6  # -ln 2 is -0.69
    assert result.kl > 0.5  # which of the two it is has to go through z


@pytest.mark.parametrize(
    ("pictures", "samples", "message"),
    [(1, 5, "pictures: got 1, expected at least 2"), (2, 0, "samples: got 0, expected at least 1")],
)
def test_too_few_to_evaluate(pictures, samples, message):
    """One picture has no standard error: NaN, which is no JSON."""
    with pytest.raises(ValueError, match=message):
        evaluate(SimpleVAE(SimpleVAEConfig(width=8)), stripes(pictures), samples=samples)


def test_training_resumes_to_the_bit(tmp_path):
    def run(folder, **options):
        return train_simple_vae(
            SimpleVAEConfig(width=8), stripes(), SHORT, folder=folder, data_settings={}, progress=False, **options
        )  # fmt: skip

    whole = run(tmp_path / "a", checkpoint_seconds=0.0)
    for late in sorted((tmp_path / "a").glob("*.pt"))[1:]:
        late.unlink()
    again = run(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="model.width is 8 there and 9 here"):
        train_simple_vae(
            SimpleVAEConfig(width=9), stripes(), SHORT, folder=tmp_path / "a", data_settings={}, progress=False
        )  # fmt: skip


def test_pictures_of_each_likelihood():
    digits = Digits(torch.tensor([[0.0, 7.0], [8.0, 16.0]])[None], torch.tensor([3]))
    assert as_pictures(digits, "gaussian").tolist() == [[[[0.0, 0.4375], [0.5, 1.0]]]]
    assert as_pictures(digits, "bernoulli").tolist() == [[[[0.0, 0.0], [1.0, 1.0]]]]


# The command


def test_command_trains_says_how_well_and_draws(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    folder = tmp_path / "vae"
    command = ["train", "vae", "-o", str(folder), "--steps", "150", "--samples", "20", "--plot"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", out)]
    total, reconstruction, minus_kl, evidence = numbers[:4]
    assert total == pytest.approx(reconstruction + minus_kl, abs=2e-3) and minus_kl < 0
    assert total < evidence and -28 < total < -20  # 44.4 nats would know nothing
    record = json.loads((folder / "evaluation.json").read_text())
    assert record["nats_per_picture"]["elbo"] == pytest.approx(total, abs=1e-3)
    assert record["nats_per_picture"]["pictures"] == 297
    names = ["latents", "plane", "reconstructions", "samples", "walk"]
    assert sorted(path.stem for path in folder.glob("*.png")) == names
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    sheet = np.asarray(Image.open(folder / "reconstructions.png")).astype(float)
    assert sheet.shape == (2 * 50 + 2, 10 * 50 + 2)
    above, below = sheet[2:50], sheet[52:100]
    assert set(np.unique(above)) == {0, 255}  # the pictures themselves
    # The decoder's are nearer to what they should show than grey is, and no two neighbours are the same.
    assert np.abs(above - below).mean() < 0.8 * np.abs(above - above.mean()).mean()
    walk = np.asarray(Image.open(folder / "walk.png"))
    assert (walk[2:50, 2:50] != walk[2:50, 452:500]).any()
    # The same again takes no training, and gives the same model.
    before = (folder / "model.safetensors").read_bytes()
    assert cli.main([*command[:-1], "--threads", "1"]) == 0
    assert (folder / "model.safetensors").read_bytes() == before
    assert cli.main([*command, "--kind", "conv"]) == 2
    assert "model.kind is fc there and conv here" in capsys.readouterr().err


@pytest.mark.parametrize("unfinished", [False, True])
def test_command_leaves_other_models_alone(tmp_path, capsys, monkeypatch, unfinished):
    def train(*_, **__):
        raise ValueError("it begins")

    monkeypatch.setattr("sdfast.training.digit_vae.train_digit_vae", train)
    command = ["train", "vae", "-o", str(tmp_path)]
    other = {"model_type": "clip_text_model"}
    save_model(make(width=4), tmp_path)
    if unfinished:
        (tmp_path / "checkpoints").mkdir()
    for config, message in ((None, "it begins"), (other, "holds something else than such a model")):
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        assert cli.main(command) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert cli.main(command) == 2
    assert ("it begins" in capsys.readouterr().err) == unfinished


def test_more_latents_than_two_need_no_matplotlib(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = {"steps": 2, "samples": 2, "plot": True, "progress": False}
    made = train_digit_vae(tmp_path / "a", latent_dim=3, **options)
    assert [path.stem for path in made.pictures] == ["reconstructions", "samples", "walk"]
    with pytest.raises(ImportError, match=r"pip install sdfast\[plot\]"):
        train_digit_vae(tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latent-dim", "0"], "--latent-dim: got 0, expected at least 1"),
        (["--std", "0.1"], "--std: needs --likelihood gaussian"),
        (["--likelihood", "gaussian", "--std", "nan"], "--std: got nan, expected a number > 0"),
        (["--kind", "resnet"], "argument --kind: invalid choice: 'resnet'"),
        (["--output", "/dev/null/vae"], "--output: /dev/null is no folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert cli.main(["train", "vae", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
