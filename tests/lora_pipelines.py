"""Small pipelines, ours and diffusers', with a LoRA on them."""

import diffusers
import peft
import tiny_pipelines
import torch
from diffusers.training_utils import _collate_lora_metadata
from safetensors.torch import load_file, save_file

import sdfast

UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "net.0.proj", "net.2", "conv1", "time_emb_proj"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
MOST = 2e-5  # between two programs' fp32 latents


def write(folder):
    """A folder of Stable Diffusion's kind and one of SDXL's."""
    return {
        "sd": tiny_pipelines.sd_pipeline(folder / "sd"),
        "sdxl": tiny_pipelines.sdxl_pipeline(folder / "sdxl"),
    }


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


def weights(pipe):
    return {
        f"{i}.{name}": tensor.clone()
        for i, model in enumerate((pipe.unet, *pipe.text_encoders))
        for name, tensor in model.state_dict().items()
    }


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def edited(file, path, edit, metadata=None):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, path, metadata)
    return path
