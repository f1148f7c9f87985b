"""The generator in Triton gives the definition's words and uniforms, bit for bit."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from test_diffusion_step_seeds import SEEDS, WORD  # noqa: E402

from sdfast.ops._philox import philox4x32, philox_uniforms  # noqa: E402
from sdfast.ops._philox_triton import _uniform, words  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = 64


@triton.jit
def _draw_kernel(seed_ptr, block_ptr, step_ptr, words_ptr, uniforms_ptr, BLOCKS: tl.constexpr):
    at = tl.arange(0, BLOCKS)
    r0, r1, r2, r3 = words(tl.load(seed_ptr), tl.load(block_ptr + at), tl.load(step_ptr))
    for_word = 4 * at
    tl.store(words_ptr + for_word, r0.to(tl.int64))
    tl.store(words_ptr + for_word + 1, r1.to(tl.int64))
    tl.store(words_ptr + for_word + 2, r2.to(tl.int64))
    tl.store(words_ptr + for_word + 3, r3.to(tl.int64))
    tl.store(uniforms_ptr + for_word, _uniform(r0))
    tl.store(uniforms_ptr + for_word + 1, _uniform(r1))
    tl.store(uniforms_ptr + for_word + 2, _uniform(r2))
    tl.store(uniforms_ptr + for_word + 3, _uniform(r3))


def draw(seed, first, step):
    """Words and uniforms of 64 blocks of elements, (64, 4) each."""
    block = torch.arange(first, first + BLOCKS, device=DEVICE)
    drawn = torch.empty(BLOCKS, 4, dtype=torch.int64, device=DEVICE)
    uniforms = torch.empty(BLOCKS, 4, device=DEVICE)
    seed, step = torch.tensor([seed], device=DEVICE), torch.tensor([step], device=DEVICE)
    _draw_kernel[(1,)](seed, block, step, drawn, uniforms, BLOCKS)
    return drawn.cpu(), uniforms.cpu()


@pytest.mark.parametrize("step", [0, 1, 2**31, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("seed", SEEDS.tolist())
def test_words_and_uniforms(seed, step):
    for first in (0, 2**31 - 32, 2**32 - 32, 2**40):  # where halves of the counter end and signs would turn
        block = torch.arange(first, first + BLOCKS)
        counter = [block & WORD, block >> 32, *(torch.tensor(w) for w in (step & WORD, step >> 32))]
        key = [torch.tensor(w) for w in (seed & WORD, (seed >> 32) & WORD)]
        exact = torch.stack(philox4x32(counter, key), 1)
        drawn, uniforms = draw(seed, first, step)
        assert torch.equal(drawn, exact)
        assert torch.equal(uniforms, exact.float() * 2**-32 + 2**-33)
        if first == 0:
            assert torch.equal(uniforms, philox_uniforms(torch.tensor([seed]), 4 * BLOCKS, step)[0])


def test_uniforms_at_their_ends():
    """The smallest word, the largest, and those about which the conversion to fp32 rounds."""
    ends = torch.tensor(
        [0, 1, WORD, WORD - 127, WORD - 128, WORD - 129, 2**31, 2**31 - 1, 2**24 + 1, 2**25 + 3]
    )
    ends = torch.cat([ends, ends.new_zeros(6)]).to(DEVICE)
    uniforms = torch.empty(16, device=DEVICE)
    _uniform_kernel[(1,)](ends, uniforms, 16)
    assert torch.equal(uniforms.cpu(), ends.cpu().float() * 2**-32 + 2**-33)
    assert uniforms[0] == 2**-33 and uniforms[2] == 1


@triton.jit
def _uniform_kernel(word_ptr, uniform_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(uniform_ptr + at, _uniform(tl.load(word_ptr + at).to(tl.uint32)))


@pytest.mark.parametrize("step", [0, 7, 2**32 + 5, 2**63 - 1])
def test_a_step_on_the_device_is_the_same_step(step):
    """What a counter holds draws what the number draws."""
    assert torch.equal(philox_uniforms(SEEDS, 50, torch.tensor(step)), philox_uniforms(SEEDS, 50, step))
