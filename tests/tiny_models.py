"""Small models of diffusers and transformers with random weights, for the tests of checkpoints.

Neither is imported for the configurations alone, which tests of our models on a GPU use too.
"""

import torch

from sdfast.models.ldm_keys import current_name

UNET = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 32,
    "layers_per_block": 1,
}
DDPM = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
}
VAE = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
CLIP = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 16,
    "bos_token_id": 97,
    "eos_token_id": 98,
}


def make_unet():
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**UNET)


def make_clip(their_class=None):
    import transformers

    torch.manual_seed(0)
    return (their_class or transformers.CLIPTextModel)(transformers.CLIPTextConfig(**CLIP))


def assert_same_tensors(ours, theirs):
    state = {current_name(name): tensor for name, tensor in theirs.state_dict().items()}
    assert state.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
