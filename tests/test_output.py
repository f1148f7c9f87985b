"""The folder that training leaves: whose it may replace, and what kills leave of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from processes import PACKAGE

from sdfast.training.output import check_output, write_output


@pytest.mark.parametrize("content", [None, "", "[1]", '{"epochs": 3}'])
def test_folders_of_others_are_not_replaced(tmp_path, content):
    (tmp_path / "weights.pt").touch()
    if content is not None:
        (tmp_path / "training.json").write_text(content)
    with pytest.raises(FileExistsError, match="was not written by this command; choose another"):
        check_output(tmp_path)


def _writer(text):
    def write(folder):
        folder.mkdir()
        (folder / "weights").write_text(text)

    return write


def test_output_is_replaced_whole_or_not_at_all(tmp_path):
    output = tmp_path / "deep" / "out"
    write_output(output, _writer("one"), {"sdfast": "1", "steps": 1})
    check_output(output)
    with pytest.raises(ZeroDivisionError):
        write_output(output, lambda folder: (_writer("half")(folder), 1 / 0), {"sdfast": "1"})
    assert (output / "weights").read_text() == "one"
    write_output(output, _writer("two"), {"sdfast": "1", "steps": 2})
    assert (output / "weights").read_text() == "two"
    assert json.loads((output / "training.json").read_text())["steps"] == 2
    assert list(output.parent.iterdir()) == [output]


# It dies in the n-th rename: the first takes the old folder away, the second brings the new one.
KILLED = """
import os, pathlib, signal, sys
from sdfast.training.output import write_output
def write(folder):
    folder.mkdir()
    (folder / "weights").write_text("two")
rename, calls = pathlib.Path.rename, []
def dying(self, target):
    calls.append(target)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.rename = dying
write_output(pathlib.Path(sys.argv[1]), write, {"sdfast": "1"})
"""


@pytest.mark.parametrize("renames", [1, 2])
def test_what_a_kill_leaves_is_put_back_or_swept(tmp_path, renames):
    output = tmp_path / "out"
    write_output(output, _writer("one"), {"sdfast": "1"})
    command = [sys.executable, "-c", KILLED, str(output), str(renames)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert output.exists() == (renames == 1) and len(list(tmp_path.iterdir())) == (2 if renames == 1 else 1)
    with pytest.raises(ZeroDivisionError):
        write_output(output, lambda folder: 1 / 0, {"sdfast": "1"})
    assert (output / "weights").read_text() == "one" and list(tmp_path.iterdir()) == [output]
