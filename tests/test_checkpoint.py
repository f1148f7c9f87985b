"""Folders and hub ids: what diffusers and transformers save loads here, and the other way round."""

import json
import subprocess
import sys
import textwrap

import diffusers
import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from tiny_models import DDPM, VAE, assert_same_tensors, make_clip, make_unet

from sdfast.models import AutoencoderKL, CLIPTextEncoder, UNet2D, UNet2DCondition, weights
from sdfast.models import checkpoint as ckpt
from sdfast.models.config import config_from_dict, config_to_dict

MODELS = {
    "unet": (UNet2DCondition, diffusers.UNet2DConditionModel, make_unet),
    "ddpm": (UNet2D, diffusers.UNet2DModel, lambda: diffusers.UNet2DModel(**DDPM)),
    "vae": (AutoencoderKL, diffusers.AutoencoderKL, lambda: diffusers.AutoencoderKL(**VAE)),
    "clip": (CLIPTextEncoder, transformers.CLIPTextModel, make_clip),
    "clip-projected": (
        CLIPTextEncoder,
        transformers.CLIPTextModelWithProjection,
        lambda: make_clip(transformers.CLIPTextModelWithProjection),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(kind, tmp_path):
    our_class, their_class, make = MODELS[kind]
    theirs = make()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ckpt.load_model(our_class, tmp_path / "theirs")
    assert not ours.training
    assert_same_tensors(ours, theirs)
    ckpt.save_model(ours, tmp_path / "ours")
    back, report = their_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same_tensors(ours, back)
    again = ckpt.load_model(our_class, tmp_path / "ours")
    assert again.config == ours.config
    # A model saved where it was loaded from keeps its values: they are mapped from the file that is replaced.
    ckpt.save_model(again, tmp_path / "ours")
    assert_same_tensors(again, theirs)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("our_class", "their_class", "settings"),
    [
        (UNet2DCondition, diffusers.UNet2DConditionModel, {"cross_attention_dim": 768, "sample_size": 64}),
        (UNet2DCondition, diffusers.UNet2DConditionModel, {"cross_attention_dim": 768, "in_channels": 9}),
        (
            UNet2DCondition,
            diffusers.UNet2DConditionModel,
            {
                "cross_attention_dim": 1024,
                "attention_head_dim": [5, 10, 20, 20],
                "use_linear_projection": True,
                "upcast_attention": True,
            },
        ),
        (
            UNet2DCondition,
            diffusers.UNet2DConditionModel,
            {
                "cross_attention_dim": 2048,
                "attention_head_dim": [5, 10, 20],
                "use_linear_projection": True,
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": [1, 2, 10],
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        (UNet2D, diffusers.UNet2DModel, {}),
        (
            AutoencoderKL,
            diffusers.AutoencoderKL,
            {
                "block_out_channels": [128, 256, 512, 512],
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
                "layers_per_block": 2,
                "scaling_factor": 0.13025,
            },
        ),
    ],
    ids=["sd15", "inpainting", "sd21", "sdxl", "ddpm", "vae"],
)
def test_configs_of_diffusers(our_class, their_class, settings, tmp_path):
    with torch.device("meta"):
        theirs = their_class(**settings)
    theirs.save_config(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    with torch.device("meta"):
        ours = our_class(config_from_dict(our_class, written))
        back = their_class.from_config(config_to_dict(ours))
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in back.state_dict().items()}
    ignored = {"upcast_attention"}
    for key, value in theirs.config.items():
        if not key.startswith("_") and key not in ignored:
            assert back.config[key] == value or list(back.config[key]) == list(value), key


def test_dtype_variant_and_subfolder(tmp_path):
    theirs = make_unet()
    theirs.half().save_pretrained(tmp_path / "unet", variant="fp16")
    ours = ckpt.load_model(UNet2DCondition, tmp_path, subfolder="unet", variant="fp16")
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float16}
    assert_same_tensors(ours, theirs)
    wide = ckpt.load_model(UNet2DCondition, tmp_path, subfolder="unet", variant="fp16", dtype=torch.float32)
    assert {tensor.dtype for tensor in wide.state_dict().values()} == {torch.float32}
    assert_same_tensors(wide, theirs.float())
    with pytest.raises(
        ckpt.CheckpointError, match=r"variant=None.*diffusion_pytorch_model\.fp16\.safetensors"
    ):
        ckpt.load_model(UNet2DCondition, tmp_path / "unet")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_by_diffusers(variant, tmp_path):
    theirs = make_unet()
    theirs.save_pretrained(tmp_path, max_shard_size="200KB", variant=variant)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_tensors(ckpt.load_model(UNet2DCondition, tmp_path, variant=variant), theirs)


def test_shards_by_us_and_no_stale_files(tmp_path):
    theirs = make_unet()
    theirs.save_pretrained(tmp_path)
    ours = ckpt.load_model(UNet2DCondition, tmp_path)
    ckpt.save_model(ours, tmp_path, max_shard_bytes=200_000)
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_tensors(ours, diffusers.UNet2DConditionModel.from_pretrained(tmp_path))
    assert_same_tensors(ckpt.load_model(UNet2DCondition, tmp_path), theirs)
    ckpt.save_model(ours, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    with pytest.raises(ValueError, match="max_shard_bytes"):
        ckpt.save_model(ours, tmp_path, max_shard_bytes=0)


def test_names_of_old_files(tmp_path):
    """Before diffusers 0.13 the VAE's attention, before transformers 4.31 the text encoder's positions."""
    vae = diffusers.AutoencoderKL(**VAE)
    vae.save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        for new_part, old_part in old.items():
            name = name.replace(f".{new_part}.", f".{old_part}.")
        state[name] = tensor
    safetensors.torch.save_file(state, path)
    assert_same_tensors(ckpt.load_model(AutoencoderKL, tmp_path / "vae"), vae)

    clip = make_clip()
    clip.save_pretrained(tmp_path / "clip")
    state = {f"text_model.{name}": tensor for name, tensor in clip.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    (tmp_path / "clip" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "clip" / "pytorch_model.bin")
    assert_same_tensors(ckpt.load_model(CLIPTextEncoder, tmp_path / "clip"), clip)


def test_hub_id(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ckpt.CheckpointError, match="somebody/nothing.*hub did not give it.*local folder"
    ) as error:
        ckpt.load_model(UNet2DCondition, "somebody/nothing", subfolder="unet")
    assert "\n" not in str(error.value)
    for name in ("no-such-folder", "a/b/c", "../x", "/no/such"):
        with pytest.raises(ckpt.CheckpointError, match="no such file or folder"):
            ckpt.resolve(name)
    repository = tmp_path / "models--somebody--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    theirs = make_unet()
    theirs.save_pretrained(repository / "snapshots" / "0123" / "unet")
    assert_same_tensors(ckpt.load_model(UNet2DCondition, "somebody/something", subfolder="unet"), theirs)


def test_what_is_fetched_from_the_hub():
    parts = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    parts |= {"model_index.json", "unet/config.json", "text_encoder/config.json"}
    parts |= {"scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"}
    others = {
        "v1-5-pruned.safetensors",
        "v1-5-pruned.ckpt",
        "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
    }

    def fetched(subfolder=None, variant=None):
        return set(
            huggingface_hub.utils.filter_repo_objects(
                sorted(parts | others),
                allow_patterns=ckpt._hub_patterns(subfolder, variant),
                ignore_patterns=[f"{part}/*" for part in ckpt._LEFT_OUT],
            )
        )

    assert fetched() == parts
    assert fetched("unet") == {"unet/diffusion_pytorch_model.safetensors", "unet/config.json"}
    assert fetched("unet", "fp16") == {"unet/diffusion_pytorch_model.fp16.safetensors", "unet/config.json"}


def make_pipeline(tmp_path):
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=make_clip(),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_pipeline_folder_round_trip(tmp_path):
    theirs = make_pipeline(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    components = ckpt.load_components(tmp_path / "theirs", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in components["unet"].state_dict().values()} == {torch.bfloat16}
    components = ckpt.load_components(tmp_path / "theirs")
    assert components["_class_name"] == "StableDiffusionPipeline"
    assert components["scheduler"]["prediction_type"] == "v_prediction"
    assert components["tokenizer"] == tmp_path / "theirs" / "tokenizer"
    assert components["requires_safety_checker"] is False
    components |= {"safety_checker": None, "feature_extractor": None}
    ckpt.save_components(tmp_path / "ours", components)
    back = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    for part in ("unet", "vae", "text_encoder"):
        assert_same_tensors(components[part], getattr(back, part))
    assert back.scheduler.config.prediction_type == "v_prediction"
    assert back.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="_class_name"):
        ckpt.save_components(tmp_path / "x", {"unet": components["unet"]})


def test_buffers_outside_the_checkpoint_are_real():
    class WithBuffer(torch.nn.Linear):
        def __init__(self, config):
            super().__init__(2, 2)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    model = weights.build(WithBuffer, None, "test")
    assert model.weight.is_meta and model.table.tolist() == [0, 1, 2]
    lazy = {
        name: weights.LazyTensor(tuple(tensor.shape), lambda tensor=tensor: torch.ones(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    weights.fill(model, lazy, "test", dtype=None, device="cpu")
    assert model.weight.requires_grad and model(torch.ones(2)).tolist() == [3, 3]
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_peak_memory_is_one_copy(tmp_path):
    """Loading the full Stable Diffusion 1.5 and reading all of it takes its 4.3 GB once."""
    with torch.device("meta"):
        parts = {
            "unet": diffusers.UNet2DConditionModel(cross_attention_dim=768),
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
            "text_encoder": transformers.CLIPTextModel(
                transformers.CLIPTextConfig(
                    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
                )
            ),
        }
    size = 0
    index = {"_class_name": "StableDiffusionPipeline"}
    for part, model in parts.items():
        (tmp_path / part).mkdir()
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        model.config.save_pretrained(tmp_path / part) if part == "text_encoder" else model.save_config(
            tmp_path / part
        )
        size += write_zeros(model, tmp_path / part / f"{stem}.safetensors")
        index[part] = ["transformers" if part == "text_encoder" else "diffusers", type(model).__name__]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    script = textwrap.dedent(f"""
        import pathlib, re, torch
        import sdfast.models
        from sdfast.models.checkpoint import load_components
        def peak():
            status = pathlib.Path("/proc/self/status").read_text()
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
        before = peak()
        parts = load_components({str(tmp_path)!r})
        for model in (parts["unet"], parts["vae"], parts["text_encoder"]):
            assert sum(p.view(torch.int32).amax().item() for p in model.parameters()) == 0
        assert parts["unet"].conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        print(peak() - before)
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.9 * size < int(result.stdout) < 1.2 * size


def write_zeros(model, path):
    """A safetensors file of the model's tensors, all zero, that takes no disk but memory like any other."""
    header, size = {}, 0
    for name, tensor in model.state_dict().items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [size, size + tensor.nbytes],
        }
        size += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    return size
