"""What a user named, refused before any work where it cannot be used: counts, folders, files, devices."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sdfast.request import MAX_THREADS, check_count

if TYPE_CHECKING:
    import torch


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    """Raises ValueError where one of these options is given and below 1, or too many threads."""
    for name in names:
        if (count := getattr(arguments, name)) is not None:
            option = f"--{name.replace('_', '-')}"
            check_count(option, count, MAX_THREADS if name == "threads" else None)


def check_folder(name: str, folder: Path) -> None:
    """Raises ValueError where a folder is none, could not be made, or could not be written to."""
    existing = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not existing.is_dir():
        raise ValueError(f"{name}: {existing} is no folder")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(f"{name}: the folder {existing} cannot be written to: {error.strerror}") from None


def check_file(name: str, path: Path, *suffixes: str) -> None:
    """Raises ValueError where a file could not be written: another suffix, a folder, one in none."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{name}: got {path}, expected a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{name}: {path} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{name}: the folder {path.parent} does not exist")
    check_folder(name, path.parent)


def check_inputs(files: Mapping[str, Path | None]) -> None:
    """Raises ValueError where a file that is to be read, given by the name of its argument, is none."""
    for name, path in files.items():
        if path is not None and (path.is_dir() or not path.exists()):
            raise ValueError(f"{name}: {path} is {'a folder' if path.is_dir() else 'no such file'}")


def check_not_input(name: str, output: Path, others: Mapping[str, Path | None]) -> None:
    """Raises ValueError where `output` is another file of the same command, say what it reads.

    Args:
        others: by the names of their arguments; None is none.
    """
    for other, path in others.items():
        if path is None:
            continue
        both_exist = output.exists() and path.exists()
        if output.samefile(path) if both_exist else output.resolve() == path.resolve():
            raise ValueError(
                f"{name}: {output} is {other}, too, and would be overwritten; choose another name"
            )


def check_model_folder(name: str, folder: Path, model_type: str, unfinished: str | None = None) -> None:
    """Raises ValueError unless a model's files can go into this folder without harm to others.

    Args:
        model_type: what the config.json of such a model says that it is.
        unfinished: a folder in it that such a model's training makes before there is a config.json.
    """
    check_folder(name, folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    config = folder / "config.json"
    if not config.exists() and unfinished is not None and (folder / unfinished).is_dir():
        return
    if not (config.is_file() and f'"{model_type}"' in config.read_text(errors="replace")):
        raise ValueError(f"{name}: {folder} holds something else than such a model; choose another")


def usable_device(name: str, device: str | torch.device) -> torch.device:
    """The device. Raises ValueError where torch has none of this kind, or cannot use it."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name}: {str(device)!r} cannot be used: {reason}") from error
    return torch.device(device)
