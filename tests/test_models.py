"""U-Nets and VAE against diffusers on the same random weights, at the real configurations."""

import diffusers
import pytest
import torch
from on_device import OnTheDevice
from torch.utils import _pytree as pytree

from sdfast import dispatch
from sdfast.models import AutoencoderKL, UNet2D, UNet2DCondition
from sdfast.models.config import config_from_dict, config_to_dict

pytestmark = pytest.mark.usefixtures("exact_numerics")  # what is wired wrongly would hide in less

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL_CUT = {  # SDXL as it is but for transformer depths 1, 2, 10 cut to 1, 2, 2
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 2],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL = {
    "block_out_channels": [32, 64],
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SD_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
DDPM_CIFAR = {  # google/ddpm-cifar10-32
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def randomise(module):
    """Fill a model made on the meta device, fast: a billion fresh normals would take longer than the test.

    Norm weights are random too; as initialised (1 and 0) they would hide a swapped or missing affine.
    """
    module.to_empty(device="cpu")
    pool = torch.randn(2**18 + 7)
    for name, parameter in module.named_parameters():
        values = pool / parameter[0].numel() ** 0.5
        if "norm" in name:
            values = float(name.endswith("weight")) + 0.2 * pool
        for part in parameter.data.view(-1).split(len(pool)):
            part.copy_(values[: len(part)])
        pool = pool.roll(12345)


def build(ours_class, theirs_class, **settings):
    torch.manual_seed(0)
    with torch.device("meta"):
        theirs = theirs_class(**settings).eval()
        ours = ours_class(config_from_dict(ours_class, dict(theirs.config))).eval()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours, theirs


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(SD15, id="sd15"),
        pytest.param(SD15 | {"in_channels": 9}, id="inpainting"),
        pytest.param(SD21, id="sd21"),
        pytest.param(SDXL_CUT, id="sdxl"),
    ],
)
@torch.inference_mode()
def test_unet_condition_equals_diffusers(settings):
    ours, theirs = build(UNet2DCondition, diffusers.UNet2DConditionModel, **settings)
    sample = torch.randn(1, ours.config.in_channels, 8, 16)
    text = torch.randn(1, 77, ours.config.cross_attention_dim)
    added = None
    if ours.config.addition_embed_type:
        added = {
            "text_embeds": torch.randn(1, 1280),
            "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]),
        }
    expected = theirs(sample, 981, text, added_cond_kwargs=added).sample
    assert relative_error(ours(sample, 981, text, added), expected) <= 1e-5


@pytest.mark.parametrize("size", [(16, 16), (9, 13), (1, 2)])
@torch.inference_mode()
def test_unet_condition_layouts_sizes_and_backends(size):
    ours, theirs = build(UNet2DCondition, diffusers.UNet2DConditionModel, **SMALL)
    sample, timesteps, text = torch.randn(2, 4, *size), torch.tensor([999, 3]), torch.randn(2, 7, 24)
    expected = theirs(sample, timesteps, text).sample
    assert relative_error(ours(sample, timesteps, text), expected) <= 1e-5
    ours.to(memory_format=torch.channels_last)
    assert relative_error(ours(sample, timesteps, text), expected) <= 1e-5
    with dispatch.use_backend("reference"):
        assert relative_error(ours(sample, timesteps, text), expected) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("scale_shift", ["default", "scale_shift"])
def test_unet_unconditional_equals_diffusers(scale_shift):
    attn_groups = {"attn_norm_num_groups": 32} if scale_shift == "scale_shift" else {}
    settings = DDPM_CIFAR | {"resnet_time_scale_shift": scale_shift} | attn_groups
    ours, theirs = build(UNet2D, diffusers.UNet2DModel, **settings)
    sample, timesteps = torch.randn(2, 3, 32, 32), torch.tensor([0, 500])
    assert relative_error(ours(sample, timesteps), theirs(sample, timesteps).sample) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("settings", [SD_VAE, SD_VAE | {"scaling_factor": 0.13025, "use_quant_conv": False}])
