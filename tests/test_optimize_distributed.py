"""An optimised U-Net under DDP and FSDP2, in two gloo processes: the gradients of one process with both batches."""

from __future__ import annotations

import pathlib

import pytest
import torch
from processes import run_python

TESTS = pathlib.Path(__file__).parent
WORKER = """
    import copy, datetime, sys
    import torch, torch.distributed as dist, torch.multiprocessing as mp, torch.nn.functional as F
    sys.path.insert(0, {tests!r})
    import sdfast
    from test_optimize import made, randn, TEXT_DIM
    from sdfast.testing import relative_error

    def batch(rank):
        return randn(1, 4, 8, 8, seed=rank), randn(1, 5, TEXT_DIM, seed=10 + rank), randn(1, 4, 8, 8, seed=20 + rank)

    def loss(model, x, text, noise):
        return F.mse_loss(model(x, 7, text).sample, noise)

    def work(rank, kind, store):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2,
                                timeout=datetime.timedelta(seconds=120))
        theirs = made("unet")[0].train()
        ours = copy.deepcopy(theirs)
        if kind != "fsdp, optimized last":
            sdfast.optimize(ours, mode="training")
        if kind == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(ours)
        else:
            from torch.distributed.fsdp import fully_shard
            mesh = dist.init_device_mesh("cpu", (2,))
            blocks = [m for m in ours.modules() if type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]
            assert len(blocks) > 8
            for block in blocks:
                fully_shard(block, mesh=mesh)
            model = fully_shard(ours, mesh=mesh)
            if kind == "fsdp, optimized last":
                sdfast.optimize(ours, mode="training")
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            loss(model, *batch(rank)).backward()
        both = [torch.cat(parts) for parts in zip(batch(0), batch(1))]
        loss(theirs, *both).backward()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            assert relative_error(gradient, q.grad) < 1e-4, (name, relative_error(gradient, q.grad))
        dist.barrier()
        dist.destroy_process_group()

    if __name__ == "__main__":
        mp.start_processes(work, (sys.argv[1], sys.argv[2]), nprocs=2, start_method="fork")
        print("equal")
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp, optimized last"])
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_gradients_of_two_processes(kind, tmp_path):
    source = WORKER.format(tests=str(TESTS)).replace(
        "sys.argv[1], sys.argv[2]", f"{kind!r}, {str(tmp_path / 'store')!r}"
    )
    assert "equal" in run_python(source)
