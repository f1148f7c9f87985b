"""`sdfast generate --prompts`: the same pictures however many processes draw them and however often they are stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sdfast
from sdfast import cli, lora, prompt_list
from sdfast.images import read_settings, save_png
from sdfast.loading import digits_folder
from sdfast.prompt_lines import Share, read_prompts, share_of

WORDS = ("zero", "one", "two", "three", "four", "five", "six")
# A blank line has a number, and no picture.
LINES = (
    [f"a handwritten {word}" for word in WORDS[:3]] + ["  "] + [f"a handwritten {word}" for word in WORDS[3:]]
)
NUMBERS = (1, 2, 3, 5, 6, 7, 8)
OPTIONS = ("--steps", "2", "--seed", "40", "--batch-size", "2")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\r\n".join(LINES), encoding="utf-8-sig")
    return path


@pytest.fixture
def generate(prompts, tmp_path, capsys):
    """Runs the command; returns its status, what it said, and where it wrote."""

    def run(*arguments, folder="out", options=OPTIONS):
        output = tmp_path / folder
        status = cli.main(
            ["generate", "--prompts", str(prompts), "-o", str(output), *options, *map(str, arguments)]
        )
        return status, *capsys.readouterr(), output

    return run


def pictures(folder):
    assert not list(folder.glob(".*"))  # nothing unfinished is left
    return {path.name: Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))}


def refused(outcome, message):
    status, out, err, _ = outcome
    assert status == 2 and out == ""
    assert err.startswith("sdfast: error: ") and err.count("\n") == 1 and message in err, err


@pytest.fixture(scope="module")
def pipe():
    return sdfast.StableDiffusion.digits()


def test_each_line_is_a_picture_of_its_own_seed(generate, pipe):
    status, out, err, folder = generate()
    assert status == 0 and err == ""
    assert out.startswith(f"{folder}: 7 images made, 0 there before; ")
    found = pictures(folder)
    assert list(found) == [f"{number:06d}.png" for number in NUMBERS]
    alone = pipe.text_to_image([LINES[0], LINES[1]], seed=[41, 42], steps=2)
    assert [image.tobytes() for image in alone.images] == [found["000001.png"], found["000002.png"]]
    own = {"prompt": LINES[4], "seeds": [45], "weights": pipe.fingerprint()}
    assert read_settings(folder / "000005.png") == alone.settings | own
    status, out, _, _ = generate()
    assert status == 0 and out == f"{folder}: 0 images made, 7 there before\n"


def test_two_processes_draw_what_one_draws(generate, prompts, tmp_path):
    """torchrun's two, started together into one folder."""
    expected = pictures(generate()[3])
    shared = tmp_path / "shared"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "sdfast", "generate", "--prompts", prompts, "-o", shared, "--threads", "1", *OPTIONS],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(sdfast.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Batches of two lines: 1 2, 5 6 and 8 are not drawn by the same process as 3 5, 7 8.
    assert f"{shared}: 4 images made, 0 there before, process 1 of 2" in done.stdout
    assert f"{shared}: 3 images made, 0 there before, process 2 of 2" in done.stdout
    assert pictures(shared) == expected
    assert json.loads((shared / "settings.json").read_text())["steps"] == 2


def test_by_default_every_process_has_some(prompts, pipe, tmp_path):
    """Seven prompts would fit one batch of digits."""
    for rank in (0, 1, 2):
        job = prompt_list.PromptList(
            pipe, read_prompts(prompts), tmp_path / "out", share=Share(rank, 3), options={"steps": 1}
        )
        job.draw(progress := prompt_list.Progress())
        assert progress.made == (3, 3, 1)[rank]
    assert len(pictures(tmp_path / "out")) == 7


@pytest.fixture
def interruptible():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_and_resumed(generate, monkeypatch):
    expected = pictures(generate()[3])
    written = []

    def interrupted(image, path, settings):
        """Ctrl-C in the middle of the second batch."""
        written.append(path)
        if len(written) == 4:
            signal.raise_signal(signal.SIGINT)
        save_png(image, path, settings)

    monkeypatch.setattr(prompt_list, "save_png", interrupted)
    status, out, err, folder = generate(folder="again")
    assert status == 130 and out == ""
    assert err == "\nsdfast: interrupted: 3 images are there, 4 to go; the same command goes on from here\n"
    first = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(first) == 3
    (folder / ".000005.png.123.7.tmp").write_bytes(b"of a process that was killed")
    monkeypatch.undo()
    status, out, err, _ = generate(folder="again")
    assert status == 0 and out.startswith(f"{folder}: 4 images made, 3 there before; ") and err == ""
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())  # not drawn again
    assert pictures(folder) == expected


