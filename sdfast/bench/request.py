"""What can be asked of `sdfast bench`, checked before torch is imported."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable
from pathlib import Path

PARTS = ("ops", "models", "images", "training")
OPS = (
    "conv2d", "linear", "attention", "group_norm", "layer_norm", "diffusion_step", "add_noise",
    "reparameterize",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
# Engines to compare with: the packages that each needs beside torch, and the parts it takes part in.
ENGINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "eager": ((), PARTS),
    "eager-contiguous": (("diffusers",), ("models", "training")),
    "compile": ((), ("ops", "models")),
    "compile-autotune": (("diffusers",), ("models",)),
    "openvino": (("diffusers", "openvino"), ("models",)),
    "onnxruntime": (("diffusers", "onnxruntime", "onnx", "onnxscript"), ("models",)),
    "diffusers-tiling": (("diffusers",), ("models",)),
    "sdfast-low": (("diffusers",), ("models",)),
    "sdfast-optimize": (("diffusers",), ("models",)),
}
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        parts: of PARTS.
        device: "cpu" or "cuda", with an index or without.
        dtypes: of DTYPES.
        against: of ENGINES, beside "eager", which always runs.
        quick: a few cases and small models, within two minutes on two cores.
        output: the folder of bench.json, bench.md and bench.html.
        only: of OPS.
        seconds: of timing for each case of `ops`; None takes 3, or 0.3 with `quick`.
        rounds: of the other parts' calls; None takes 5, or 3 with `quick`.
        threads: of torch and the engines; None leaves torch's choice.
        backend: whose kernels ours are; None takes what `sdfast.dispatch` takes.
        resume: keep the rows of `output` that did not fail.
    """

    parts: tuple[str, ...] = PARTS
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32",)
    against: tuple[str, ...] = ("eager",)
    quick: bool = False
    output: Path = Path("sdfast-bench")
    only: tuple[str, ...] = OPS
    seconds: float | None = None
    rounds: int | None = None
    threads: int | None = None
    backend: str | None = None
    resume: bool = False

    @property
    def case_seconds(self) -> float:
        return (0.3 if self.quick else 3.0) if self.seconds is None else self.seconds

    @property
    def call_rounds(self) -> int:
        return (3 if self.quick else 5) if self.rounds is None else self.rounds

    def engines(self, part: str) -> list[str]:
        """Those that take part beside ours, eager first."""
        asked = dict.fromkeys(("eager", *self.against))
        return [engine for engine in asked if part in ENGINES[engine][1]]


def names(option: str, text: str | Iterable[str], allowed: Iterable[str]) -> tuple[str, ...]:
    """Names from "a,b", each of them allowed, none twice.

    Raises:
        ValueError: one is not allowed, or there is none; says what is.
    """
    parts = text.split(",") if isinstance(text, str) else list(text)
    found = tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    allowed = list(allowed)
    unknown = [name for name in found if name not in allowed]
    if unknown or not found:
        got = ", ".join(map(repr, unknown)) if unknown else "nothing"
        raise ValueError(f"{option}: got {got}, expected one of {', '.join(allowed)}")
    return found


def missing(packages: Iterable[str]) -> str | None:
    """The command that installs those of these packages that are absent, or None."""
    absent = [_DISTRIBUTIONS.get(name, name) for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed; pip install {' '.join(absent)}" if absent else None
