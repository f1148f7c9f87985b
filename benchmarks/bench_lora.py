"""Does a LoRA learn, and does it leave no trace?

The shipped model of handwritten digits never saw mirror writing. A LoRA of its U-Net is trained on mirrored
digits, saved, and loaded into the shipped model again; twenty pictures of each digit are drawn with and
without it. A support vector machine that learned from real digits only reads them as they are and mirrored
back. Unloaded, the model has to draw its old pictures bit for bit.

    python benchmarks/bench_lora.py [--steps 400] [--rank 16] [--per-digit 20] [--no-record]
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
import time
from typing import Any

import torch
from _record import results_path, write_json
from torch import Tensor
from tqdm import tqdm

from sdfast.diffusion import NoiseSchedule, simple_loss
from sdfast.lora import add_lora, save_lora
from sdfast.pipelines import StableDiffusion
from sdfast.training.captions import WORDS
from sdfast.training.data import Reader, load_digits, shrink, training_set
from sdfast.training.vae import encode

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1", "conv2", "conv")
PROMPTS = [f"a handwritten {word}" for word in WORDS]
BATCH = 64
LEARNING_RATE = 2e-3
CAPTION_DROPOUT = 0.1  # as the model was trained, for guidance


def train(pipe: StableDiffusion, rank: int, steps: int, path: pathlib.Path) -> dict[str, Any]:
    """Train a LoRA of the U-Net on mirrored digits and write its file."""
    pictures, labels = training_set(load_digits()[0], copies=3, seed=0)
    encoder, tokenizer = pipe.text_encoders[0], pipe.tokenizers[0]
    with torch.no_grad():
        texts = encoder(
            tokenizer([*PROMPTS, ""], max_length=77)
        ).last_hidden_state  # (11, L, C), the last is ""
        latents = encode(pipe.vae, pictures.flip(-1)).mean * pipe.vae.config.scaling_factor
    schedule = NoiseSchedule.from_config(pipe.scheduler_config)
    torch.manual_seed(0)
    factors = add_lora(pipe.unet, rank, targets=TARGETS)
    optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    began = time.perf_counter()
    for _ in tqdm(range(steps), unit="step", disable=None):
        rows = torch.randint(len(labels), (BATCH,))
        text = torch.where(torch.rand(BATCH) < CAPTION_DROPOUT, len(PROMPTS), labels[rows])
        t = torch.randint(schedule.T, (BATCH,))
        x_t, target = schedule.training_pair(latents[rows], t, torch.randn(latents[rows].shape))
        loss = simple_loss(pipe.unet(x_t, t, texts[text]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - began
    save_lora(path, {"unet": pipe.unet})
    tenth = max(1, steps // 10)
    return {
        "steps": steps,
        "rank": rank,
        "trained_parameters": sum(factor.numel() for factor in factors),
        "unet_parameters": sum(p.numel() for p in pipe.unet.parameters() if not p.requires_grad),
        "file_bytes": path.stat().st_size,
        "loss_of_the_first_tenth": sum(losses[:tenth]) / tenth,
        "loss_of_the_last_tenth": sum(losses[-tenth:]) / tenth,
        "seconds": round(seconds, 1),
    }


def draw(pipe: StableDiffusion, per_digit: int) -> Tensor:
    """(10 * per_digit, 3, 32, 32) in [-1, 1]."""
    result = pipe.text_to_image(PROMPTS, num_images=per_digit, steps=20, seed=0, output="tensor")
    assert isinstance(result.images, Tensor)
    return result.images * 2 - 1


def main() -> int:
    """Print a table, write results/<device>/lora.json; 1 if the LoRA did not learn, or left a trace."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="of training (%(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="%(default)s")
    parser.add_argument("--per-digit", type=int, default=20, help="pictures of each digit (%(default)s)")
    parser.add_argument("--no-record", action="store_true", help="write no file")
    arguments = parser.parse_args()

    reader = Reader(load_digits()[0])
    asked = torch.arange(10).repeat_interleave(arguments.per_digit)
    rows = []

    def measure(model: str, pictures: Tensor) -> None:
        read = {"as drawn": pictures, "mirrored back": pictures.flip(-1)}
        row: dict[str, Any] = {"model": model, "images": len(asked)}
        row |= {name: (reader.read(shrink(p)) == asked).double().mean().item() for name, p in read.items()}
        rows.append(row)
        print(f"{model}: {row['as drawn']:.1%} read as asked, mirrored back {row['mirrored back']:.1%}")

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "mirrored.safetensors"
        training = train(StableDiffusion.digits(), arguments.rank, arguments.steps, path)
        print(training)
        pipe = StableDiffusion.digits()
        before = draw(pipe, arguments.per_digit)
        measure("as shipped", before)
        pipe.load_lora(path)
        measure("with the LoRA", draw(pipe, arguments.per_digit))
        pipe.unload_lora()
        bit_for_bit = torch.equal(draw(pipe, arguments.per_digit), before)
    print(f"unloaded: the old pictures bit for bit: {bit_for_bit}")
    if not arguments.no_record:
        path = results_path("lora")
        write_json(path, rows, training=training, unloaded_bit_for_bit=bit_for_bit)
        print(path)
    return 0 if bit_for_bit and rows[1]["mirrored back"] > rows[1]["as drawn"] else 1


if __name__ == "__main__":
    sys.exit(main())