def test_vae_equals_diffusers(settings):
    ours, theirs = build(AutoencoderKL, diffusers.AutoencoderKL, **settings)
    assert ours.downsampling == 8
    image = torch.rand(1, 3, 64, 48) * 2 - 1
    posterior, expected = ours.encode(image), theirs.encode(image).latent_dist
    assert relative_error(posterior.mean, expected.mean) <= 1e-5
    assert relative_error(posterior.logvar, expected.logvar) <= 1e-5
    assert relative_error(posterior.kl(), expected.kl()) <= 1e-5
    noise = torch.randn_like(posterior.mean)
    assert relative_error(posterior.sample(noise), expected.mean + expected.std * noise) <= 1e-5
    assert relative_error(ours.decode(expected.mean), theirs.decode(expected.mean).sample) <= 1e-5


def test_gradients_equal_diffusers():
    ours, _ = build(UNet2DCondition, diffusers.UNet2DConditionModel, **SMALL)
    theirs = diffusers.UNet2DConditionModel(**SMALL)
    theirs.load_state_dict(ours.state_dict())
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([10, 20]), torch.randn(2, 7, 24))
    ours(*inputs).square().mean().backward()
    theirs(*inputs).sample.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, expected[name].grad) <= 1e-4, name


def precomputed_case(dtype, **settings):
    """A model, and for 3 steps and 2 texts everything that its forward takes but the latents."""
    ours, _ = build(UNet2DCondition, diffusers.UNet2DConditionModel, **SMALL, **settings)
    added = None
    if settings.get("addition_embed_type"):
        time_ids = torch.tensor([[16.0, 24, 0, 3, 16, 24]]).expand(2, -1)
        added = {"text_embeds": torch.randn(2, 40).to(dtype), "time_ids": time_ids}
    return ours.to(dtype), torch.tensor([999.0, 500.25, 3.0]), torch.randn(2, 7, 24).to(dtype), added


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("images", [2, 6])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resnet_time_scale_shift": "scale_shift"},
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 40 + 6 * 8,
        },
    ],
    ids=["plain", "scale_shift", "text_time"],
)
@torch.inference_mode()
def test_encoded_text_and_time_give_the_bits_of_the_plain_call(settings, images, dtype):
    """Beside one row of text for each image, for rows that are shared by images, too."""
    ours, timesteps, text, added = precomputed_case(dtype, **settings)
    sample = torch.randn(images, 4, 9, 13).to(dtype)
    context, times = ours.encode_context(text), ours.encode_time(timesteps, added)
    each = images // 2
    per_image = added and {name: rows.repeat_interleave(each, 0) for name, rows in added.items()}
    assert len(times) == 3
    for time, timestep in zip(times, timesteps, strict=True):
        expected = ours(sample, timestep, text.repeat_interleave(each, 0), per_image)
        assert torch.equal(ours(sample, time, context), expected)
        assert torch.equal(ours(sample, timestep, text, added), expected)


@torch.inference_mode()
def test_encoded_time_is_picked_by_a_counter():
    """As by a number, also from a table of which a pytree's tensors were cut."""
    ours, timesteps, _, _ = precomputed_case(torch.float32)
    times = ours.encode_time(timesteps)
    first = pytree.tree_map_only(torch.Tensor, lambda rows: rows[:2], times)
    assert len(first) == 2 and len(list(times)) == 3
    for table, i in ((times, 0), (times, 2), (first, 1)):
        picked, expected = table.at(torch.tensor(i)), times[i]
        assert picked.by_layer.keys() == expected.by_layer.keys()
        for layer, rows in expected.by_layer.items():
            assert torch.equal(picked.by_layer[layer], rows) and picked.by_layer[layer].is_contiguous()
    with pytest.raises(IndexError):
        times[3]


@torch.inference_mode()
def test_encoded_time_of_the_unconditional_unet():
    ours, _ = build(UNet2D, diffusers.UNet2DModel, **DDPM_CIFAR)
    sample = torch.randn(2, 3, 8, 8)
    for time, timestep in zip(ours.encode_time([7, 500]), [7, 500], strict=True):
        assert torch.equal(ours(sample, time), ours(sample, timestep))


