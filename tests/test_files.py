"""Files are there whole or not at all, for whom the umask says."""

import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from sdfast.files import replacing, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("synced", [False, True])
def test_a_file_is_replaced_by_the_whole_of_the_next(tmp_path, synced):
    path = tmp_path / "a.txt"
    write_text(path, "one", synced=synced)
    with replacing(path, synced=synced) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_was_there_stays_where_writing_fails(tmp_path, error):
    path = tmp_path / "a.json"
    write_json(path, {"n": 1})
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("ha")
        raise error
    assert path.read_text() == '{\n  "n": 1\n}\n' and names(tmp_path) == ["a.json"]


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "a.txt", "Größe")
    assert (tmp_path / "a.txt").read_bytes() == "Größe".encode()


def test_files_are_for_whom_the_umask_says(tmp_path):
    """However open the folder is, as /tmp, and whatever an earlier process with this number left there."""
    tmp_path.chmod(0o777)
    (tmp_path / f".a.safetensors.{os.getpid()}.{threading.get_ident()}.tmp").touch(0o600)
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a.safetensors") as temporary:
            save_file({"x": torch.zeros(2)}, temporary)
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"a.safetensors": 0o640, "a.json": 0o640}
