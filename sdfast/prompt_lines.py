"""The lines of a file of prompts, and which share of them is this process's. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Line:
    """A prompt and the number of its line, from 1 on, as editors count."""

    number: int
    prompt: str


def read_prompts(path: str | Path) -> list[Line]:
    """The lines of a UTF-8 file that are not blank, without the white space around them.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: it is not text, or all lines are blank.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts: {path} is not UTF-8 text ({error})") from error
    lines = [Line(i, line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"--prompts: {path} has no prompt, expected one a line")
    return lines


@dataclasses.dataclass(frozen=True)
class Share:
    """Process `rank` of `processes`; `local_rank` counts those of its machine."""

    rank: int = 0
    processes: int = 1
    local_rank: int = 0


def share_of(environment: Mapping[str, str] = os.environ) -> Share:
    """What torchrun says in the environment of each process that it starts; the whole without it.

    Raises:
        ValueError: a variable is no number, or the rank is not below the number of processes.
    """
    numbers = []
    for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = environment.get(name, str(alone))
        if not text.isdecimal():
            raise ValueError(
                f"{name}: got {text!r} in the environment, expected a number as torchrun sets it"
            )
        numbers.append(int(text))
    share = Share(*numbers)
    if not share.rank < share.processes:
        raise ValueError(f"RANK: got {share.rank}, expected less than WORLD_SIZE, which is {share.processes}")
    return share
