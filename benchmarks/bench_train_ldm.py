"""How far is the gradient of a training step over two processes from that of one?

The shipped digits model, sixteen digits with their captions, one step of `sdfast train ldm` (Algorithm 1,
min-SNR weights): in one process; over two gloo processes by DDP and by FSDP2; in micro-batches; with
activations computed again; and in bf16. Each row has the relative error ‖g - g₁‖ / ‖g₁‖ of the whole
gradient.

    python benchmarks/bench_train_ldm.py [--no-record]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _record import results_path, write_json

from sdfast.diffusion import NoiseSchedule
from sdfast.loading import digits_folder
from sdfast.training.buckets import Batches
from sdfast.training.captions import WORDS
from sdfast.training.data import IMAGE_SIZE, enlarge, load_digits
from sdfast.training.distributed import ALONE, Parallel, Processes
from sdfast.training.images import CaptionedImage
from sdfast.training.ldm_losses import Denoising, SharedLoss
from sdfast.training.ldm_parts import choose_trained, load_parts, texts_of

BATCH = 16
# What is compared with one process at once in fp32, and how far it may be off.
ROUNDING, HALF = 1e-5, 0.1
ROWS: list[tuple[str, dict[str, Any], float]] = [
    ("micro-batches of 4", {"micro_batch": 4}, ROUNDING),
    ("activations computed again", {"recompute": True}, 0.0),
    ("bf16 copies of the weights", {"precision": "bf16"}, HALF),
    ("torch.autocast to bf16", {"precision": "autocast"}, HALF),
    ("DDP, two processes", {"kind": "ddp"}, ROUNDING),
    ("DDP, two processes, micro-batches of 4", {"kind": "ddp", "micro_batch": 4}, ROUNDING),
    ("FSDP2, two processes", {"kind": "fsdp"}, ROUNDING),
    ("FSDP2, two processes, activations computed again", {"kind": "fsdp", "recompute": True}, ROUNDING),
]


def gradient(
    group: Processes,
    *,
    kind: str | None = None,
    precision: str = "fp32",
    recompute: bool = False,
    micro_batch: int | None = None,
) -> torch.Tensor:
    """Of the first step, all parameters in a row, float64."""
    parts = load_parts(digits_folder(), prediction=None, device=group.device)
    choose_trained(parts, "unet")
    digits = load_digits(0)[0]
    with torch.no_grad():
        posterior = parts["vae"].encode(enlarge(digits.images[:BATCH]))
    moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
    images = [CaptionedImage(Path(), "", f"a handwritten {WORDS[label]}") for label in digits.labels[:BATCH]]
    sizes = [(IMAGE_SIZE, IMAGE_SIZE)] * BATCH
    unet = parts["unet"].train()
    model = Parallel(unet, kind, precision, group, recompute=recompute)
    loss = Denoising(
        model, images, sizes, sizes, moments.__getitem__, texts_of(parts),
        NoiseSchedule.from_config(parts["scheduler"]), parts["vae"].config.scaling_factor, 0.1, 5.0,
        group.device,
    )  # fmt: skip
    for value in SharedLoss(model, Batches([0] * BATCH, BATCH, 0), BATCH, micro_batch, loss, group, 0)(0):
        value.backward()
    grads = [p.grad.full_tensor() if kind == "fsdp" else p.grad for p in unet.parameters()]
    return torch.cat([grad.flatten() for grad in grads]).double()


def worker(rank: int, store: str, output: str) -> None:
    """One of two processes: the rows that need two, written by the first."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of strides and views, see sdfast.training.distributed
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {name: gradient(Processes(rank, 2), **how) for name, how, _ in ROWS if "kind" in how}
    if rank == 0:
        torch.save(found, output)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "two.pt"
        mp.start_processes(worker, (f"{folder}/store", str(output)), nprocs=2, start_method="spawn")
        found = torch.load(output)
    torch.set_num_threads(1)
    expected = gradient(ALONE)
    rows = []
    for name, how, most in ROWS:
        actual = found[name] if name in found else gradient(ALONE, **how)
        error = float((actual - expected).norm() / expected.norm())
        print(f"{name}: {error:.2e}")
        rows.append({"name": name, "relative_error": error, "allowed": most})
        if not (math.isfinite(error) and error <= most):
            raise SystemExit(f"{name}: the gradient is {error:.2e} off, allowed are {most:.0e}")
    if not arguments.no_record:
        path = results_path("train_ldm")
        write_json(path, rows, model="digits", batch_size=BATCH, parameters=expected.numel())
        print(path)


if __name__ == "__main__":
    main()
