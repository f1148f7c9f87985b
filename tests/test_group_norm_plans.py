"""How group_norm's Triton kernels cut an image: spans of channels, chunks of pixels, one launch or two."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_group_norm import make_case, terms
from test_group_norm_triton import DEVICE, on_device

from sdfast.ops import _triton, group_norm
from sdfast.ops._group_norm_plan import Shape, blocks_of_tiles, chunks_of_tiles, tiling, whole_tiling
from sdfast.ops._launch_table import exploring, preferring
from sdfast.testing import assert_within_budget

pytestmark = [
    pytest.mark.skipif(
        _triton.why_not("x", DEVICE) is not None, reason=str(_triton.why_not("x", DEVICE))
    ),
]  # fmt: skip


def test_plans_cover_the_channels() -> None:
    """Spans are whole groups, or parts of one, whose runs start at multiples of a vector where that can be."""
    layouts = ((2, True, 64), (2, True, 4096), (4, True, 4096), (2, False, 900))
    widths = (1, 3, 4, 8, 10, 16, 20, 30, 37, 40, 60, 80, 257, 600)
    for width, groups, (element_bytes, last, pixels) in itertools.product(widths, (1, 2, 32), layouts):
        shape = Shape(2, pixels, groups, width, element_bytes, last)
        for plan, vector in ((tiling(shape), 16), (whole_tiling(shape), 8)):
            if plan is None:
                continue
            span, constants = plan.config.constants["SPAN"], plan.config.constants
            assert span <= constants["BLOCK_C"]
            if plan.parts == 1:
                assert span % width == 0 and span // width <= constants["GROUPS"]
                assert plan.spans * span >= groups * width > (plan.spans - 1) * span
            else:
                assert plan.spans == groups * plan.parts and plan.parts * span >= width
            if last and groups == 32 and width in (10, 20, 40, 60, 80):
                assert span * element_bytes % vector == 0


@pytest.mark.parametrize(
    ("images", "channels", "side"),
    [(1, 320, 64), (2, 320, 64), (2, 320, 128), (2, 640, 32), (2, 640, 64), (2, 1920, 32), (1, 128, 256)],
)
def test_partial_statistics_are_few_beside_pixels(images: int, channels: int, side: int) -> None:
    """A program that applies reads, of 12 bytes for a chunk and group, at most half of what it has of pixels,
    and there is one for most multiprocessors."""
    shape = Shape(images, side * side, 32, channels // 32, 2, True)
    x = torch.empty((images, channels, side, side), dtype=torch.float16, device=DEVICE)
    with _triton.recording() as launches:
        group_norm(x.to(memory_format=torch.channels_last), 32, backend="triton")
    partials, apply = launches
    chunks = apply.arguments[9].shape[2]
    constants = apply.keywords
    groups, pixels = constants["SPAN"] // shape.group_channels, apply.arguments[-1] * constants["BLOCK_P"]
    assert 2 * 12 * chunks * groups <= pixels * constants["SPAN"] * shape.element_bytes
    assert min(partials.grid[0], apply.grid[0]) >= 100


def test_one_launch_or_two_is_a_choice() -> None:
    """Where a program holds its groups a table may say two, with the same result; elsewhere there is none."""
    case = make_case((2, 40, 8, 8), 4, torch.float16, "last")
    given, exact = on_device(case), case.converted(torch.float64).run("torch")
    with exploring() as met:
        given.run("triton")
        group_norm(torch.zeros(2, 40, 64, 64, device=DEVICE), 4, backend="triton")
    ((key, names),) = met.items()
    assert [name.split()[-1] for name in names] == ["whole", "apart"]
    for count, name in enumerate(names, 1):
        with preferring(key, name):
            y = given.run("triton")
            with _triton.recording() as launches:
                given.run("triton")
        assert len(launches) == count
        sizes = terms(case, torch.zeros_like(case.x))
        assert_within_budget(y.cpu(), case.run("torch"), exact, magnitude=sizes["y"])


def test_large_images_keep_short_chunks() -> None:
    """Four programs a multiprocessor where a chunk is long all the same."""
    shape = Shape(1, 512 * 512, 32, 4, 2, True)
    device = torch.device(DEVICE)
    plan = tiling(shape)
    assert chunks_of_tiles(shape, plan, device) == blocks_of_tiles(shape, plan, 4, device)
