"""Single LDM files, made from diffusers models by the LDM code's numbering: read here, and by diffusers."""

import re

import diffusers
import pytest
import safetensors.torch
import torch
import transformers
from diffusers.loaders import single_file_utils as theirs_single_file
from tiny_models import assert_same_tensors

from sdfast.models import ldm_keys, single_file
from sdfast.models.checkpoint import CheckpointError, load_single_file
from sdfast.models.weights import LazyTensor

UNETS = {
    "SD 1": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64},
    "SD 2": {
        "block_out_channels": (64, 128, 128, 128),
        "attention_head_dim": (1, 2, 2, 2),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
    },
    "SDXL": {
        "block_out_channels": (64, 128, 128),
        "attention_head_dim": (1, 2, 2),
        "cross_attention_dim": 192,
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 128 + 6 * 256,
    },
}
UNETS["SD 1 inpainting"] = UNETS["SD 1"] | {"in_channels": 9}
FULL_SIZE = {
    "SD 1": {"cross_attention_dim": 768},
    "SD 2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "SDXL": UNETS["SDXL"]
    | {
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_to_ldm(state, levels, layers=2):
    """LDM's names by its arithmetic: 1 + (layers+1)·i + j on the way down, (layers+1)·i + j on the way up."""
    outside = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    table = dict(outside)
    for i in range(levels):
        for j in range(layers + 1):
            down, up = 1 + (layers + 1) * i + j, (layers + 1) * i + j
            table[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{down}.0"
            table[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{down}.1"
            table[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{up}.0"
            table[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{up}.1"
        table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
        attentive = any(name.startswith(f"up_blocks.{i}.attentions") for name in state)
        table[f"up_blocks.{i}.upsamplers.0.conv"] = (
            f"output_blocks.{(layers + 1) * (i + 1) - 1}.{2 if attentive else 1}.conv"
        )
    renamed = {}
    for name, tensor in state.items():
        old = next(old for old in table if name.startswith(f"{old}."))
        rest = name.removeprefix(f"{old}.")
        if ".resnets." in name:
            part, kind = rest.rsplit(".", 1)
            rest = f"{RESNET[part]}.{kind}"
        renamed[f"model.diffusion_model.{table[old]}.{rest}"] = tensor
    return renamed


def vae_to_ldm(state, levels=4):
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    renamed = {}
    for name, tensor in state.items():
        new = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if match := re.match(r"(en|de)coder\.mid_block\.attentions\.0\.(.*)\.(weight|bias)", name):
            new = f"{match[1]}coder.mid.attn_1.{attention[match[2]]}.{match[3]}"
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor  # a 1x1 convolution there
        for i in range(levels):
            new = new.replace(f"encoder.down_blocks.{i}.", f"encoder.down.{i}.")
            new = new.replace(f"decoder.up_blocks.{i}.", f"decoder.up.{levels - 1 - i}.")
        new = new.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample.")
        new = new.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        renamed[f"first_stage_model.{new.replace('.resnets.', '.block.')}"] = tensor
    return renamed


def open_clip(state, prefix, *, extra_layer):
    """OpenCLIP's names for a transformers text encoder; SD 2 files hold one layer more than is used."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    width = state["final_layer_norm.weight"].shape[0]
    renamed = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state.get("text_projection.weight", torch.randn(width, width)).T.contiguous(),
        "logit_scale": torch.ones(()),
    }
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
    for i in range(layers + extra_layer):
        old, new = f"encoder.layers.{min(i, layers - 1)}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            qkv = [state[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            renamed[f"{new}.attn.in_proj_{kind}"] = torch.cat(qkv)
            renamed[f"{new}.attn.out_proj.{kind}"] = state[f"{old}.self_attn.out_proj.{kind}"]
            for ours, theirs in (("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                renamed[f"{new}.{theirs}.{kind}"] = state[f"{old}.{ours}.{kind}"]
            for number in (1, 2):
                renamed[f"{new}.ln_{number}.{kind}"] = state[f"{old}.layer_norm{number}.{kind}"]
    return {prefix + name: tensor for name, tensor in renamed.items()}


def make_clip(width, *, act, projected=False):
    their_class = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, hidden_act=act,
        num_attention_heads=width // 64, projection_dim=width, bos_token_id=97, eos_token_id=98,
    )  # fmt: skip
    return their_class(config).eval()


def make_file(kind):
    """One LDM file's tensors and the models they come from."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**UNETS[kind]).eval()
    models = {"unet": unet, "vae": diffusers.AutoencoderKL(**VAE).eval()}
    state = unet_to_ldm(unet.state_dict(), len(UNETS[kind]["block_out_channels"]))
    state |= vae_to_ldm(models["vae"].state_dict())
    if kind == "SD 2":
        models["text_encoder"] = make_clip(64, act="gelu")
        state |= open_clip(models["text_encoder"].state_dict(), "cond_stage_model.model.", extra_layer=1)
    else:
        models["text_encoder"] = make_clip(64, act="quick_gelu")
        prefix = "conditioner.embedders.0." if kind == "SDXL" else "cond_stage_model."
        for name, tensor in models["text_encoder"].state_dict().items():
            state[f"{prefix}transformer.text_model.{name}"] = tensor
        state[f"{prefix}transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if kind == "SDXL":
        models["text_encoder_2"] = make_clip(128, act="gelu", projected=True)
        state |= open_clip(
            models["text_encoder_2"].state_dict(), "conditioner.embedders.1.model.", extra_layer=0
        )
    state["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(1)
    state["model_ema.decay"] = torch.zeros(())
    state["first_stage_model.loss.logvar"] = torch.zeros(())
    state["alphas_cumprod"] = torch.zeros(1000)
    # Copies: safetensors saves no two names of one tensor, and SD 2's added layer repeats the one before.
    return {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }, models


@pytest.mark.parametrize("kind", UNETS)
@torch.inference_mode()
def test_reads_every_kind(kind, tmp_path):
    state, models = make_file(kind)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    components = load_single_file(tmp_path / "model.safetensors")
    assert components.keys() == models.keys() | {"scheduler", "_class_name"}
    for part, theirs in models.items():
        assert_same_tensors(components[part], theirs)

    sample = torch.randn(2, UNETS[kind].get("in_channels", 4), 8, 8)
    text = torch.randn(2, 5, UNETS[kind]["cross_attention_dim"])
    added = {"text_embeds": torch.randn(2, 128), "time_ids": torch.randn(2, 6)} if kind == "SDXL" else None
    ours = components["unet"](sample, torch.tensor([3, 700]), text, added)
    theirs = models["unet"](sample, torch.tensor([3, 700]), text, added_cond_kwargs=added).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    latent = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(
        components["vae"].decode(latent), models["vae"].decode(latent).sample, rtol=1e-4, atol=1e-4
    )
    ids = torch.randint(0, 99, (2, 77))
    ids[:, -1] = 98
    for part in models.keys() & {"text_encoder", "text_encoder_2"}:
        got, expected = components[part](ids), models[part](ids)
        torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
        pooled = expected.text_embeds if part == "text_encoder_2" else expected.pooler_output
        torch.testing.assert_close(got.pooled, pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", UNETS)
def test_agrees_with_the_converter_of_diffusers(kind):
    state, models = make_file(kind)
    lazy = {name: LazyTensor(tuple(tensor.shape), lambda t=tensor: t) for name, tensor in state.items()}

    def assert_same(mapping, theirs, *, theirs_may_have_more=False):
        ours = {name: tensor.read() for name, tensor in single_file._mapped(lazy, mapping).items()}
        assert ours.keys() <= theirs.keys() if theirs_may_have_more else ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name

    config = dict(models["unet"].config)
    assert_same(
        ldm_keys.unet_mapping(state), theirs_single_file.convert_ldm_unet_checkpoint(dict(state), config)
    )
    without_loss = {name: tensor for name, tensor in state.items() if ".loss." not in name}
    vae = theirs_single_file.convert_ldm_vae_checkpoint(without_loss, dict(models["vae"].config))
    assert_same(ldm_keys.vae_mapping(state), vae)
    if kind in ("SD 2", "SDXL"):
        part, prefix = {
            "SD 2": ("text_encoder", "cond_stage_model.model."),
            "SDXL": ("text_encoder_2", "conditioner.embedders.1.model."),
        }[kind]
        sdxl = kind == "SDXL"
        mapping = ldm_keys.open_clip_mapping(
            state, prefix, with_projection=sdxl, drop_last_layers=0 if sdxl else 1
        )
        theirs = theirs_single_file.convert_open_clip_checkpoint(models[part], dict(state), prefix=prefix)
        assert_same(mapping, theirs, theirs_may_have_more=not sdxl)  # it drops SD 2's 24th layer by name


@pytest.mark.parametrize("kind", FULL_SIZE)
def test_sizes_read_off_the_published_models(kind):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**FULL_SIZE[kind])
    state = unet_to_ldm(unet.state_dict(), len(unet.config.block_out_channels))
    lazy = {name: LazyTensor(tuple(tensor.shape), lambda: None) for name, tensor in state.items()}
    config = single_file._unet_config(lazy, next(k for k in single_file._KINDS if k.name == kind))
    for key, value in FULL_SIZE[kind].items():
        assert getattr(config, key) == value, key
    assert config.block_out_channels == tuple(unet.config.block_out_channels)
    assert config.layers_per_block == 2
    assert config.down_block_types == tuple(unet.config.down_block_types)
    assert config.up_block_types == tuple(unet.config.up_block_types)
    assert ldm_keys.unet_mapping(state).keys() == unet.state_dict().keys()


def test_kind_scheduler_and_prediction_type(tmp_path):
    path = tmp_path / "model.safetensors"

    def load(state, **options):
        safetensors.torch.save_file(state, path)
        components = load_single_file(path, **options)
        return components["_class_name"], components["scheduler"]["prediction_type"], components

    state, _ = make_file("SD 2")
    assert load(state)[:2] == ("StableDiffusionPipeline", "v_prediction")
    assert load(state, prediction_type="epsilon")[1] == "epsilon"
    assert load(state | {"global_step": torch.tensor(875000)})[1] == "epsilon"
    state, _ = make_file("SD 1 inpainting")
    assert load(state)[:2] == ("StableDiffusionInpaintPipeline", "epsilon")
    state, _ = make_file("SDXL")
    name, prediction, components = load(state)
    assert (name, prediction) == ("StableDiffusionXLPipeline", "epsilon")
    assert components["vae"].config.scaling_factor == 0.13025
    marked = state | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    _, prediction, components = load(marked, dtype=torch.bfloat16)
    assert prediction == "v_prediction"
    assert components["scheduler"]["rescale_betas_zero_snr"]
    assert components["unet"].conv_in.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="prediction_type: got 'noise'"):
        load_single_file(path, prediction_type="noise")


def test_ckpt(tmp_path):
    state, models = make_file("SD 1")
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"state_dict": state}, "epoch": 3, "callbacks": {}}, path)
    assert_same_tensors(load_single_file(path)["unet"], models["unet"])
    torch.save({"state_dict": state, "callbacks": {print: 1}}, path)
    with pytest.raises(CheckpointError, match="Python objects besides tensors.*safetensors"):
        load_single_file(path)


def test_refusals(tmp_path):
    path = tmp_path / "model.safetensors"

    def refuse(state, message):
        safetensors.torch.save_file(state, path)
        with pytest.raises(CheckpointError, match=message):
            load_single_file(path)

    state, _ = make_file("SD 1")
    refuse({"x": torch.zeros(1)}, "no model.diffusion_model")
    refuse({k: v for k, v in state.items() if not k.startswith("cond_stage")}, "not the text encoders")
    refuse(state | {"edm_mean": torch.zeros(1)}, "EDM")
    refuse({k: v for k, v in state.items() if not k.startswith("first_stage")}, "lacks first_stage_model")
    refuse(state | {"model.diffusion_model.lora": torch.zeros(1)}, r"\(unet\).*1 unexpected: lora")
    gone = "model.diffusion_model.middle_block.1.norm.weight"
    refuse({k: v for k, v in state.items() if k != gone}, "1 missing: mid_block.attentions.0.norm.weight")
    with pytest.raises(CheckpointError, match="no such file"):
        load_single_file(tmp_path / "absent.safetensors")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="expected .safetensors"):
        load_single_file(tmp_path / "model.gguf")
