"""diffusion_step in Triton: against fp64, its noise, its layouts."""

import pytest
import torch
from elementwise import arranged, check_results
from test_diffusion_step import native_calls
from test_diffusion_step_seeds import SEEDS, X_IS_Z
from test_diffusion_step_seeds import native_calls as seeded_calls

from sdfast.ops import diffusion_step
from sdfast.ops._philox import philox_normals

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_fp64(dtype):
    for shape in ((2, 4, 9, 7), (1, 17, 1, 1), (3, 5, 33)):
        for call, make in native_calls():
            check_results(call, [t.to(DEVICE) for t in make(shape, dtype)], "triton")


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 4), (2,), (1, 1, 1, 1), (2, 4, 40, 40)])
def test_shapes(shape):
    for call, make in list(seeded_calls())[2:3]:
        check_results(call, [t.to(DEVICE) for t in make(shape, torch.float16)], "triton")


def test_layouts_give_the_same_bits():
    for call, make in list(native_calls())[-1:]:
        tensors = [t.to(DEVICE) for t in make((2, 4, 9, 7), torch.float32)]
        expected = call(tensors, "triton")
        for arrangement in ("channels_last", "channel_slice", "strided", "transposed", "misaligned"):
            for mixed in (slice(None), slice(1), slice(1, None)):
                given = list(tensors)
                given[mixed] = [arranged(t, arrangement) for t in tensors[mixed]]
                for a, b in zip(call(given, "triton"), expected, strict=True):
                    assert torch.equal(a, b)


def draw(seeds, x, step):
    return diffusion_step(x, x, X_IS_Z, seeds=seeds, step=step, backend="triton")[0]


@pytest.mark.parametrize("step", [0, 3, 2**33 + 1, 2**63 - 1])
def test_noise_is_within_two_units_in_the_last_place(step):
    x = torch.zeros(len(SEEDS), 2501, device=DEVICE)
    exact = philox_normals(SEEDS, x.shape, step)
    unit = torch.exp2(exact.abs().clamp_min(1e-30).log2().floor() - 23)
    error = (draw(SEEDS, x, step).cpu() - exact).abs()
    assert (error <= 2 * unit + 1e-15).all()  # where fp64's pi leaves a remainder of zero


def test_noise_does_not_depend_on_layout_or_batch():
    x = torch.zeros(len(SEEDS), 3, 5, 7, device=DEVICE)
    z = draw(SEEDS, x, 4)
    for order in ((0, 2, 3, 1), (0, 3, 1, 2), (0, 2, 1, 3), (0, 3, 2, 1)):
        back = [order.index(axis) for axis in range(4)]
        permuted = x.permute(order).contiguous().permute(back)
        result = draw(SEEDS, permuted, 4)
        assert torch.equal(result, z)
        assert result.stride() == permuted.stride()
    assert torch.equal(draw(SEEDS[2:3], x[:1], 4), z[2:3])
    five = torch.zeros(2, 2, 3, 4, 5, device=DEVICE)
    disordered = five.permute(0, 4, 2, 3, 1).contiguous().permute(0, 4, 2, 3, 1)
    assert torch.equal(draw(SEEDS[:2], disordered, 1), draw(SEEDS[:2], five, 1))


def test_repeats_bit_for_bit():
    for call, make in list(seeded_calls())[-1:]:
        tensors = [t.to(DEVICE) for t in make((2, 4, 9, 7), torch.float32)]
        for a, b in zip(call(tensors, "triton"), call(tensors, "triton"), strict=True):
            assert torch.equal(a, b)


def test_opcheck():
    x, m, k = torch.randn(2, 3, 4, 5, device=DEVICE), torch.randn(4, 3, 4, 5, device=DEVICE), X_IS_Z
    op = torch.ops.sdfast.diffusion_step_triton.default
    torch.library.opcheck(op, (x, m, k), {"guidance_scale": 2.0, "noise": x, "clip": 1.0})
    torch.library.opcheck(
        op, (x.to(memory_format=torch.channels_last), x, k), {"seeds": SEEDS[:2], "step": 3}
    )
