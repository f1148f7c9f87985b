"""LoRAs in files: what diffusers, peft and kohya's scripts write draws the same here, and the other way round."""

import lora_pipelines
import peft
import pytest
import torch
from lora_pipelines import (
    MOST,
    TEXT,
    UNET,
    draw_adapters,
    edited,
    our_pipeline,
    ours,
    saved_by_diffusers,
    their_pipeline,
    theirs,
)
from safetensors.torch import load_file, save_file

from sdfast import lora
from sdfast.lora_names import Names
from sdfast.models.ldm_keys import UNET_PREFIX, ldm_names, unet_mapping
from sdfast.testing import relative_error

pytestmark = pytest.mark.usefixtures("exact_numerics")  # what is wired wrongly would hide in less


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return lora_pipelines.write(tmp_path_factory.mktemp("lora"))


@pytest.fixture(params=["sd", "sdxl"])
def kind(request):
    return request.param


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
