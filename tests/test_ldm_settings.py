"""What the settings of `train_ldm` refuse, before any work."""

from __future__ import annotations

import math

import pytest
import torch

from sdfast.training.distributed import ALONE, Parallel
from sdfast.training.ldm import LDMTraining, Running, train_ldm


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"phase": "vae", "prediction": "v_prediction"}, "prediction: got 'v_prediction' with the VAE"),
        ({"lora_rank": 2, "prediction": "v_prediction"}, "prediction: got 'v_prediction' with a LoRA"),
        ({"phase": "text"}, "phase: got 'text', expected unet or vae"),
        ({"prediction": "noise"}, "prediction: got 'noise', expected epsilon or v_prediction"),
        ({"precision": "fp16"}, "precision: got 'fp16', expected fp32 or bf16 or autocast"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"resolution": -8}, "resolution: got -8"),
        ({"lora_rank": 0}, "lora_rank: got 0"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma: got 0.0"),
        ({"caption_dropout": 1.5}, "caption_dropout: got 1.5"),
        ({"kl_weight": math.nan}, "kl_weight: got nan"),
    ],
)
def test_training_refuses_what_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        LDMTraining(**settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"parallel": "DDP"}, "parallel: got 'DDP', expected ddp or fsdp"),
        ({"micro_batch": -1}, "micro_batch: got -1"),
        ({"checkpoint_steps": 0}, "checkpoint_steps: got 0"),
        ({"sample_steps": 0}, "sample_steps: got 0"),
        ({"checkpoint_seconds": 0.0}, "checkpoint_seconds: got 0.0"),
    ],
)
def test_running_refuses_what_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        Running(**settings)


def test_train_ldm_refuses_a_seed_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="seed: got -1, expected 0 to"):
        train_ldm(tmp_path, tmp_path / "out", model=tmp_path, run_dir=tmp_path / "run", seed=-1)


def test_precision_and_kind_of_parallel_are_checked():
    with pytest.raises(ValueError, match="kind: got 'DDP', expected one of None, ddp, fsdp"):
        Parallel(torch.nn.Linear(1, 1), "DDP", "fp32", ALONE)
    with pytest.raises(ValueError, match="precision: got 'fp16', expected one of fp32, bf16, autocast"):
        Parallel(torch.nn.Linear(1, 1), None, "fp16", ALONE)
