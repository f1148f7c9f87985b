"""The file that keeps what was measured: {machine: {shape: {candidate: ms}}}, as JSON.

It belongs to the user: in $SDFAST_CACHE_DIR, else where caches go on this system. It is replaced in one step,
so that whoever reads it finds it whole, and what another process added meanwhile is merged. A file that
cannot be understood is reported and treated as empty; the next save keeps it beside the new one.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import warnings
from collections.abc import Hashable, Mapping

from sdfast.files import write_text

Shape = tuple[Hashable, ...]  # of str, int, bool and tuples of these
Times = dict[str, float]  # candidate -> ms, from the fastest
Table = dict[Shape, Times]

_FORMAT = "sdfast tuning 1"


def path() -> pathlib.Path:
    """Where the file is or will be.

    Raises:
        RuntimeError: this user has no home folder, and no variable names another.
    """
    own = os.environ.get("SDFAST_CACHE_DIR")
    if own:
        return pathlib.Path(own) / "tuning.json"
    variable, *otherwise = (
        ("LOCALAPPDATA", "AppData", "Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    )
    shared = os.environ.get(variable, "")
    folder = pathlib.Path(shared) if os.path.isabs(shared) else pathlib.Path.home().joinpath(*otherwise)
    return folder / "sdfast" / "tuning.json"


def read() -> dict[str, Table]:
    """What the file holds. Warns and is empty where it cannot be read."""
    try:
        return _read(path())
    except RuntimeError:  # without a home folder there is no file
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{path()}: ignored, as it cannot be read ({type(error).__name__}: {error}); sdfast.tune writes"
            " a new one and keeps this one as tuning.json.damaged"
        )
        return {}


def save(machine: str, added: Mapping[Shape, Times]) -> None:
    """Put these times into the file, beside what it holds by now. Warns where it cannot be written."""
    try:
        file = path()
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            machines = _read(file)
        except (OSError, ValueError):  # `read` has said so
            os.replace(file, file.with_name(f"{file.name}.damaged"))
            machines = {}
        machines[machine] = {**machines.get(machine, {}), **added}
        write_text(file, _text(machines), synced=True)
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"the times measured cannot be kept ({error}) and serve this process alone; name a folder that"
            " can be written to in SDFAST_CACHE_DIR"
        )


def _text(machines: Mapping[str, Table]) -> str:
    """A shape to a line."""
    blocks = []
    for machine, table in machines.items():
        lines = (json.dumps({"shape": shape, "ms": times}) for shape, times in table.items())
        blocks.append(f"{json.dumps(machine)}: [\n" + ",\n".join(lines) + "\n]")
    return f'{{"format": {json.dumps(_FORMAT)},\n"machines": {{\n' + ",\n".join(blocks) + "\n}}\n"


def _read(file: pathlib.Path) -> dict[str, Table]:
    """Raises OSError or ValueError for a file that is not one of ours; one that does not exist is empty."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        content = json.loads(text)
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {_FORMAT!r}")
        return {
            machine: {_shape(entry["shape"]): _times(entry["ms"]) for entry in entries}
            for machine, entries in content["machines"].items()
        }
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no file of sdfast.tune: {error!r}") from error


def _shape(values: object) -> Shape:
    """JSON's lists as tuples."""
    if not isinstance(values, list):
        raise ValueError(f"shape: got {values!r}, expected a list")
    shape = tuple(_shape(value) if isinstance(value, list) else value for value in values)
    hash(shape)
    return shape


def _times(values: dict[str, float]) -> Times:
    for candidate, ms in values.items():
        if type(ms) not in (int, float) or not 0 < ms < math.inf:
            raise ValueError(f"{candidate}: got {ms!r}, expected milliseconds")
    return sort(values)


def sort(times: Mapping[str, float]) -> Times:
    """From the fastest."""
    return dict(sorted(times.items(), key=lambda item: item[1]))
