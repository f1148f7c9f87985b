"""LoRAs in files: what diffusers, peft and kohya's scripts write draws the same here, and the other way round."""

import json

import diffusers
import peft
import pytest
import tiny_pipelines
import torch
from diffusers.training_utils import _collate_lora_metadata
from safetensors.torch import load_file, save_file

import sdfast
from sdfast import lora
from sdfast.lora_names import Names
from sdfast.models.checkpoint import CheckpointError
from sdfast.models.ldm_keys import UNET_PREFIX, ldm_names, unet_mapping
from sdfast.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "net.0.proj", "net.2", "conv1", "time_emb_proj"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
MOST = 2e-5  # between two programs' fp32 latents


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return {
        "sd": tiny_pipelines.sd_pipeline(folder / "sd"),
        "sdxl": tiny_pipelines.sdxl_pipeline(folder / "sdxl"),
    }


@pytest.fixture(params=["sd", "sdxl"])
def kind(request):
    return request.param


def our_pipeline(folder):
    return sdfast.StableDiffusion.from_pretrained(folder)


def their_pipeline(folder):
    pipe = diffusers.AutoPipelineForText2Image.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(pipe):
    return pipe.text_to_image("a seven", steps=2, seed=1, output="latent").images


def theirs(pipe):
    generator = torch.Generator().manual_seed(1)
    options = {
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
        "generator": generator,
        "output_type": "latent",
    }
    return pipe("a seven", **options).images.detach()


def models_of(pipe):
    return {
        name: getattr(pipe, name)
        for name in ("unet", "text_encoder", "text_encoder_2")
        if hasattr(pipe, name)
    }


def draw_adapters(pipe):
    """Adapters of peft's, not zero, on a pipeline of diffusers'."""
    torch.manual_seed(5)
    for name, model in models_of(pipe).items():
        rank, alpha, targets = (3, 4, UNET) if name == "unet" else (2, 1, TEXT)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        # Not transformers' add_adapter, which asks for a peft that is not out yet.
        peft.inject_adapter_in_model(config, model)
        model.peft_config = {"default": config}


def saved_by_diffusers(pipe, folder):
    """Tensors in peft's layout, its configurations in the header."""
    models = models_of(pipe)
    states = {f"{name}_lora_layers": peft.get_peft_model_state_dict(model) for name, model in models.items()}
    type(pipe).save_lora_weights(folder, **states, **_collate_lora_metadata(models))
    return folder / "pytorch_lora_weights.safetensors"


def test_a_file_of_diffusers_draws_as_there(folders, kind, tmp_path):
    other = their_pipeline(folders[kind])
    plain = theirs(other)
    draw_adapters(other)
    expected = theirs(other)
    saved_by_diffusers(other, tmp_path)
    pipe = our_pipeline(folders[kind])
    assert pipe.load_lora(tmp_path) == tmp_path.name
    assert relative_error(ours(pipe), expected) < MOST < 0.01 < relative_error(plain, expected)
    pipe.unload_lora()
    assert relative_error(ours(pipe), plain) < MOST


def test_our_file_draws_the_same_in_diffusers(folders, kind, tmp_path):
    pipe = our_pipeline(folders[kind])
    plain = ours(pipe)
    parts = {
        "unet": pipe.unet,
        **dict(zip(("text_encoder", "text_encoder_2"), pipe.text_encoders, strict=False)),
    }
    for part, model in parts.items():
        lora.add_lora(model, 3, 2.0, UNET if part == "unet" else TEXT)
        for factor in lora.lora_state_dict(model).values():
            factor.copy_(0.3 * torch.randn_like(factor))
    beside = ours(pipe)
    file = lora.save_lora(tmp_path / "mine.safetensors", parts)
    other = their_pipeline(folders[kind])
    other.load_lora_weights(file)
    assert relative_error(theirs(other), beside) < MOST < 0.01 < relative_error(plain, beside)
    loaded = our_pipeline(folders[kind])
    loaded.load_lora(file)
    assert relative_error(ours(loaded), beside) < MOST


