"""The file of measured times survives whatever happens to it."""

from __future__ import annotations

import pathlib
import threading
import warnings

import pytest
import torch
from tuned import convolutions, machine

import sdfast
from sdfast import _library, _tuning_file, tuning
from sdfast.ops._conv2d_choice import Shape, shape_of

pytestmark = [
    pytest.mark.usefixtures("tuning_file"),
    pytest.mark.skipif(
        not _library.has_kernel("conv2d_kernel", "cpu"), reason=_library.load_cpu_library().detail
    ),
]
TIMES = {"direct": 2.0, "torch": 3.0}


def test_times_are_kept_and_shapes_come_back_as_they_were() -> None:
    shape = shape_of(torch.empty(1, 32, 8, 8), torch.empty(32, 32, 3, 3), 1, [1] * 4, True, 2)
    _tuning_file.save("this CPU", {shape: TIMES})
    assert _tuning_file.read() == {"this CPU": {shape: TIMES}}
    assert hash(next(iter(_tuning_file.read()["this CPU"]))) == hash(shape)


def test_the_file_is_where_caches_go(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    assert tuning.path() == tmp_path / "cache" / "tuning.json"
    monkeypatch.delenv("SDFAST_CACHE_DIR")
    variable = "LOCALAPPDATA" if _tuning_file.os.name == "nt" else "XDG_CACHE_HOME"
    monkeypatch.setenv(variable, str(tmp_path))
    assert tuning.path() == tmp_path / "sdfast" / "tuning.json"
    monkeypatch.setenv(variable, "relative")  # which the XDG specification says to ignore
    assert tuning.path().is_relative_to(pathlib.Path.home())


def test_without_a_home_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> pathlib.Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SDFAST_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", no_home)
    assert _tuning_file.read() == {}
    with pytest.warns(UserWarning, match="SDFAST_CACHE_DIR"):
        _tuning_file.save("this CPU", {("conv2d",): TIMES})


DAMAGED = {
    "cut short": '{"format": "sdfast tuning 1",\n"machines": {\n"this CPU": [',
    "empty": "",
    "not text": "\udcff\udcfe",
    "another program's": '{"version": 3}',
    "another format": '{"format": "sdfast tuning 99", "machines": {}}',
    "a list": "[1, 2]",
    "no shape": '{"format": "sdfast tuning 1", "machines": {"a": [{"ms": {"direct": 1}}]}}',
    "shape of objects": '{"format": "sdfast tuning 1", "machines": {"a": [{"shape": [{}], "ms": {}}]}}',
    "no list": '{"format": "sdfast tuning 1", "machines": {"a": [{"shape": 1, "ms": {}}]}}',
    "no number": '{"format": "sdfast tuning 1", "machines": {"a": [{"shape": [], "ms": {"direct": "1"}}]}}',
    "not finite": '{"format": "sdfast tuning 1", "machines": {"a": [{"shape": [], "ms": {"direct": NaN}}]}}',
    "too deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_ignored_with_one_warning_and_kept(
    text: str, tuning_file: pathlib.Path, measured: list[Shape]
) -> None:
    tuning_file.parent.mkdir()
    damaged = text.encode(errors="surrogateescape")
    tuning_file.write_bytes(damaged)
    model = convolutions(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model()
        assert tuning_file.read_bytes() == damaged  # nothing was saved, so nothing is replaced
        sdfast.tune(model)
    (warning,) = caught
    assert str(tuning_file) in str(warning.message) and "sdfast.tune" in str(warning.message)
    assert tuning_file.with_name("tuning.json.damaged").read_bytes() == damaged
    assert list(_tuning_file.read()) == [machine()]


def test_a_folder_in_the_place_of_the_file(tuning_file: pathlib.Path) -> None:
    tuning_file.mkdir(parents=True)
    with pytest.warns(UserWarning, match="ignored"):
        assert _tuning_file.read() == {}
    _tuning_file.save("this CPU", {("conv2d",): TIMES})
    assert _tuning_file.read() == {"this CPU": {("conv2d",): TIMES}}


def test_what_cannot_be_written_serves_this_process(tuning_file: pathlib.Path, measured: list[Shape]) -> None:
    tuning_file.parent.write_text("a file where the folder should be")
    model = convolutions(8)
    with pytest.warns(UserWarning, match="ignored"), pytest.warns(match="serve this process alone"):
        sdfast.tune(model)
    sdfast.tune(model)
    assert len(measured) == 1


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_file_as_it_was(
    moment: str, tuning_file: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tuning_file.save("this CPU", {("conv2d", 1): TIMES})
    before = tuning_file.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_tuning_file.os, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        _tuning_file.save("this CPU", {("conv2d", 2): TIMES})
    assert tuning_file.read_bytes() == before
    assert list(tuning_file.parent.iterdir()) == [tuning_file]


def test_a_save_keeps_what_others_saved(tuning_file: pathlib.Path, measured: list[Shape]) -> None:
    sdfast.tune(convolutions(8))
    _tuning_file.save(machine(), {("conv2d", "by another process"): TIMES})
    _tuning_file.save("another CPU", {("conv2d",): TIMES})
    sdfast.tune(convolutions(9))
    content = _tuning_file.read()
    assert len(content[machine()]) == 3 and len(content["another CPU"]) == 1
    tuning_file.unlink()
    sdfast.tune(convolutions(10))  # what this process measured and another's save overtook comes back
    assert len(_tuning_file.read()[machine()]) == 3


def test_saves_at_the_same_time_leave_a_whole_file() -> None:
    def save(number: int) -> None:
        for i in range(20):
            _tuning_file.save(f"machine {number}", {("conv2d", i): TIMES})

    threads = [threading.Thread(target=save, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        _tuning_file._read(tuning.path())  # raises where it is not whole
    content = _tuning_file._read(tuning.path())
    assert ("conv2d", 19) in set().union(*content.values())