def test_a_damaged_picture_is_made_anew(generate):
    folder = generate()[3]
    expected = pictures(folder)
    path = folder / "000003.png"
    path.write_bytes(path.read_bytes()[:-200])
    status, out, err, _ = generate()
    assert status == 0 and "1 image made, 6 there before" in out
    assert err == f"sdfast: warning: {path} is damaged; it is made anew\n"
    assert pictures(folder) == expected


def test_another_number_of_processes_goes_on(generate, prompts, monkeypatch):
    """What was begun by two, one of which was interrupted, is finished by one; lines may be added at the end."""
    expected = pictures(generate(folder="whole")[3])

    def interrupted(image, path, settings):
        if path.name == "000005.png":
            raise KeyboardInterrupt
        save_png(image, path, settings)

    with monkeypatch.context() as two:
        two.setenv("WORLD_SIZE", "2")
        two.setattr(prompt_list, "save_png", interrupted)
        for rank, status, made in (("0", 0, (1, 2, 6, 7)), ("1", 130, (1, 2, 3, 6, 7))):
            two.setenv("RANK", rank)
            outcome, _, _, folder = generate()
            assert outcome == status
            assert list(pictures(folder)) == [f"{number:06d}.png" for number in made]
    with prompts.open("a", encoding="utf-8") as file:
        file.write("\na handwritten nine\n")
    status, out, _, _ = generate()
    assert status == 0 and "3 images made, 5 there before" in out
    found = pictures(folder)
    assert found.pop("000009.png") and {**found, "000008.png": b""} == {**expected, "000008.png": b""}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--steps", "3"],
            "holds pictures of other settings (steps is 2 there and 3 here); choose another folder",
        ),
        (["--seed", "41"], "seed is 40 there and 41 here"),
        (["--negative-prompt", "ink"], "negative_prompt is None there and 'ink' here"),
        (["--size", "16x16"], "height is 32 there and 16 here; width is 32 there and 16 here"),
        (["--sampler", "euler"], "there and 'euler' here"),
        (["--dtype", "bfloat16"], "dtype is 'float32' there and 'bfloat16' here"),
    ],
)
def test_a_folder_of_other_settings(generate, pipe, tmp_path, arguments, message):
    folder = tmp_path / "out"
    folder.mkdir()
    settings = {
        "model": "digits", "weights": pipe.fingerprint(), "dtype": "float32", "loras": {}, "seed": 40, "negative_prompt": None, "height": 32,
        "width": 32, "steps": 2, "guidance_scale": 7.5,
        "sampler": sdfast.diffusion.sampler_name(pipe.scheduler_config, None),
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    refused(generate(*arguments), message)
    assert [path.name for path in folder.iterdir()] == ["settings.json"]


def test_pictures_tell_without_settings_json(generate):
    folder = generate()[3]
    expected = pictures(folder)
    settings = folder / "settings.json"
    settings.unlink()
    refused(
        generate("--steps", "3"),
        "000001.png was made with other settings (steps is 2 there and 3 here); choose",
    )
    refused(generate("--guidance-scale", "2"), "guidance_scale is 7.5 there and 2.0 here")
    assert pictures(folder) == expected and not settings.exists()
    (folder / "000008.png").unlink()
    assert "1 image made, 6 there before" in generate()[1]
    assert pictures(folder) == expected and settings.exists()


def test_weights_of_the_same_name_that_were_trained_anew(generate, tmp_path):
    model = tmp_path / "my-ldm"
    shutil.copytree(digits_folder(), model)
    assert generate("--model", model)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    model = model.rename(tmp_path / "elsewhere" / "my-ldm")
    assert "0 images made, 7 there before" in generate("--model", model)[1]
    file = next((model / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"] += 2**-6
    save_file(tensors, file, {"format": "pt"})
    refused(generate("--model", model), "holds pictures of other settings (weights is '")
    (tmp_path / "out" / "settings.json").unlink()
    refused(generate("--model", model), "000001.png was made with other settings (weights is '")


def test_pictures_of_other_lines_and_other_hands(generate, prompts):
    folder = generate()[3]
    prompts.write_text("a handwritten nine\n", encoding="utf-8")
    refused(generate(), "000001.png shows 'a handwritten zero', but line 1 is now 'a handwritten nine'")
    Image.new("L", (32, 32)).save(folder / "000001.png")
    refused(generate(), "000001.png was not made here; move it away")
    assert len(pictures(folder)) == 7
    (folder / "settings.json").write_text("{")
    refused(generate(), "settings.json holds no settings")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a handwritten seven"], "PROMPT: not with --prompts"),
        (["-n", "2"], "--num-images: not with --prompts"),
        (["--separate"], "--separate: not with --prompts"),
        (["--image", "in.png"], "--image: not with --prompts"),
        (["--strength", "0.5"], "--strength: not with --prompts"),
        (["--steps", "0"], "--steps: got 0"),
        (["--prompts", "absent.txt"], "--prompts: absent.txt is no such file"),
        (["--lora", "absent.safetensors:0.5"], "--lora: absent.safetensors: no such file or folder"),
        (["--output", "prompts.txt"], "--output: "),
    ],
)
def test_bad_input(generate, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sdfast.generation.sample", None)  # nothing is to be computed
    refused(generate(*arguments), message)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no prompt, expected one a line"),
        (b" \n\n\t", "has no prompt"),
        (b"\xff\xfe\x00seven", "is not UTF-8"),
    ],
)
def test_files_without_prompts(generate, prompts, content, message):
    prompts.write_bytes(content)
    refused(generate(), message)


