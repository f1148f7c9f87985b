"""The command line: what it makes, what it says, and what it refuses before it does anything."""

import errno
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image

import sdfast
from sdfast import _library, cli, command_line
from sdfast._library import LibraryStatus
from sdfast.images import read_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_pipelines.sd_pipeline(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def generate(model, tmp_path, capsys):
    """Runs `sdfast generate` on the tiny model; returns its status, what it said, and where it wrote."""

    def run(*arguments, prompt="a seven", steps=2):
        defaults = ["--model", str(model), "--steps", str(steps), "-o", str(tmp_path / "seven.png")]
        status = cli.main(["generate", prompt, *defaults, *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def refused(outcome, message):
    """Whether the outcome is status 2 and one line that says why."""
    status, out, err = outcome
    assert status == 2 and out == ""
    assert err.startswith("sdfast: error: ") and err.count("\n") == 1, err
    assert message in err, err
    return True


def test_one_image(generate, tmp_path):
    status, out, err = generate("--seed", 3, "--size", "16x24")
    assert status == 0 and err == ""
    assert Image.open(tmp_path / "seven.png").size == (24, 16)
    assert re.fullmatch(
        r"\S+seven\.png: 1 image, seed 3; [\d.]+ ms per step, [\d.]+ s in all, peak memory \d+ MiB\n", out
    )


def test_the_file_says_how_it_was_made(generate, tmp_path):
    generate("--seed", 3, "--negative-prompt", "ink", "--sampler", "euler", "--guidance-scale", 4)
    assert read_settings(tmp_path / "seven.png") == {
        "prompt": "a seven",
        "negative_prompt": "ink",
        "steps": 2,
        "sampler": "euler",
        "guidance_scale": 4.0,
        "seeds": [3],
        "height": 16,
        "width": 16,
        "model": "tiny",
        "dtype": "float32",
        "version": f"sdfast {sdfast.__version__}",
    }
    text = Image.open(tmp_path / "seven.png").text["parameters"]
    assert text.startswith(
        "a seven\nNegative prompt: ink\nSteps: 2, Sampler: euler, CFG scale: 4.0, Seed: 3, "
    )


def test_sheet_and_separate_files_hold_the_same_images(generate, tmp_path):
    assert generate("-n", 5, "--seed", 0)[0] == 0
    sheet = Image.open(tmp_path / "seven.png")
    assert sheet.size == (3 * 18 + 2, 2 * 18 + 2)
    assert read_settings(tmp_path / "seven.png")["seeds"] == [0, 1, 2, 3, 4]
    status, out, _ = generate("-n", 5, "--seed", 0, "--separate")
    assert status == 0 and "seven-0000.png to seven-0004.png: 5 images" in out
    for i in range(5):
        path = tmp_path / f"seven-000{i}.png"
        row, column = divmod(i, 3)
        box = (2 + 18 * column, 2 + 18 * row, 18 + 18 * column, 18 + 18 * row)
        assert Image.open(path).tobytes() == sheet.crop(box).tobytes()
        assert read_settings(path)["seeds"] == [i]


def test_a_fresh_seed_is_told_and_makes_the_image_again(generate, tmp_path):
    _, out, _ = generate()
    first = Image.open(tmp_path / "seven.png").tobytes()
    generate("--seed", re.search(r"seed (\d+)", out)[1])
    assert Image.open(tmp_path / "seven.png").tobytes() == first


def test_image_to_image(generate, tmp_path):
    Image.new("RGB", (24, 16), "red").save(tmp_path / "in.png")
    assert generate("--image", tmp_path / "in.png", "--strength", 0.5)[0] == 0
    assert Image.open(tmp_path / "seven.png").size == (24, 16)
    assert read_settings(tmp_path / "seven.png")["strength"] == 0.5


def test_backend_dtype_and_threads(generate, tmp_path):
    generate("--seed", 0)
    default = np.asarray(Image.open(tmp_path / "seven.png"), dtype=np.int16)
    assert generate("--seed", 0, "--backend", "reference", "--threads", 1)[0] == 0
    assert np.abs(np.asarray(Image.open(tmp_path / "seven.png"), dtype=np.int16) - default).max() <= 1
    assert generate("--seed", 0, "--dtype", "bfloat16", "--batch-size", 1)[0] == 0
    assert np.abs(np.asarray(Image.open(tmp_path / "seven.png"), dtype=np.int16) - default).mean() < 16


def test_a_long_prompt_is_one_line_of_warning(generate, tmp_path):
    status, _, err = generate(prompt="seven " * 75 + "and this was too much")
    assert status == 0 and (tmp_path / "seven.png").exists()
    assert err.startswith("sdfast: warning: ") and "'and this was too much'" in err and err.count("\n") == 1


def test_the_model_that_ships(tmp_path):
    path = tmp_path / "seven.png"
    arguments = ["-n", "4", "--steps", "10", "--seed", "0", "-o", str(path)]
    assert cli.main(["generate", "a handwritten seven", *arguments]) == 0
    assert Image.open(path).size == (2 * 34 + 2, 2 * 34 + 2)
    assert read_settings(path)["model"] == "digits"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100x64"], "height: got 100, expected a multiple of 8; the nearest are 96 and 104"),
        (["--width", "60"], "width: got 60, expected a multiple of 8; the nearest are 56 and 64"),
        (["--size", "64"], "expected HxW"),
        (["--size", "64x64", "--height", "8"], "not both"),
        (["--size", "65536x65536"], "GiB"),
        (["--height", "0"], "--height: got 0"),
        (["--height", "99999992"], "height: got 99999992"),
        (["--steps", "0"], "--steps: got 0, expected 1 to 1000"),
        (["--steps", "1001"], "--steps: got 1001, expected 1 to 1000"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["-n", "0"], "--num-images: got 0, expected at least 1"),
        (["--batch-size", "-1"], "--batch-size: got -1"),
        (["--threads", "0"], "--threads: got 0"),
        (["--threads", "100000"], "--threads: got 100000, expected 1 to 1024"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--guidance-scale", "nan"], "--guidance-scale: got nan"),
        (["--sampler", "plms"], "--sampler: got 'plms', expected one of ddpm, ddim"),
        (["--strength", "0.5"], "--strength: needs --image"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "abacus"], "--device: 'abacus' cannot be used"),
        (["--backend", "abacus"], "invalid choice: 'abacus'"),
        (
            ["--backend", "cuda"],
            "--backend: 'cuda' does not run on cpu, expected one of reference, torch, cpu",
        ),
        (["--backend", "triton"], "--backend: 'triton' does not run on cpu"),
        (["--tokenizer", "."], "tokenizer: got '.'"),
        (["--model", "no/such/folder"], "no/such/folder: no such file or folder"),
        (["--image", "absent.png"], "--image: absent.png is no such file"),
        (["-o", "no/such/folder/seven.png"], "the folder no/such/folder does not exist"),
        (["-o", "seven.jpg"], "expected a name that ends in .png"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input(generate, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sdfast.generation.sample", None)  # nothing is to be computed
    assert refused(generate(*arguments), message)
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_was_not_built(generate, monkeypatch):
    missing = LibraryStatus("_C_cpu", False, "_C_cpu_avx2.so was not built")
    monkeypatch.setattr("sdfast._library.load_cpu_library", lambda: missing)
    assert refused(generate("--backend", "cpu"), "'cpu' cannot run: _C_cpu_avx2.so was not built")


@pytest.mark.parametrize(("backend", "status"), [("triton", "triton_status"), ("cuda", "load_cuda_library")])
def test_backends_of_a_gpu(monkeypatch, backend, status):
    check_backend = command_line._check_backend
    monkeypatch.setattr(_library, status, lambda: LibraryStatus(backend, True, ""))
    check_backend(backend, "cuda")
    monkeypatch.setattr(_library, status, lambda: LibraryStatus(backend, False, "it is not there"))
    with pytest.raises(ValueError, match=f"--backend: '{backend}' cannot run: it is not there"):
        check_backend(backend, "cuda")
    with pytest.raises(
        ValueError, match="'cpu' does not run on cuda, expected one of reference, torch, trit"
    ):
        check_backend("cpu", "cuda")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FloatingPointError("the loss is nan at step 3"), "the loss is nan at step 3"),
        (MemoryError(), "out of memory: MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out of memory: CUDA out of memory. Tried"),
        (None, "DefaultCPUAllocator"),
    ],
)
def test_work_that_fails(generate, monkeypatch, error, message):
    def fail(*_, **__):
        if error is None:
            torch.empty(2**60, dtype=torch.uint8)
        raise error

    monkeypatch.setattr("sdfast.generation.sample", fail)
    status, out, err = generate()
    assert status == 1 and out == ""
    assert err.startswith("sdfast: error: ") and message in err and err.count("\n") == 1


def test_a_mistake_of_ours_keeps_its_traceback(generate, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("sdfast.generation.sample", fail)
    with pytest.raises(RuntimeError, match="unforeseen"):
        generate()


def test_a_folder_is_no_output(generate, tmp_path):
    (tmp_path / "folder.png").mkdir()
    assert refused(generate("-o", tmp_path / "folder.png"), "is a folder")


def test_a_folder_that_cannot_be_written_to(generate, monkeypatch):
    def denied(**_):  # root, in a container, may write everywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    assert refused(generate(), "cannot be written to: Permission denied")


@pytest.mark.parametrize("strength", ["1.5", "-0.1", "0.01", "nan"])
def test_bad_strength(generate, tmp_path, strength):
    Image.new("RGB", (16, 16)).save(tmp_path / "in.png")
    assert refused(generate("--image", tmp_path / "in.png", "--strength", strength), "--strength: ")


def test_the_image_to_start_from_is_not_overwritten(generate, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "seven.png")
    assert refused(generate("--image", tmp_path / "seven.png"), "seven.png is --image, too")


def test_a_corrupt_image(generate, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "in.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "in.png").read_bytes()[:3000])
    assert refused(generate("--image", tmp_path / "cut.png"), "cut.png: cannot read this image")


@pytest.mark.parametrize("kept", [0, 100, 20000])
def test_a_truncated_checkpoint(generate, model, tmp_path, kept):
    shutil.copytree(model, tmp_path / "cut")
    weights = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert refused(generate("--model", tmp_path / "cut"), "damaged or cut short")


class Code:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "model.txt"])
def test_files_that_are_no_model(generate, tmp_path, name):
    torch.save({"state_dict": {"x": Code()}}, tmp_path / name)
    message = "holds Python objects besides tensors" if name.endswith("ckpt") else name
    assert refused(generate("--model", tmp_path / name), message)


def test_a_plain_pickle_is_no_model(generate, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps({"x": Code()}, protocol=2))
    assert refused(generate("--model", tmp_path / "model.ckpt"), "model.ckpt")


def test_the_hub_is_out_of_reach(generate, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert refused(generate("--model", "somebody/something"), "somebody/something")


@pytest.fixture
def interruptible():
    """A process that a shell starts in the background ignores SIGINT, and so would these tests."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_interrupted(generate, tmp_path, monkeypatch):
    """A real signal, while a step runs: status 130, no traceback, nothing written."""

    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("sdfast.generation.sample", interrupted)
    status, out, err = generate()
    assert status == 130 and out == "" and err == "\nsdfast: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("interruptible")
def test_interrupted_while_writing(generate, tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: signal.raise_signal(signal.SIGINT))
    assert generate()[0] == 130
    assert list(tmp_path.iterdir()) == []


def run_process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "sdfast", *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_as_a_process(model, tmp_path):
    path = tmp_path / "seven.png"
    arguments = ["--model", str(model), "--steps", "2", "-o", str(path), "--threads", "1"]
    done = run_process("generate", "seven", *arguments)
    assert done.returncode == 0 and done.stderr == "" and path.is_file()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "got 0, expected 1 to 1000"),
        ("--sampler", "plms", "got 'plms', expected one of ddpm, ddim, euler, euler_a, dpm++2m"),
        ("--guidance-scale", "inf", "got inf, expected a finite number"),
    ],
)
def test_bad_input_as_a_process_does_not_even_load_torch(tmp_path, option, value, message):
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported')")
    done = run_process(
        "generate", "seven", option, value,
        cwd=Path(cli.__file__).parents[1], env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"sdfast: error: {option}: {message}\n"
