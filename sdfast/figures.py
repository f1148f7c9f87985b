"""Figures by matplotlib, which is loaded when the first is drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from sdfast.images import save_png

_DOTS_PER_INCH = 150


def check_matplotlib() -> None:
    """
    Raises:
        ImportError: matplotlib is not installed; the text says how to get it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("figures are drawn by matplotlib: pip install sdfast[plot]") from error


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches that needs no display.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a PNG: whole, or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    with Image.open(buffer) as image:
        save_png(image.convert("RGB"), path)
