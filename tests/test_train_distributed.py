"""Training over two gloo processes: the gradient of one process, checkpoints for any number, a worker that dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import PACKAGE, TESTS, run_python

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import tiny_pipelines  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from sdfast.cli import main  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]

# Each number of processes takes the gradient of one step, by DDP and by FSDP2, in micro-batches, then a step,
# and reads what the number before it has saved.
WORKER = """
    import datetime, sys, tempfile
    from pathlib import Path
    import torch, torch.distributed as dist, torch.multiprocessing as mp
    from sdfast.testing import relative_error
    from sdfast.training.buckets import Batches
    from sdfast.training.checkpoints import ShardedRunFolder
    from sdfast.training.distributed import ALONE, Parallel, Processes, full_state
    from sdfast.training.ldm_losses import SharedLoss
    from sdfast.training.ldm_parts import choose_trained, load_parts
    from sdfast.training.trainer import Schedule, train_steps

    MODEL, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])

    def learner(kind, group, recompute=False):
        parts = load_parts(MODEL, prediction=None, device=torch.device("cpu"))
        choose_trained(parts, "unet")
        unet = parts["unet"].train()
        model = Parallel(unet, kind, "fp32", group, recompute=recompute)

        def mean_loss(draws):
            x = torch.cat([torch.full((1, 4, 8, 8), row / 6) for row, _ in draws])
            noise = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for _, g in draws])
            text = torch.cat([torch.randn(1, 5, 32, generator=g) for _, g in draws])
            return (model(x + noise, torch.full((len(x),), 500), text) - noise).square().mean()

        return unet, SharedLoss(model, Batches([0] * 7, 4, 0), 4, 1, mean_loss, group, 0)

    def gradient(kind, group, recompute=False):
        unet, losses = learner(kind, group, recompute)
        for value in losses(0):
            value.backward()
        found = {name: p.grad for name, p in unet.named_parameters()}
        return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}

    def trained(kind, group, folder, steps):
        unet, losses = learner(kind, group)
        run = ShardedRunFolder(folder, {}, group)
        schedule = Schedule(4, 1e-4, warmup_steps=0, decay="constant", ema_decay=0.5)
        try:
            train_steps(unet, lambda step: losses(step) if step < steps else 1 / 0, schedule, run=run,
                        processes=group, checkpoint_steps=2, progress=False)
        except ZeroDivisionError:
            pass
        return {name: tensor.clone() for name, tensor in full_state(unet).items()}

    def work(rank, world, store):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world,
                                timeout=datetime.timedelta(seconds=120))
        group = Processes(rank, world)
        expected = gradient(None, ALONE)
        for kind, recompute in (("ddp", False), ("fsdp", True)):
            found = gradient(kind, group, recompute)
            assert found.keys() == expected.keys()
            for name in expected:
                error = relative_error(found[name], expected[name])
                assert error < 1e-4, (kind, recompute, name, error)
        # Saved by two processes at step 2, continued by two, to the same bits, and later by one.
        trained("ddp", group, FOLDER / "ddp", 2)
        resumed, whole = trained("ddp", group, FOLDER / "ddp", 4), trained("ddp", group, FOLDER / "whole-ddp", 4)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
        trained("fsdp", group, FOLDER / "run", 2)
        dist.barrier()
        if rank == 0:
            import shutil
            shutil.copytree(FOLDER / "run", FOLDER / "alone")
        dist.barrier()
        full, whole = trained("fsdp", group, FOLDER / "run", 4), trained("fsdp", group, FOLDER / "whole", 4)
        if rank == 0:
            assert all(torch.equal(full[name], whole[name]) for name in whole)
            torch.save(full, FOLDER / "two.pt")
        dist.barrier()
        dist.destroy_process_group()

    if __name__ == "__main__":
        mp.start_processes(work, (2, str(FOLDER / "store")), nprocs=2, start_method="fork")
        torch.set_num_threads(1)
        two, alone = torch.load(FOLDER / "two.pt"), trained(None, ALONE, FOLDER / "alone", 4)
        start = load_parts(MODEL, prediction=None, device=torch.device("cpu"))["unet"].state_dict()
        moved = max(float((alone[n] - start[n]).abs().max()) for n in alone)
        for name in alone:  # AdamW: where a gradient is 0 but for rounding, its sign decides
            difference = (two[name] - alone[name]).abs()
            assert difference.mean() < 0.02 * moved, (name, difference.mean(), moved)
        print("equal")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.slow
def test_two_processes_equal_one_and_checkpoints_load_into_another_number(model, tmp_path):
    source = WORKER.replace("sys.argv[1]", repr(str(model))).replace("sys.argv[2]", repr(str(tmp_path)))
    assert "equal" in run_python(source)


# The second process dies in step 3 of the job's first life. Each writes down the steps that it takes. Which
# images can be opened is for the first to say.
DIES = """
import os, signal, sys, torch
torch.set_num_threads(1)
from sdfast.cli import main
from sdfast.training import ldm_data
from sdfast.training.ldm_losses import SharedLoss
step = SharedLoss.__call__
life, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
if rank == "1":
    ldm_data.image_size = None
def dying(self, number):
    if (life, rank, number) == ("0", "1", 3):
        os.kill(os.getpid(), signal.SIGKILL)
    with open(f"{sys.argv[1]}-{life}-{rank}", "a") as file:
        file.write(f"{number} ")
    return step(self, number)
SharedLoss.__call__ = dying
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_torchrun_goes_on_after_a_worker_was_killed(model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(5):
        tiny_pipelines.picture(16 + i, 16).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"seven {i}")
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    arguments = [
        "train", "ldm", "--data", photos, "--model", model, "--steps", "5", "--batch-size", "4", "--lr", "1e-3",
        "--checkpoint-steps", "2", "--cache-dir", tmp_path / "cache", "-o",
    ]  # fmt: skip
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, "-m", *torchrun, script, tmp_path / "steps", *arguments, tmp_path / "two"]
    done = subprocess.run(
        [*map(str, command), "--parallel", "ddp", "--restart"], capture_output=True, text=True, cwd=TESTS, timeout=300,
        env={**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained on 5 images") == 1  # one of them speaks
    steps = {name: (tmp_path / f"steps-{name}").read_text().split() for name in ("0-1", "1-0", "1-1")}
    assert steps == {"0-1": ["0", "1", "2"], "1-0": ["2", "3", "4"], "1-1": ["2", "3", "4"]}

    assert main([*map(str, arguments), str(tmp_path / "one")]) == 0
    one, two, start = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in (tmp_path / "one", tmp_path / "two", model)
    )
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    assert all((two[name] - one[name]).abs().mean() < 0.02 * moved for name in one)
