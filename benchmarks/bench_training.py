"""Stable Diffusion 1.5, forward and backward of the U-Net, beside diffusers in eager torch.

    python benchmarks/bench_training.py [--rounds 3]

Real size, random weights, fp32, batch 2, 32x32 latent (256x256 images), 77 text tokens, the squared error of
a predicted noise; no optimiser. Before anything is timed, the gradient of every 23rd parameter is checked
against eager's: at most 1e-4 relative. Eager runs in both memory formats, and the ratio is against the
faster; all take turns in one process, which keeps freed memory (`sdfast.memory.keep_freed_memory`): all are
faster so. sdfast packs no weights to train, so nothing that one step computes serves the next.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import diffusers
import torch
from _record import results_path, table, write_json
from torch import Tensor, nn

from sdfast.memory import keep_freed_memory
from sdfast.models import UNet2DCondition
from sdfast.models.config import config_from_dict
from sdfast.testing import relative_error, spread, time_alternating

LARGEST_ERROR = 1e-4
CHECKED = slice(None, None, 23)  # of the parameters
Step = Callable[[], None]


def share_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    """Let `ours` hold the very parameters of `theirs`: memory for one copy of weights and gradients."""
    for name, parameter in theirs.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(module), leaf, parameter)


def training_steps() -> dict[str, Step]:
    """A forward and backward of each side, after the check of the gradients."""
    contiguous = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    channels_last = copy.deepcopy(contiguous).to(memory_format=torch.channels_last)
    with torch.device("meta"):
        ours = UNet2DCondition(config_from_dict(UNet2DCondition, dict(contiguous.config)))
    share_parameters(ours, channels_last)
    sample, text, noise = torch.randn(2, 4, 32, 32), torch.randn(2, 77, 768), torch.randn(2, 4, 32, 32)

    def step(model: nn.Module) -> Step:
        last = model is not contiguous
        x = sample.to(memory_format=torch.channels_last) if last else sample

        def run() -> None:
            for side in (contiguous, channels_last):  # one set of gradients in memory
                side.zero_grad(set_to_none=True)
            y = model(x, 500, text)
            torch.nn.functional.mse_loss(y if model is ours else y.sample, noise).backward()

        return run

    steps = {
        "eager": step(contiguous),
        "eager channels_last": step(channels_last),
        "sdfast": step(ours),
    }
    check_gradients(steps["eager channels_last"], steps["sdfast"], channels_last)
    return steps


def check_gradients(eager: Step, ours: Step, model: nn.Module) -> None:
    """Raise AssertionError unless both steps give the same gradients."""
    checked = dict(list(model.named_parameters())[CHECKED])

    def gradients(step: Step) -> dict[str, Tensor]:
        step()
        return {name: p.grad.clone() for name, p in checked.items() if p.grad is not None}

    expected, actual = gradients(eager), gradients(ours)
    errors = {name: relative_error(actual[name], expected[name]) for name in checked}
    name = max(errors, key=lambda name: errors[name])
    print(
        f"gradients of {len(errors)} parameters: at most {errors[name]:.1e} from eager's ({name})", flush=True
    )
    if not errors[name] <= LARGEST_ERROR:
        raise AssertionError(f"gradient of {name}: error {errors[name]:.1e} exceeds {LARGEST_ERROR:.0e}")


def measure(rounds: int) -> dict[str, object]:
    """Median milliseconds of each, and the median ratio of neighbours in time."""
    torch.manual_seed(0)
    samples = time_alternating(training_steps(), rounds=rounds, warmup=1)
    eager = min(("eager", "eager channels_last"), key=lambda name: spread(samples[name])[1])
    ratios = [e / s for e, s in zip(samples[eager], samples["sdfast"], strict=True)]
    return {
        "work": "SD 1.5 U-Net, forward and backward",
        "dtype": "float32",
        "rounds": rounds,
        "eager_layout": "channels_last" if "last" in eager else "contiguous",
        **{f"{name.replace(' ', '_')}_ms": 1e3 * spread(times)[1] for name, times in samples.items()},
        "best_eager_ms": 1e3 * spread(samples[eager])[1],
        "ratio": spread(ratios)[1],
        "ratio_p20": spread(ratios)[0],
        "ratio_p80": spread(ratios)[2],
    }


def main() -> None:
    """Print a table, write results/<device>/training.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each side (%(default)s)")
    options = parser.parse_args()
    keep_freed_memory()
    rows = [measure(options.rounds)]
    columns = {"work": "", "dtype": "", "best_eager_ms": ".0f", "sdfast_ms": ".0f", "ratio": ".2f"}
    print(table(rows, columns))
    write_json(results_path("training"), rows)


if __name__ == "__main__":
    main()
