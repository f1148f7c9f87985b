"""Training an optimised U-Net: gradients within the budget, the same loss curve, and what training scripts do."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from test_optimize import TEXT_DIM, made, predict, randn

import sdfast
from sdfast.testing import assert_within_budget, relative_error


def pair(mode="training"):
    theirs, _ = made("unet")
    ours = copy.deepcopy(theirs)
    sdfast.optimize(ours, mode=mode)
    return ours.train(), theirs.train()


def gradients(model, dtype=torch.float32):
    model.zero_grad(set_to_none=True)
    x = randn(2, 4, 8, 8).to(dtype).requires_grad_()
    y = model(x, torch.tensor([3, 900]), randn(2, 5, TEXT_DIM, seed=1).to(dtype)).sample
    F.mse_loss(y, randn(2, 4, 8, 8, seed=2).to(dtype)).backward()
    return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing):
    ours, theirs = pair()
    exact = gradients(copy.deepcopy(theirs).double(), torch.float64)
    if checkpointing:
        ours.enable_gradient_checkpointing()
        theirs.enable_gradient_checkpointing()
    eager = gradients(theirs)
    with sdfast.use_numerics("exact"):
        actual = gradients(ours)
    largest = {name: g.abs().max() for name, g in exact.items()}
    assert_within_budget(*(  # each gradient in units of its own
        torch.cat([(side[name] / largest[name]).flatten() for name in exact]) for side in (actual, eager, exact)
    ))  # fmt: skip
    for side, limit in ((actual, 1e-5), (gradients(ours), 1e-4)):  # exact, and with Winograd
        for name, gradient in side.items():
            assert float((gradient - exact[name]).abs().max() / largest[name]) < limit, name


def test_loss_curve():
    """200 steps of AdamW from the same seed."""
    curves = []
    for model in pair():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        draw, curve = torch.Generator().manual_seed(0), []
        for _ in range(200):
            x0, noise = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(2))
            level = torch.rand(2, 1, 1, 1, generator=draw)
            x = level.sqrt() * x0 + (1 - level).sqrt() * noise
            loss = F.mse_loss(
                model(x, 999 * (1 - level).flatten(), x0.flatten(2)[:, :, :TEXT_DIM]).sample, noise
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    ours, theirs = curves
    assert theirs[-20:].mean() < 0.8 * theirs[:20].mean()  # it learns
    assert relative_error(ours[:20], theirs[:20]) < 1e-4
    assert relative_error(ours, theirs) < 0.02  # rounding grows from step to step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    ours, theirs = pair()
    exact = gradients(copy.deepcopy(theirs).double(), torch.float64)
    errors = []
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype):
            found = gradients(model)
        assert all(g.dtype is torch.float32 for g in found.values())
        errors.append({name: relative_error(g.double(), exact[name]) for name, g in found.items()})
    assert max(errors[0].values()) < 2 * max(errors[1].values())
    assert sum(errors[0].values()) < 1.2 * sum(errors[1].values())


def test_steps_are_seen():
    """After an optimizer's step, in inference, the new weights count."""
    ours, theirs = pair("inference")
    for model in (ours, theirs):
        with torch.no_grad():
            predict(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradients(model)
        optimizer.step()
    with torch.no_grad():
        assert relative_error(predict(ours), predict(theirs)) < 2e-5


def test_moving_average():
    ours, theirs = pair()
    for model in (ours, theirs):
        ema = EMAModel(model.parameters(), decay=0.5)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        ema.step(model.parameters())
        ema.copy_to(model.parameters())
    with torch.no_grad():
        assert relative_error(predict(ours), predict(theirs)) < 2e-5


def test_save_and_load(tmp_path):
    ours, theirs = pair("inference")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "ours/config.json").read_text() == (tmp_path / "theirs/config.json").read_text()
    loaded = type(theirs).from_pretrained(tmp_path / "ours")
    assert type(loaded) is type(theirs) and not any("_sdfast" in m.__dict__ for m in loaded.modules())
    for (name, a), b in zip(loaded.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
    ours.load_state_dict(loaded.state_dict(), strict=True)


def test_two_threads():
    """Two models, and one model, in two threads at once."""
    (first, _), (second, _) = pair("inference"), pair("inference")
    with torch.no_grad():
        expected = predict(first.eval()), predict(second.eval())
    for models in ((first, second), (first, first)):
        results = [[], []]

        def work(model, into):
            with torch.no_grad():
                for _ in range(10):
                    into.append(predict(model))

        threads = [threading.Thread(target=work, args=a) for a in zip(models, results, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for found, right in zip(results, (expected[0], expected[models[1] is second]), strict=True):
            assert len(found) == 10 and all(torch.equal(y, right) for y in found)
