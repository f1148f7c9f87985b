"""LoRA files on a pipeline: they add up and leave no trace, and wrong or interrupted ones change nothing."""

import json

import lora_pipelines
import pytest
import torch
from lora_pipelines import (
    MOST,
    assert_same,
    edited,
    our_pipeline,
    their_pipeline,
    theirs,
    weights,
)

import sdfast
from sdfast import lora
from sdfast.models.checkpoint import CheckpointError
from sdfast.testing import relative_error

pytestmark = pytest.mark.usefixtures("exact_numerics")  # what is wired wrongly would hide in less


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return lora_pipelines.write(tmp_path_factory.mktemp("lora"))


def test_files_that_cannot_be_trained_on(folders, files):
    pipe = our_pipeline(folders["sd"])
    with pytest.raises(ValueError, match="has no LoRA"):
        lora.load_lora(files["style"], {"unet": pipe.unet})
    lora.add_lora(pipe.unet, 2, targets=["to_q"])
    before = {name: factor.clone() for name, factor in lora.lora_state_dict(pipe.unet).items()}
    with pytest.raises(ValueError, match=r"style\.safetensors: unet: is of other layers or another rank"):
        lora.load_lora(files["style"], {"unet": pipe.unet})
    assert_same(lora.lora_state_dict(pipe.unet), before)


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):
    """Two LoRAs that share some layers."""
    folder = tmp_path_factory.mktemp("two")
    for name, targets in (("style", ["to_q", "conv1"]), ("hero", ["to_q", "to_v"])):
        pipe = our_pipeline(folders["sd"])
        lora.add_lora(pipe.unet, 2, targets=targets)
        torch.manual_seed(len(name))
        for factor in lora.lora_state_dict(pipe.unet).values():
            factor.copy_(0.3 * torch.randn_like(factor))
        lora.save_lora(folder / f"{name}.safetensors", {"unet": pipe.unet})
    return {name: folder / f"{name}.safetensors" for name in ("style", "hero")}


def test_several_add_up_and_leave_no_trace(folders, files):
    pipe, other = our_pipeline(folders["sd"]), their_pipeline(folders["sd"])
    plain = weights(pipe)
    pipe.load_lora(files["style"], 0.5)
    only_style = weights(pipe)
    pipe.load_lora(files["hero"], -1.5)
    assert pipe.loras == {"style": 0.5, "hero": -1.5}
    for name, file in files.items():
        other.load_lora_weights(file, adapter_name=name)
    other.set_adapters(["style", "hero"], [0.5, -1.5])
    result = pipe.text_to_image("a seven", steps=2, seed=1, output="latent")
    assert relative_error(result.images, theirs(other)) < MOST
    assert result.settings["loras"] == {"style": 0.5, "hero": -1.5}
    pipe.unload_lora("hero")
    assert_same(weights(pipe), only_style)
    pipe.load_lora(files["hero"])
    pipe.unload_lora("style")
    pipe.unload_lora("hero")
    assert_same(weights(pipe), plain)
    assert "loras" not in pipe.text_to_image("a seven", steps=1, seed=1).settings


def test_half_precision_weights_come_back(folders, files):
    pipe = sdfast.StableDiffusion.from_pretrained(folders["sd"], dtype=torch.bfloat16)
    plain = weights(pipe)
    pipe.load_lora(files["style"])
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in weights(pipe).items())
    pipe.unload_lora()
    assert_same(weights(pipe), plain)


def rename_first(tensors, old, new):
    key = min(key for key in tensors if old in key)
    tensors[key.replace(old, new)] = tensors.pop(key)


