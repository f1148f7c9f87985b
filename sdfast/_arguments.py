"""What a user named, refused before any work where it cannot be used: folders, files, devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def check_folder(name: str, folder: Path) -> None:
    """Raises ValueError where a folder is none, could not be made, or could not be written to."""
    existing = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not existing.is_dir():
        raise ValueError(f"{name}: {existing} is no folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{name}: the folder {existing} cannot be written to")


def check_file(name: str, path: Path, *suffixes: str) -> None:
    """Raises ValueError where a file could not be written: another suffix, a folder, one in none."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{name}: got {path}, expected a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{name}: {path} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{name}: the folder {path.parent} does not exist")
    check_folder(name, path.parent)


def usable_device(name: str, device: str | torch.device) -> torch.device:
    """The device. Raises ValueError where torch has none of this kind, or cannot use it."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name}: {str(device)!r} cannot be used: {reason}") from error
    return torch.device(device)
