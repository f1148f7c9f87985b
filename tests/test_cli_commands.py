"""The command line's other commands: train digits, doctor, help."""

import errno
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from PIL import Image
from test_cli import refused

import sdfast
from sdfast import cli, doctor


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("cli") / "tiny")


def test_train_digits_passes_its_arguments_on(monkeypatch, capsys, tmp_path):
    calls = []

    def train_digits(output, **options):
        calls.append((output, options))
        return output

    monkeypatch.setattr("sdfast.training.digits.train_digits", train_digits)
    assert cli.main(["train", "digits", "-o", str(tmp_path / "out"), "--vae-steps", "5", "--restart"]) == 0
    expected = {"run_dir": Path("runs/digits"), "seed": 0, "resume": False, "threads": 2, "vae_steps": 5}
    assert calls == [(tmp_path / "out", expected)]
    assert cli.main(["train", "digits", "--unet-steps", "0"]) == 2
    assert "--unet-steps: got 0" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--output", "--run-dir"])
def test_train_digits_checks_where_it_writes(monkeypatch, capsys, tmp_path, option):
    def train_digits(*_, **__):
        raise AssertionError("training began")

    monkeypatch.setattr("sdfast.training.digits.train_digits", train_digits)
    (tmp_path / "file").touch()
    arguments = {"--output": tmp_path / "out", "--run-dir": tmp_path / "run"}

    def train(path):
        given = [str(one) for pair in (arguments | {option: path}).items() for one in pair]
        return cli.main(["train", "digits", *given]), *capsys.readouterr()

    assert refused(train(tmp_path / "file" / "below" / "it"), f"{option}: {tmp_path / 'file'} is no folder")
    (tmp_path / "locked").mkdir()
    temporary = tempfile.TemporaryFile

    def denied(*, dir):  # root, in a container, may write everywhere
        if "locked" in str(dir):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return temporary(dir=dir)

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    assert refused(
        train(tmp_path / "locked" / "a" / "b"), f"{option}: the folder {tmp_path / 'locked'} cannot"
    )


def test_train_digits_does_not_shadow_the_model_that_ships(monkeypatch, capsys, tmp_path, model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sdfast.training.digits.train_digits", lambda output, **_: output)
    assert cli.main(["train", "digits"]) == 0
    assert capsys.readouterr().out.endswith(" --model ./my-digits\n")
    assert cli.main(["train", "digits", "-o", "digits"]) == 0
    assert capsys.readouterr().out.endswith(" --model ./digits\n")
    shutil.copytree(model, "digits")
    arguments = ["generate", "seven", "--steps", "2"]
    assert refused((cli.main([*arguments, "--model", "digits"]), *capsys.readouterr()), "./digits")
    assert cli.main([*arguments, "--model", "./digits"]) == 0
    assert Image.open("sdfast.png").size == (16, 16)
    assert cli.main(arguments) == 0
    assert Image.open("sdfast.png").size == (32, 32)


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for expected in (f"torch {torch.__version__}", "_C_cpu", "triton", "cmake", "threads", "CUDA"):
        assert expected in out
    assert "could not be found out" not in out


def test_doctor_names_every_optional_package_once(monkeypatch):
    extras = importlib.metadata.metadata("sdfast").get_all("Provides-Extra")
    assert set(extras) == {*doctor._EXTRAS, "dev"}
    present = importlib.metadata.version

    def version(name):
        if name == "scipy":
            raise importlib.metadata.PackageNotFoundError(name)
        return present(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    lines = list(doctor._optional_packages())
    assert "no   scipy, for segmentation's measures: pip install 'sdfast[segment]'" in lines
    assert f"yes  scikit-learn {present('scikit-learn')}, for training" in lines
    names = [line.split()[1].rstrip(",") for line in lines]
    assert len(set(names)) == len(names) and {"triton", "matplotlib", "openvino"} <= set(names)


def test_doctor_never_fails(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("odd machine")

    monkeypatch.setattr("sdfast._library.status", broken)
    monkeypatch.setattr("torch.get_num_threads", broken)
    assert doctor.report().count("could not be found out: RuntimeError: odd machine") == 2


@pytest.mark.parametrize("arguments", [[], ["generate"], ["train"], ["paint"]])
def test_incomplete_commands(arguments, capsys):
    assert refused((cli.main(arguments), *capsys.readouterr()), "")


def test_help_and_version(capsys):
    for arguments in (["--help"], ["generate", "--help"], ["train", "digits", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
    assert capsys.readouterr().out.endswith(f"sdfast {sdfast.__version__}\n")
