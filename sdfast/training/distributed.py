"""Several processes as one: who they are, what they agree on, and how a model is spread over them.

    torchrun --nproc-per-node N -m sdfast train ...

starts N processes that tell each other apart by environment variables. Every one computes its share of a
batch; the gradient they step with is that of the whole batch, to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdfast.models.layers import BasicTransformerBlock, ResnetBlock2D, Transformer2D

PARALLEL = ("ddp", "fsdp")
PRECISIONS = ("fp32", "bf16", "autocast")
# Others wait while one imports a data set, however large; torchrun itself notices who died.
_PATIENCE = datetime.timedelta(days=7)


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those of one run.

    Attributes:
        rank: its number, 0 … world-1.
        world: how many there are.
        device: where its model lives.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all processes; every process gets the same."""
        if self.world == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What every process gave, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def main_first(self, action: Callable[[], Any]) -> Any:
        """The result of `action` on the main process, for all; what it raises there is raised by all."""
        if self.world == 1:
            return action()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = action()
            except Exception as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]


ALONE = Processes()


@contextlib.contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started; alone where it did not.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl), each process on the GPU of its local rank.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(device=torch.device(device))
        return
    where = torch.device(device)
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    store, rank, world = next(dist.rendezvous("env://", timeout=_PATIENCE))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        # The store outlives a restart, and with it the addresses of processes that are dead. (Machines count
        # restarts each for itself; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun renew it.)
        store = dist.PrefixStore(f"life {restarts()}", store)
    backend = "nccl" if where.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    with warnings.catch_warnings():
        # Of 1x1 convolutions, whose strides mean the same either way; of views, which nothing here writes to.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        yield Processes(rank, world, where)
    # Not after an error: its traceback holds a model that would wait forever if it went after its group.
    dist.destroy_process_group()


def restarts() -> int:
    """How often torchrun has started this process again after one of its job died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Parallel:
    """A module to call for training: in the precision asked for, its gradients averaged over processes.

    Args:
        module: what is trained; its parameters stay fp32. Under "fsdp" they become its shards.
        kind: "ddp", "fsdp" (FSDP2's fully_shard) or None for one process.
        precision: "fp32"; "bf16" computes with bf16 copies of the weights; "autocast" leaves the choice of
            what is bf16 to torch.autocast. The kernels are sdfast's in all three.
        processes: who takes part.
        recompute: keep only what enters each ResNet block and transformer; the backward computes the rest
            again (Chen et al. 2016). The gradients are the same bits.

    Raises:
        ValueError: no such kind or precision.
    """

    def __init__(
        self,
        module: nn.Module,
        kind: str | None,
        precision: str,
        processes: Processes,
        *,
        recompute: bool = False,
    ) -> None:
        for name, value, known in (("kind", kind, (None, *PARALLEL)), ("precision", precision, PRECISIONS)):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, known))}")
        self.module = module
        self.precision = precision
        self._device = processes.device
        self._call: Callable[..., Any] = module
        if recompute:
            _recompute_blocks(module, lent=precision == "bf16" and kind != "fsdp")
        if kind == "fsdp":
            _shard(module, processes, torch.bfloat16 if precision == "bf16" else None)
        elif precision == "bf16":
            self._call = _InBF16(module)
        if kind == "ddp":
            self._call = nn.parallel.DistributedDataParallel(self._call)

    @property
    def dtype(self) -> torch.dtype:
        """Of what it is called with."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def __call__(self, *arguments: Any) -> Any:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "autocast"):
            return self._call(*arguments)

    @contextlib.contextmanager
    def gradients_shared(self, shared: bool) -> Iterator[None]:
        """Forward and backward within: `shared` is False for all but the last micro-batch of a step."""
        if isinstance(self._call, nn.parallel.DistributedDataParallel) and not shared:
            with self._call.no_sync():
                yield
            return
        if hasattr(self.module, "set_requires_gradient_sync"):
            cast(Any, self.module).set_requires_gradient_sync(shared)
        yield


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """All of a module's tensors on the CPU, put together from the shards of all processes.

    Every process has to call it; the main one gets them, the others under FSDP nothing.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(module, options=options))  # type: ignore[arg-type]


class _InBF16(nn.Module):
    """Calls a module with bf16 copies of its parameters; gradients arrive at the fp32 ones."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Any:
        copies = {name: p.bfloat16() for name, p in self.module.named_parameters()}
        return torch.func.functional_call(self.module, copies, arguments)


def _recompute_blocks(module: nn.Module, *, lent: bool) -> None:
    """
    Args:
        lent: whether `_InBF16` calls the module. When the backward repeats a block's forward, the copies that
            it lent are gone, and the block makes its own anew.
    """
    for block in module.modules():
        if isinstance(block, (ResnetBlock2D, Transformer2D)):
            run = functools.partial(_in_dtype_of_input, block, block.forward) if lent else block.forward
            block.forward = functools.partial(checkpoint, run, use_reentrant=False)  # type: ignore[method-assign]


def _in_dtype_of_input(block: nn.Module, forward: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
    copies = {name: p.to(x.dtype) for name, p in block.named_parameters()}
    with _forward_of(block, forward):
        return torch.func.functional_call(block, copies, (x, *rest))


@contextlib.contextmanager
def _forward_of(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    wrapped = block.forward
    block.forward = forward
    try:
        yield
    finally:
        block.forward = wrapped


def _shard(module: nn.Module, processes: Processes, dtype: torch.dtype | None) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(processes.device.type, (processes.world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    for parameter in module.parameters():  # it cannot cut channels_last ones
        parameter.data = parameter.data.contiguous()
    for block in module.modules():
        if isinstance(block, (ResnetBlock2D, BasicTransformerBlock)):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