def test_what_was_refused_does_not_bind_the_folder(generate):
    refused(generate("--size", "65536x65536"), "GiB")
    status, _, _, folder = generate()
    assert status == 0 and len(pictures(folder)) == 7


def test_an_output_is_needed(prompts, capsys):
    refused((cli.main(["generate", "--prompts", str(prompts)]), *capsys.readouterr(), None), "-o DIR")
    refused(
        (cli.main(["generate"]), *capsys.readouterr(), None), "PROMPT: say what to draw, or give --prompts"
    )


def test_what_torchrun_says():
    assert share_of({}) == Share(0, 1, 0)
    assert share_of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Share(5, 8, 1)
    for environment in (
        {"RANK": "1"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "first"},
        {"WORLD_SIZE": "0"},
    ):
        with pytest.raises(ValueError, match=r"RANK|WORLD_SIZE"):
            share_of(environment)


def test_loras_on_the_command_line(generate, tmp_path, pipe, capsys):
    """FILE:SCALE, FILE, and a file whose name has a colon."""
    files = [tmp_path / "one.safetensors", tmp_path / "two:0.5.safetensors"]
    for seed, file in enumerate(files):
        lora.add_lora(pipe.unet, 2)
        torch.manual_seed(seed)
        for factor in lora.lora_state_dict(pipe.unet).values():
            factor.copy_(0.2 * torch.randn_like(factor))
        lora.save_lora(file, {"unet": pipe.unet})
        lora.remove_lora(pipe.unet)
    path = tmp_path / "seven.png"
    arguments = ["generate", "a handwritten seven", "-o", str(path), "--steps", "2", "--seed", "1"]
    assert cli.main([*arguments, "--lora", f"{files[0]}:-0.5", "--lora", str(files[1])]) == 0
    assert read_settings(path)["loras"] == {str(files[0]): -0.5, str(files[1]): 1.0}
    for file, scale in zip(files, (-0.5, 1.0), strict=True):
        pipe.load_lora(file, scale)
    assert (
        pipe.text_to_image("a handwritten seven", seed=1, steps=2).images[0].tobytes()
        == Image.open(path).tobytes()
    )
    pipe.unload_lora()
    assert (
        pipe.text_to_image("a handwritten seven", seed=1, steps=2).images[0].tobytes()
        != Image.open(path).tobytes()
    )
    capsys.readouterr()
    tensors = load_file(files[0])
    save_file({name: tensor[:, :1].contiguous() for name, tensor in tensors.items()}, files[0])
    refused(
        (cli.main([*arguments, "--lora", str(files[0])]), *capsys.readouterr(), None),
        "shapes differ at unet.",
    )
    refused((cli.main([*arguments, "--lora", f"{files[1]}:nan"]), *capsys.readouterr(), None), "scale of nan")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert generate("--lora", files[1])[0] == 0
    refused(generate(), "loras is {")
    tensors = load_file(files[1])
    save_file({name: -tensor for name, tensor in tensors.items() if "lora_B" in name} | {
        name: tensor for name, tensor in tensors.items() if "lora_A" in name}, files[1])  # fmt: skip
    refused(generate("--lora", files[1]), "holds pictures of other settings (weights is '")