@pytest.mark.parametrize(("dtype", "alpha"), [(torch.bfloat16, 2.0), (torch.float32, 2.0), (None, 1.5)])
def test_our_file_goes_on_being_trained(folders, tmp_path, dtype, alpha):
    """α / r is counted once, whatever α the model has now, and half-precision factors are not rounded.

    Programs may leave out 1x1 kernels.
    """
    pipe, other = our_pipeline(folders["sd"]), our_pipeline(folders["sd"])
    torch.manual_seed(3)
    for part, one in (("unet", pipe.unet), ("text_encoder", pipe.text_encoders[0])):
        lora.add_lora(one, 3, 2.0, UNET if part == "unet" else TEXT, dtype=dtype)
        for factor in lora.lora_state_dict(one).values():
            factor.copy_(0.3 * torch.randn_like(factor))
    file = lora.save_lora(tmp_path, {"unet": pipe.unet, "text_encoder": pipe.text_encoders[0]})
    parts = {"unet": other.unet, "text_encoder": other.text_encoders[0]}
    for part, one in parts.items():
        lora.add_lora(one, 3, alpha, UNET if part == "unet" else TEXT, dtype=dtype)
    bare = edited(
        file, tmp_path / "bare.safetensors",
        lambda tensors: tensors.update({k: t[..., 0, 0] for k, t in tensors.items() if t.shape[2:] == (1, 1)}),
    )  # fmt: skip
    lora.load_lora(file if alpha == 2.0 else bare, parts)
    if alpha == 2.0:
        for part, one in (("unet", pipe.unet), ("text_encoder", pipe.text_encoders[0])):
            back = lora.lora_state_dict(parts[part])
            for name, factor in lora.lora_state_dict(one).items():
                assert relative_error(back[name], factor) < (1e-6 if dtype == torch.float32 else 1e-9), name
    if dtype != torch.bfloat16:
        assert relative_error(ours(other), ours(pipe)) < MOST


def test_files_that_cannot_be_trained_on(folders, files):
    pipe = our_pipeline(folders["sd"])
    with pytest.raises(ValueError, match="has no LoRA"):
        lora.load_lora(files["style"], {"unet": pipe.unet})
    lora.add_lora(pipe.unet, 2, targets=["to_q"])
    before = {name: factor.clone() for name, factor in lora.lora_state_dict(pipe.unet).items()}
    with pytest.raises(ValueError, match=r"style\.safetensors: unet: is of other layers or another rank"):
        lora.load_lora(files["style"], {"unet": pipe.unet})
    assert_same(lora.lora_state_dict(pipe.unet), before)


def as_kohya(tensors, unet_names=None):
    """peft's layout as kohya's scripts write it, with an α for each layer."""
    state = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        layer, _, which = name.removesuffix(".weight").rpartition(".")
        if part == "unet":
            layer = (unet_names or {}).get(layer, layer)
        elif not layer.startswith("text_model."):  # transformers from 5 on
            layer = f"text_model.{layer}"
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}[part]
        stem = f"{prefix}_{layer.replace('.', '_')}"
        state[f"{stem}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[which] }.weight"] = tensor
        state[f"{stem}.alpha"] = torch.tensor(1.5)
    return state


