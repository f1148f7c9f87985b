"""Files that appear whole or not at all.

with replacing(path) as temporary:
    temporary.write_text(...)
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import stat
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | pathlib.Path, *, synced: bool = False) -> Iterator[pathlib.Path]:
    """A temporary name beside `path`, moved over it if the block succeeds and removed otherwise.

    Whoever reads sees what was there before or the whole of the new. Whoever writes it, safetensors for its
    owner alone, the file may be read as any new one in that folder.

    Args:
        path: where the file is to be, in a folder that exists.
        synced: whether the content has to be on the disk before the name is, so that after a power failure
            it is whole, too.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process that had this number
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)  # what the umask leaves; asking for it would set it
        yield temporary
        temporary.chmod(mode)
        if synced:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | pathlib.Path, text: str, *, synced: bool = False) -> None:
    """Write UTF-8 in one step."""
    with replacing(path, synced=synced) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | pathlib.Path, value: object) -> None:
    """Write JSON in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")
