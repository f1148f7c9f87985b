"""The text encoder against transformers on the same random weights, at the real configurations."""

import dataclasses

import pytest
import torch
import transformers

from sdfast.models import CLIPTextConfig, CLIPTextEncoder
from sdfast.models.config import config_from_dict, config_to_dict
from sdfast.models.ldm_keys import current_name

pytestmark = pytest.mark.usefixtures("exact_numerics")  # what is wired wrongly would hide in less

VIT_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
SD2_VIT_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
SDXL_BIG_G_CUT = {  # 4 layers of 32
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 4,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 16,
    "bos_token_id": 97,
    "eos_token_id": 98,
}


def build(settings, *, with_projection=False):
    """transformers' model with random weights, and ours with the same ones."""
    torch.manual_seed(0)
    their_class = transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel
    theirs = their_class(transformers.CLIPTextConfig(**settings)).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.2)
    values = {**theirs.config.to_dict(), "architectures": [their_class.__name__]}
    with torch.device("meta"):
        ours = CLIPTextEncoder(config_from_dict(CLIPTextEncoder, values)).eval()
    state = {current_name(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    return ours, theirs


def tokens(config, batch=2):
    """Sentences of different lengths, closed by the end-of-text token and padded with it."""
    end = config.vocab_size - 1
    ids = torch.randint(0, end - 1, (batch, config.max_position_embeddings))
    for row, length in enumerate(range(5, 5 + 7 * batch, 7)):
        ids[row, length:] = end
    return ids


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("settings", "with_projection"),
    [(VIT_L, False), (SD2_VIT_H, False), (SDXL_BIG_G_CUT, True)],
    ids=["sd1", "sd2", "sdxl"],
)
def test_equals_transformers(settings, with_projection):
    ours, theirs = build(settings, with_projection=with_projection)
    ids = tokens(ours.config)
    with torch.inference_mode():
        got = ours(ids)
        expected = theirs(ids, output_hidden_states=True)
    assert relative_error(got.last_hidden_state, expected.last_hidden_state) <= 1e-5
    pooled = expected.text_embeds if with_projection else expected.pooler_output
    assert relative_error(got.pooled, pooled) <= 1e-5
    assert len(got.hidden_states) == settings["num_hidden_layers"] + 1
    for state, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(state, other) <= 1e-5


@pytest.mark.parametrize("eos_token_id", [98, 2])
def test_pools_at_the_end_of_text(eos_token_id):
    """2 is what early configurations say: there the end is where the largest token stands."""
    ours, theirs = build({**TINY, "eos_token_id": eos_token_id})
    ids = tokens(ours.config, batch=3)
    ids[1, 3] = 2  # must not be taken for the end
    got, expected = ours(ids), theirs(ids)
    assert relative_error(got.pooled, expected.pooler_output) <= 1e-6
    torch.testing.assert_close(got.pooled[2], got.last_hidden_state[2, 19])


def test_clip_skip_normalises_an_earlier_state():
    ours, theirs = build(TINY)
    ids = tokens(ours.config)
    got = ours(ids, clip_skip=1)
    expected = theirs(ids, output_hidden_states=True)
    state = theirs.final_layer_norm(expected.hidden_states[-2])
    assert relative_error(got.last_hidden_state, state) <= 1e-6
    assert relative_error(got.pooled, expected.pooler_output) <= 1e-6


def test_is_causal():
    ours, _ = build(TINY)
    ids = tokens(ours.config)
    changed = ids.clone()
    changed[:, 10] = 5
    difference = (ours(ids).last_hidden_state - ours(changed).last_hidden_state).abs().amax(-1)
    assert difference[:, :10].max() == 0
    assert difference[:, 10:].min() > 0


def test_shorter_sequences_and_int32():
    ours, theirs = build(TINY)
    ids = tokens(ours.config)[:, :20]
    expected = theirs(ids).last_hidden_state
    assert relative_error(ours(ids.int()).last_hidden_state, expected) <= 1e-6


def test_trains():
    ours, theirs = build(TINY, with_projection=True)
    ids = tokens(ours.config)
    ours(ids).pooled.square().sum().backward()
    theirs(ids).text_embeds.square().sum().backward()
    gradients = {current_name(name): parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) <= 1e-5 or gradients[name].norm() < 1e-5, name


@pytest.mark.parametrize(
    ("ids", "clip_skip", "error"),
    [
        (torch.zeros(2, 78, dtype=torch.int64), 0, ValueError),
        (torch.zeros(2, 0, dtype=torch.int64), 0, ValueError),
        (torch.zeros(77, dtype=torch.int64), 0, ValueError),
        (torch.zeros(2, 77), 0, TypeError),
        (torch.zeros(2, 77, dtype=torch.int64), 4, ValueError),
        (torch.zeros(2, 77, dtype=torch.int64), -1, ValueError),
    ],
)
def test_refuses_wrong_arguments(ids, clip_skip, error):
    ours, _ = build(TINY)
    with pytest.raises(error, match="input_ids|clip_skip"):
        ours(ids, clip_skip=clip_skip)


def test_config_round_trip_and_refusals():
    early = {  # text_encoder/config.json of Stable Diffusion 1.4
        "_name_or_path": "openai/clip-vit-large-patch14",
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0",
        "vocab_size": 49408,
    }
    config = config_from_dict(CLIPTextEncoder, early)
    assert (config.eos_token_id, config.hidden_size, config.with_projection) == (2, 768, False)
    with torch.device("meta"):
        written = config_to_dict(CLIPTextEncoder(config))
    assert config_from_dict(CLIPTextEncoder, written) == config
    with pytest.raises(ValueError, match="model_type='t5'.*rope_theta=1.0"):
        config_from_dict(CLIPTextEncoder, {"model_type": "t5", "rope_theta": 1.0})
    with pytest.raises(ValueError, match="hidden_act"):
        dataclasses.replace(config, hidden_act="relu")
    with pytest.raises(ValueError, match="num_attention_heads"):
        CLIPTextConfig(hidden_size=10, num_attention_heads=3)
