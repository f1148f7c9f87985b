"""Checkpoints on disk: whole or absent, checked when read, never mixed up between runs.

A file is 32 bytes of SHA-256, then what torch.save wrote. It is written under another name, forced to
the disk and renamed, and the one before it is kept: whatever moment the power fails, one whole checkpoint
is left.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sdfast.files import replacing

_DIGEST_BYTES = hashlib.sha256().digest_size
KEPT = 2


class RunFolder:
    """The checkpoints of one training run.

    Args:
        folder: made when the first checkpoint is written.
        settings: JSON values that tell this run from another.

    Raises:
        ValueError: `settings` holds something JSON does not.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        try:
            self.settings = json.loads(json.dumps(settings))  # as they will be read back
        except TypeError as error:
            raise ValueError(f"settings: {error}") from error

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`; drop all but it and the one before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save({"step": step, "settings": json.dumps(self.settings), **state}, buffer)
        payload = buffer.getbuffer()
        path = self.folder / f"checkpoint-{step:08d}.pt"
        with replacing(path, synced=True) as temporary, temporary.open("wb") as file:
            file.write(hashlib.sha256(payload).digest())
            file.write(payload)
        sync_folder(self.folder)
        # A newer one can only be damaged: the run had to go back behind it.
        kept = [known for known in self._newest_first() if known <= path][:KEPT]
        for old in set(self._newest_first()) - set(kept):
            old.unlink()
        for left_by_a_kill in self.folder.glob(".checkpoint-*.tmp"):
            left_by_a_kill.unlink(missing_ok=True)
        return path

    def latest(self, into: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The newest whole checkpoint, None where there is none; a damaged one is passed over with a warning.

        Args:
            into: the state as it is now, which kinds of checkpoints that are read in place are read into.

        Raises:
            ValueError: it was written under other settings; the text names them.
        """
        for path in self._newest_first():
            try:
                checkpoint = _read(path)
            except (OSError, ValueError) as error:
                warnings.warn(f"{path}: damaged ({error}); going back to the checkpoint before it")
                continue
            self._check_settings(path, json.loads(checkpoint["settings"]))
            return checkpoint
        return None

    def clear(self) -> None:
        """Delete the checkpoints, and nothing else."""
        for path in [*self._newest_first(), *self.folder.glob(".checkpoint-*.tmp")]:
            path.unlink()

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*.pt"), reverse=True)

    def _check_settings(self, path: Path, found: Mapping[str, Any]) -> None:
        ours, theirs = _flatten(self.settings), _flatten(found)
        different = [
            f"{name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        if different:
            raise ValueError(
                f"{path}: belongs to a run of other settings ({'; '.join(different)}). "
                "Choose another run folder, or start this one anew with resume=False (--restart)."
            )


def seconds_spent(folder: str | Path) -> float:
    """How long the run in `folder` has trained, up to its last checkpoint, all of its starts together.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: the last one is damaged.
    """
    paths = sorted(Path(folder).glob("checkpoint-*.pt"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no checkpoint")
    return float(_read(paths[-1])["seconds"])


def _read(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError("its checksum does not fit its content")
    return torch.load(io.BytesIO(payload), weights_only=True)


def _flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: {"schedule": {"steps": 5}} -> {"schedule.steps": 5}."""
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {
        name: value
        for key, inner in settings.items()
        for name, value in _flatten(inner, f"{prefix}.{key}" if prefix else key).items()
    }


def sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power failure; not every system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
