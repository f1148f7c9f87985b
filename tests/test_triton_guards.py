"""Kernels that touch memory beside their tensors are found out in the interpreter."""

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton_guards import guarded  # noqa: E402

from sdfast.ops._triton import INTERPRETED, Config, launch  # noqa: E402

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="kernels are compiled here; compute-sanitizer watches them"
)


@triton.jit
def _copy_kernel(x, y, first, load_size, store_size, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < load_size, other=0.0), mask=at < store_size)


@triton.jit
def _unmasked_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 0.0)


def copy(x, y, first=0, load_size=6, store_size=6):
    launch(_copy_kernel, (1,), x, y, first, load_size, store_size, config=Config({"BLOCK": 16}))


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def inside(request):
    """Six numbers in the midst of more, which a stray write would meet without harm."""
    return torch.ones(64, dtype=request.param)[30:36]


def test_what_stays_inside_passes(inside):
    y = torch.zeros_like(inside)
    copy(inside, y)
    assert torch.equal(y, inside)
    copy(inside, y, load_size=0, store_size=0)  # no lane is active


@pytest.mark.parametrize(
    ("what", "sizes"),
    [
        ("stores 1 of 7 elements", {"store_size": 7}),
        ("stores 10 of 16 elements", {"store_size": 99}),
        ("loads 1 of 7 elements", {"load_size": 7}),
        ("loads 2 of 8 elements", {"first": -2}),
    ],
)
def test_what_goes_beside_is_found(inside, what, sizes):
    y = torch.zeros(64, dtype=inside.dtype)[30:36]
    with pytest.raises(Exception, match=f"_copy_kernel {what} outside its tensors"):
        copy(inside, y, **sizes)


def test_a_store_without_mask(inside):
    with pytest.raises(Exception, match="_unmasked_kernel stores 10 of 16"):
        launch(_unmasked_kernel, (1,), inside, config=Config({"BLOCK": 16}))


def test_gaps_between_views_of_one_storage():
    """What is between two tensors belongs to neither."""
    memory = torch.zeros(64)
    with pytest.raises(Exception, match="stores 1 of 7"):
        copy(memory[:6], memory[7:13], store_size=7, load_size=0)
    copy(memory[:6], memory[7:13])
    with guarded():  # within another
        copy(memory[:6], memory[7:13])
