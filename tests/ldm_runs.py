"""Small runs of `sdfast train ldm`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tiny_pipelines
import torch
from safetensors.torch import load_file

from sdfast.training.ldm import DataOptions, LDMTraining, Running, Trained, train_ldm
from sdfast.training.optimizer import Schedule

QUIET = Running(progress=False)


def photos(folder: Path) -> Path:
    """Nine pictures of different shapes with their captions; the second is cut short, the third is none."""
    for i in range(9):
        tiny_pipelines.picture(20 + 4 * (i % 3), 28 - 4 * (i % 3)).rotate(40 * i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"seven and {i}\n")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:300])
    (folder / "2.png").write_bytes(b"no image")
    return folder


def trainer(model: Path, photos: Path, folder: Path) -> Callable[..., Trained]:
    """Five steps of the U-Net, or what the arguments say."""
    default_model = model

    def run(
        name="out",
        *,
        data=photos,
        running=QUIET,
        model=default_model,
        seed=0,
        options=None,
        steps=5,
        lr=1e-3,
        **settings,
    ):
        schedule = Schedule(steps=steps, learning_rate=lr, warmup_steps=1, ema_decay=0.5, decay="constant")
        return train_ldm(
            data, folder / name, model=model, run_dir=folder / f"{name}-run", running=running, seed=seed,
            training=LDMTraining(schedule=schedule, **{"batch_size": 4} | settings),
            options=options or DataOptions(), cache_dir=folder / "cache",
        )  # fmt: skip

    return run


def weights(folder: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