BAD_FILES = {
    "another model's name": (lambda t: rename_first(t, "down_blocks.0", "down_blocks.7"), r"1 of its .*: unet\.down_blocks\.7"),
    "an unknown name": (lambda t: t.update(emb_params=torch.zeros(2)), "of no layer here: emb_params"),
    "a lost factor": (lambda t: t.pop(next(k for k in t if "lora_B" in k)), r"incomplete: .*\(up\)"),
    "another width": (
        lambda t: t.update({k: v.repeat(1, 2) for k, v in t.items() if "to_q.lora_A" in k}),
        r"another model: shapes differ at unet.*to_q \(\(16, 2\) times \(2, 32\) for a weight of \(16, 16\)\)",
    ),
    "another rank": (
        lambda t: t.update({k: v[:1].contiguous() for k, v in t.items() if "lora_A" in k}), "shapes differ at"
    ),
    "not a number": (lambda t: next(iter(t.values())).fill_(float("nan")), "not numbers at unet"),
    "LoHa": (lambda t: rename_first(t, "lora_A.weight", "hada_w1_a"), "is a LoHa"),
    "DoRA": (lambda t: t.update({"unet.conv_in.dora_scale": torch.ones(1)}), "is a DoRA"),
    "an alpha for each row": (
        lambda t: t.update({f"{min(t).split('.lora')[0]}.alpha": torch.ones(2)}), "shapes differ at"
    ),
    "twice": (
        lambda t: t.update({k.replace(".lora_A.", ".lora_down."): v.clone() for k, v in t.items()}), "of no layer here"
    ),
    "nothing": (lambda t: t.clear(), "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_FILES)
def test_wrong_files_change_nothing(folders, files, tmp_path, what):
    edit, message = BAD_FILES[what]
    pipe = our_pipeline(folders["sd"])
    plain = weights(pipe)
    with pytest.raises(CheckpointError, match=message):
        pipe.load_lora(edited(files["style"], tmp_path / "bad.safetensors", edit))
    assert_same(weights(pipe), plain)
    assert pipe.loras == {}


def test_other_refusals(folders, files, tmp_path):
    pipe = our_pipeline(folders["sd"])
    plain = weights(pipe)
    whole = files["style"].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    for path, message in (
        (tmp_path / "absent.safetensors", "no such file or folder"),
        (tmp_path / "cut.safetensors", "damaged or cut short"),
        (tmp_path, "holds none of pytorch_lora_weights.safetensors"),
        (folders["sd"] / "unet" / "diffusion_pytorch_model.safetensors", "for another model, or no LoRA"),
        (edited(files["style"], tmp_path / "m.safetensors", lambda t: None, {"lora_adapter_metadata": "{"}), "no JSON"),
        (edited(files["style"], tmp_path / "l.safetensors", lambda t: None, {"lora_adapter_metadata": "[]"}), "no JSON"),
        (
            edited(
                files["style"], tmp_path / "p.safetensors", lambda t: None,
                {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}})},
            ),
            "configuration of peft cannot be read",
        ),
        (
            edited(
                files["style"], tmp_path / "d.safetensors", lambda t: None,
                {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})},
            ),
            "no plain LoRA",
        ),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            pipe.load_lora(path)
    with pytest.raises(ValueError, match="scale: got nan"):
        pipe.load_lora(files["style"], float("nan"))
    pipe.load_lora(files["style"])
    with pytest.raises(ValueError, match="'style' is loaded already"):
        pipe.load_lora(files["style"])
    with pytest.raises(ValueError, match="no LoRA 'hero' is loaded, only: style"):
        pipe.unload_lora("hero")
    pipe.unload_lora()
    lora.add_lora(pipe.unet, 1)
    with pytest.raises(ValueError, match="remove_lora it first"):
        pipe.load_lora(files["style"])
    lora.remove_lora(pipe.unet)
    assert_same(weights(pipe), plain)
    with pytest.raises(ValueError, match="unet has no LoRA"):
        lora.save_lora(tmp_path / "none.safetensors", {"unet": pipe.unet})
    with pytest.raises(ValueError, match="parts: got 'vae'"):
        lora.save_lora(tmp_path / "none.safetensors", {"vae": pipe.vae})
    with pytest.raises(ValueError, match="parts: got none"):
        lora.save_lora(tmp_path / "none.safetensors", {})
    assert not (tmp_path / "none.safetensors").exists()


def test_a_part_that_was_replaced(folders, files):
    pipe, other = our_pipeline(folders["sd"]), our_pipeline(folders["sd"])
    plain = weights(pipe)
    old, pipe.unet = pipe.unet, other.unet
    pipe.load_lora(files["style"])
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in weights(pipe).items())
    pipe.unet = old
    with pytest.raises(ValueError, match="replaced while a LoRA is in the old one"):
        pipe.load_lora(files["hero"])
    pipe.unload_lora()
    assert_same(weights(pipe), plain)
    assert_same(weights(other), plain)


def test_interrupted_while_merging(folders, files, monkeypatch):
    """Weights that were written already are taken back."""
    from sdfast import loaded_loras

    pipe = our_pipeline(folders["sd"])
    plain = weights(pipe)
    write, calls = loaded_loras.write_weight, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(loaded_loras, "write_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.load_lora(files["style"])
    assert_same(weights(pipe), plain)
    assert pipe.loras == {}


def test_interrupted_while_unloading(folders, files, monkeypatch):
    """It is still loaded, so that unloading it again takes out what is left of it."""
    from sdfast import loaded_loras

    pipe = our_pipeline(folders["sd"])
    plain = weights(pipe)
    pipe.load_lora(files["style"])
    pipe.load_lora(files["hero"])
    write, calls = loaded_loras.write_weight, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(loaded_loras, "write_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.unload_lora("hero")
    assert pipe.loras == {"style": 1.0, "hero": 1.0}
    pipe.unload_lora("hero")
    only_style = weights(pipe)
    pipe.unload_lora()
    assert pipe.loras == {}
    assert_same(weights(pipe), plain)
    pipe.load_lora(files["style"])
    assert_same(weights(pipe), only_style)
