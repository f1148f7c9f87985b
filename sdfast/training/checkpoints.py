"""Checkpoints of a run of several processes: safetensors, read by any number of processes.

    checkpoint-00000100/  shard-00001-….safetensors, one of each process, and state.json, written last

torch.distributed.checkpoint writes and reads the tensors, each process what it has, so that a model that
is sharded over four loads into two, or into one. The folder is written under another name, forced to the
disk and renamed when it is whole; the one before it is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from sdfast.training.distributed import ALONE, Processes
from sdfast.training.run_folder import KEPT, RunFolder, sync_folder

_STATE = "state.json"
_READ_BYTES = 1 << 22


class ShardedRunFolder(RunFolder):
    """A `RunFolder` whose checkpoints are folders that all processes write and read together.

    Args:
        folder: reached by all processes.
        settings: JSON values that tell this run from another; the number of processes is none of them.
        processes: who takes part; each method is called by all of them.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], processes: Processes = ALONE) -> None:
        super().__init__(folder, settings)
        self.processes = processes

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`; drop all but it and the one before.

        Raises:
            OSError: on every process, where one could not write its part. Nothing is left of it.
        """
        path = self.folder / f"checkpoint-{step:08d}"
        temporary = path.with_suffix(".tmp")
        live, numbers = _split(state)
        tensors = {name: _contiguous(tensor) for name, tensor in live.items()}
        self.processes.main_first(lambda: _make_anew(temporary))
        try:
            try:
                with self._quietly():
                    writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
                    dcp.save(tensors, storage_writer=writer, no_dist=self.processes.world == 1)
            except CheckpointException as error:
                reasons = [reason for reason, _ in error.failures.values()]
                if not all(isinstance(reason, OSError) for reason in reasons):
                    raise
                raise OSError("; ".join(map(str, reasons))) from error
            self.processes.main_first(lambda: self._finish(temporary, path, {"step": step, **numbers}))
        except OSError:
            self.processes.main_first(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise
        return path

    def latest(self, into: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The newest whole checkpoint, read into the tensors of `into`; None where there is none."""
        if into is None:
            raise TypeError("into: the state that the checkpoint is read into is missing")
        found = self.processes.main_first(self._newest_whole)
        if found is None:
            return None
        path, numbers = found
        self._check_settings(path, json.loads(numbers["settings"]))
        live, _ = _split(into)
        tensors = {name: _contiguous(tensor) for name, tensor in live.items()}
        try:
            with self._quietly():
                reader = HuggingFaceStorageReader(str(path))
                dcp.load(tensors, storage_reader=reader, no_dist=self.processes.world == 1)
        except (CheckpointException, RuntimeError) as error:
            raise ValueError(f"{path}: does not fit this model: {' '.join(str(error).split())}") from error
        for name, tensor in live.items():
            if tensors[name] is not tensor:
                tensor.copy_(tensors[name])
        return _joined(into, numbers) | {"step": numbers["step"]}

    def refuse_other_settings(self) -> None:
        """Before any work: ValueError where the newest checkpoint was written under other settings."""
        for path in self._newest_first()[:1]:
            try:
                settings = json.loads(json.loads((path / _STATE).read_text())["settings"])
            except (OSError, ValueError, KeyError):
                return  # damaged: `latest` says so
            self._check_settings(path, settings)

    def clear(self) -> None:
        """Delete the checkpoints, and nothing else."""
        for path in self.folder.glob("checkpoint-*"):
            shutil.rmtree(path)

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        with warnings.catch_warnings():
            if self.processes.world == 1:  # it warns that it does what no_dist asks for
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield

    def _newest_first(self) -> list[Path]:
        return sorted((p for p in self.folder.glob("checkpoint-*") if p.suffix != ".tmp"), reverse=True)

    def _newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        for path in self._newest_first():
            try:
                numbers = json.loads((path / _STATE).read_text())
                for name, digest in numbers["files"].items():
                    if _digest(path / name) != digest:
                        raise ValueError(f"the checksum of {name} does not fit its content")
            except (OSError, ValueError, KeyError) as error:
                warnings.warn(f"{path}: damaged ({error}); going back to the checkpoint before it")
                continue
            return path, numbers
        return None

    def _finish(self, temporary: Path, path: Path, numbers: Mapping[str, Any]) -> None:
        digests = {file.name: _digest(file, sync=True) for file in sorted(temporary.iterdir())}
        record = {**numbers, "settings": json.dumps(self.settings), "files": digests}
        with (temporary / _STATE).open("w") as file:
            json.dump(record, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(temporary)
        if path.exists():  # a damaged one, which the run had to go back behind
            shutil.rmtree(path)
        temporary.replace(path)
        sync_folder(self.folder)
        kept = [known for known in self._newest_first() if known <= path][:KEPT]
        for old in set(self._newest_first()) - set(kept):
            shutil.rmtree(old)
        for left_by_a_kill in self.folder.glob("checkpoint-*.tmp"):
            shutil.rmtree(left_by_a_kill)


def seconds_of(folder: str | Path) -> float:
    """How long the run in `folder` has trained, up to its last checkpoint, all of its starts together."""
    newest = max(path for path in Path(folder).glob("checkpoint-*") if path.suffix != ".tmp")
    return float(json.loads((newest / _STATE).read_text())["seconds"])


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _digest(path: Path, *, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _contiguous(tensor: Tensor) -> Tensor:
    """Itself, or, as safetensors knows no other strides, a copy on the CPU: a GPU may have no room for it."""
    return tensor if tensor.is_contiguous() else tensor.cpu().contiguous()


def _split(state: Mapping[Any, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A nested state as flat tensors and flat numbers; lists (AdamW's settings) are no state."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
        elif isinstance(value, Mapping):
            inner = _split(value, f"{name}.")
            tensors |= inner[0]
            numbers |= inner[1]
        elif isinstance(value, (int, float)):
            numbers[name] = value
    return tensors, numbers


def _joined(state: Mapping[Any, Any], numbers: Mapping[str, Any], prefix: str = "") -> dict[Any, Any]:
    """`state` with the numbers of a checkpoint; its tensors have been read in place."""
    return {
        key: _joined(value, numbers, f"{prefix}{key}.")
        if isinstance(value, Mapping)
        else numbers.get(f"{prefix}{key}", value)
        for key, value in state.items()
    }