@torch.inference_mode()
@pytest.mark.parametrize("timestep", [500, 12.5])
def test_a_timestep_of_the_host_is_copied_by_nobody(timestep):
    """A number is part of a CUDA graph, as a fill; the values are those of the tensor."""
    unet = UNet2DCondition(config_from_dict(UNet2DCondition, SMALL)).eval()
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    with dispatch.use_backend("torch"):
        expected = unet(sample, torch.tensor([timestep] * 2), text)
        with OnTheDevice():
            assert torch.equal(unet(sample, timestep, text), expected)


@torch.inference_mode()
def test_encoded_text_and_time_compile_to_one_graph_for_all_steps():
    ours, timesteps, text, _ = precomputed_case(torch.float32)
    sample, graphs = torch.randn(2, 4, 8, 8), []
    compiled = torch.compile(
        ours, fullgraph=True, dynamic=False, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    context = ours.encode_context(text)
    for time, timestep in zip(ours.encode_time(timesteps), timesteps, strict=True):
        assert torch.equal(compiled(sample, time, context), ours(sample, timestep, text))
    assert len(graphs) == 1
    assert torch.equal(compiled(sample, timesteps[:2], text), ours(sample, timesteps[:2], text))


def test_gradients_reach_what_was_encoded():
    ours, timesteps, text, _ = precomputed_case(torch.float32)
    sample, text = torch.randn(2, 4, 8, 8), text.requires_grad_()
    expected = torch.autograd.grad(ours(sample, timesteps[0], text).square().mean(), text)[0]
    encoded = ours(sample, ours.encode_time(timesteps)[0], ours.encode_context(text))
    assert relative_error(torch.autograd.grad(encoded.square().mean(), text)[0], expected) <= 1e-5


@torch.inference_mode()
def test_encoded_text_and_time_are_refused_where_they_do_not_belong():
    ours, timesteps, text, added = precomputed_case(torch.float32)
    other, *_ = precomputed_case(torch.float32)
    sample, context, time = torch.randn(2, 4, 8, 8), ours.encode_context(text), ours.encode_time(timesteps)[0]
    with pytest.raises(ValueError, match="encoder_hidden_states: was encoded by another UNet2DCondition"):
        other(sample, 3, context)
    with pytest.raises(ValueError, match="timesteps: was encoded by another UNet2DCondition"):
        other(sample, time, text)
    with pytest.raises(ValueError, match="added_cond: is part of"):
        ours(sample, time, context, {})
    for rows in (context, text):
        with pytest.raises(ValueError, match="encoder_hidden_states: got 2 rows for 3 images"):
            ours(torch.randn(3, 4, 8, 8), time, rows)
    ours.to(torch.bfloat16)
    with pytest.raises(ValueError, match="was encoded in torch.float32, but sample is torch.bfloat16"):
        ours(sample.bfloat16(), 3, context)


def test_config_survives_a_round_trip_and_names_what_it_cannot_do():
    with torch.device("meta"):
        model = UNet2DCondition(config_from_dict(UNet2DCondition, SDXL_CUT))
        again = diffusers.UNet2DConditionModel.from_config(config_to_dict(model))
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    with pytest.raises(ValueError, match="act_fn.*class_embed_type"):
        config_from_dict(UNet2DCondition, SD15 | {"act_fn": "mish", "class_embed_type": "timestep"})
    with pytest.raises(ValueError, match="block types.*KDownBlock2D"):
        UNet2DCondition(config_from_dict(UNet2DCondition, SD15 | {"down_block_types": ["KDownBlock2D"] * 4}))
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="added_cond"),
    ):
        UNet2DCondition(config_from_dict(UNet2DCondition, SDXL_CUT))(
            torch.zeros(1, 4, 8, 8), 3, torch.zeros(1, 77, 2048)
        )