@pytest.mark.parametrize(
    ("kind", "naming"), [("sd", "diffusers"), ("sdxl", "diffusers"), ("sdxl", "single file")]
)
def test_a_file_of_kohyas_scripts_draws_as_in_diffusers(folders, kind, naming, tmp_path):
    """SDXL's have the names of Stability AI's files, most of them."""
    other = their_pipeline(folders[kind])
    draw_adapters(other)
    tensors = load_file(saved_by_diffusers(other, tmp_path))
    other = their_pipeline(folders[kind])
    pipe = our_pipeline(folders[kind])
    names = ldm_names(pipe.unet) if naming == "single file" else None
    save_file(as_kohya(tensors, names), tmp_path / "kohya.safetensors")
    other.load_lora_weights(tmp_path / "kohya.safetensors")
    pipe.load_lora(tmp_path / "kohya.safetensors")
    assert relative_error(ours(pipe), theirs(other)) < MOST


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
CLIP = "text_model.encoder.layers.0"
NAMES = {
    f"unet.{BLOCK}.attn1.to_q.lora_A.weight": ("unet", f"{BLOCK}.attn1.to_q", "down"),
    f"unet.{BLOCK}.attn1.to_q.lora_B.default.weight": ("unet", f"{BLOCK}.attn1.to_q", "up"),
    f"unet.{BLOCK}.attn1.to_out.0.lora.up.weight": ("unet", f"{BLOCK}.attn1.to_out.0", "up"),
    f"unet.{BLOCK}.attn1.processor.to_k_lora.down.weight": ("unet", f"{BLOCK}.attn1.to_k", "down"),
    f"unet.{BLOCK}.attn2.processor.to_out_lora.up.weight": ("unet", f"{BLOCK}.attn2.to_out.0", "up"),
    f"{BLOCK}.attn2.processor.to_v_lora.down.weight": ("unet", f"{BLOCK}.attn2.to_v", "down"),
    f"base_model.model.{BLOCK}.ff.net.2.lora_A.weight": ("unet", f"{BLOCK}.ff.net.2", "down"),
    f"unet.{BLOCK}.ff.net.0.proj.lora.down.weight": ("unet", f"{BLOCK}.ff.net.0.proj", "down"),
    f"text_encoder.{CLIP}.self_attn.q_proj.lora_A.weight": ("text_encoder", f"{CLIP}.self_attn.q_proj", "down"),
    "text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight": ("text_encoder", f"{CLIP}.mlp.fc1", "up"),
    f"text_encoder.{CLIP}.self_attn.to_q_lora.down.weight": ("text_encoder", f"{CLIP}.self_attn.q_proj", "down"),
    f"text_encoder.{CLIP}.self_attn.to_out_lora.up.weight": ("text_encoder", f"{CLIP}.self_attn.out_proj", "up"),
    f"text_encoder.{CLIP}.mlp.fc2.lora_linear_layer.up.weight": ("text_encoder", f"{CLIP}.mlp.fc2", "up"),
    f"base_model.model.{CLIP}.self_attn.k_proj.lora_B.weight": ("text_encoder", f"{CLIP}.self_attn.k_proj", "up"),
    "lora_unet_time_embedding_linear_1.alpha": ("unet", "time_embedding.linear_1", "alpha"),
    "lora_te1_text_model_encoder_layers_1_mlp_fc2.lora_up.weight": (
        "text_encoder", "text_model.encoder.layers.1.mlp.fc2", "up",
    ),
    "lora_unet_output_blocks_1_2_conv.lora_down.weight": ("unet", "up_blocks.0.upsamplers.0.conv", "down"),
    "unet.down_blocks.0.norm.lora_A.weight": None,
    "lora_te2_text_model_encoder_layers_1_mlp_fc2.lora_up.weight": None,
    f"unet.{BLOCK}.attn1.to_q.weight": None,
}  # fmt: skip


def test_names_by_whom_it_was_written(folders):
    pipe = our_pipeline(folders["sd"])
    names = Names({"unet": pipe.unet, "text_encoder": pipe.text_encoders[0]})
    for key, expected in NAMES.items():
        found = names.read(key)
        assert found == (None if expected is None else (expected[:2], expected[2])), key


def test_names_of_a_single_file_are_the_ones_it_is_read_by(folders):
    for folder in folders.values():
        unet = our_pipeline(folder).unet
        names = {
            name: theirs for name, theirs in ldm_names(unet).items()
            if isinstance(unet.get_submodule(name), (torch.nn.Linear, torch.nn.Conv2d))
        }  # fmt: skip
        mapping = unet_mapping([f"{UNET_PREFIX}{theirs}.weight" for theirs in names.values()])
        assert mapping.keys() == {f"{name}.weight" for name in names}
        for name, single_file in names.items():
            assert mapping[f"{name}.weight"].key == f"{UNET_PREFIX}{single_file}.weight"


def test_a_folder_of_pefts(folders, tmp_path):
    """α, its pattern and rank stabilisation come from its configuration."""
    other = their_pipeline(folders["sd"])
    config = peft.LoraConfig(
        r=4, lora_alpha=6, alpha_pattern={"attn2.to_k": 1}, rank_pattern={"to_v": 2}, use_rslora=True,
        target_modules=["to_q", "to_k", "to_v", "conv1"], init_lora_weights=False,
    )  # fmt: skip
    wrapped = peft.get_peft_model(other.unet, config)
    expected = theirs(other)
    wrapped.save_pretrained(tmp_path)
    pipe = our_pipeline(folders["sd"])
    pipe.load_lora(tmp_path, name="peft")
    assert relative_error(ours(pipe), expected) < MOST


def weights(pipe):
    return {
        f"{i}.{name}": tensor.clone()
        for i, model in enumerate((pipe.unet, *pipe.text_encoders))
        for name, tensor in model.state_dict().items()
    }


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


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


def edited(file, path, edit, metadata=None):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, path, metadata)
    return path


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
