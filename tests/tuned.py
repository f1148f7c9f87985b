"""What the tests of tuning measure: a model that is convolutions alone, and the name of this machine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sdfast import ops, tuning


def convolutions(*sizes: int) -> Callable[[], None]:
    """A model of one 3x3 convolution over images of each size."""
    weight = torch.randn(32, 32, 3, 3)

    def model() -> None:
        for size in sizes:
            ops.conv2d(torch.randn(1, 32, size, size), weight, padding=1)

    return model


def machine() -> str:
    """What the file of times calls this machine and its threads."""
    return tuning._machine(torch.get_num_threads())
