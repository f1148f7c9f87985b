"""diffusion_step_from_table in Triton: the bits of diffusion_step in Triton, whatever the counter and the layout."""

import itertools

import pytest
import torch
from elementwise import arranged
from test_diffusion_step_from_table import SEEDS, STEPS, check_step, tables, tensors

from sdfast.ops import diffusion_step_from_table
from sdfast.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(counter, dtype, **options):
    results, fed = check_step(counter, dtype, "triton", device=DEVICE, **options)
    # Triton's interpreter cuts fp32 off to bf16, where a GPU rounds to nearest.
    units = 1 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0
    assert ((results[2].float() - fed.float()).abs() <= units * 2**-7 * fed.float().abs()).all()
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("guided", [False, True])
def test_every_form(dtype, guided):
    for takes_x0, seeds, clip in itertools.product((False, True), (None, SEEDS), (None, 0.5)):
        check(2, dtype, guided=guided, takes_x0=takes_x0, seeds=seeds, clip=clip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_row_and_beyond(dtype):
    for counter in (0, STEPS // 2, STEPS - 1, STEPS, 2**40, -1):
        check(counter, dtype, guided=True, takes_x0=True, seeds=SEEDS, clip=1.0)
        check(counter, dtype, guided=True, takes_x0=True, seeds=None, noise="placed", clip=1.0)


@pytest.mark.parametrize(
    "arrangement", ["channels_last", "channel_slice", "strided", "transposed", "misaligned"]
)
def test_layouts_give_the_same_bits(arrangement):
    for drawn in ({"seeds": SEEDS}, {"seeds": None, "noise": "dense"}, {"seeds": None, "noise": "placed"}):
        options = {"guided": True, "takes_x0": True, "clip": 1.0, **drawn}
        plain = check(1, torch.float32, **options)
        moved = check(1, torch.float32, arrangement=arrangement, **options)
        assert all(torch.equal(a, b) for a, b in zip(moved, plain, strict=True))


@pytest.mark.parametrize(
    "shape", [(0, 4, 3, 3), (2, 0, 4), (2,), (1, 1, 1, 1), (2, 4, 11, 13), (2, 2, 3, 4, 5)]
)
def test_shapes(shape):
    for guided in (False, True):
        seeds = torch.arange(shape[0])
        check(3, torch.float32, shape=shape, guided=guided, takes_x0=False, seeds=seeds, clip=None)


def test_axes_in_disorder():
    """Noise cannot be placed in such a layout: the results are moved to it."""
    x, m, _ = (t.to(DEVICE) for t in tensors(shape=(2, 2, 3, 4, 5)))
    k, scale, g = (t.to(DEVICE) for t in tables())
    counter = torch.tensor(1, device=DEVICE)
    options = {"guidance_scale": g, "seeds": SEEDS.to(DEVICE), "backend": "triton"}
    expected = diffusion_step_from_table(x, m, k, scale, counter, **options)
    disordered = x.permute(0, 4, 2, 3, 1).contiguous().permute(0, 4, 2, 3, 1)
    results = diffusion_step_from_table(disordered, m, k, scale, counter, **options)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert results[0].stride() == disordered.stride() and results[2].stride()[1:] == disordered.stride()[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_within_budget_of_fp64(dtype):
    k, scale, g = (t.to(DEVICE) for t in tables())
    counter, seeds = torch.tensor(2, device=DEVICE), SEEDS.to(DEVICE)

    def call(dtype, backend):
        x, m, previous = (t.to(DEVICE) for t in tensors(dtype))
        return diffusion_step_from_table(
            x, m, k, scale, counter, guidance_scale=g, previous_x0=previous, seeds=seeds, clip=2.0,
            backend=backend,
        )[:3]  # fmt: skip

    rounded = [t.to(dtype).double() for t in tensors(dtype)]
    exact = diffusion_step_from_table(
        rounded[0], rounded[1], *(t.cpu() for t in (k, scale, counter)), guidance_scale=g.cpu(),
        previous_x0=rounded[2], seeds=SEEDS, clip=2.0, backend="torch",
    )[:3]  # fmt: skip
    for result, eager, right in zip(call(dtype, "triton"), call(dtype, "torch"), exact, strict=True):
        assert_within_budget(result.cpu(), eager.cpu(), right)


def test_a_loop_of_its_own():
    """Each call takes the counter and the input that the one before made: the rows in turn, and no other."""
    k, scale, _ = (t.to(DEVICE) for t in tables())
    state = tensors(guided=False)[0].to(DEVICE)
    following = [state, state, state, torch.tensor(0, device=DEVICE)]
    for i in range(STEPS):
        x, x0, fed, counter = following
        assert counter == i
        following = diffusion_step_from_table(x, fed, k, scale, counter, previous_x0=x0, backend="triton")
        alone = diffusion_step_from_table(
            x, fed, k[i : i + 1], scale[min(i + 1, STEPS - 1)][None], torch.tensor(0, device=DEVICE),
            previous_x0=x0, backend="triton",
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(following[:3], alone[:3], strict=True))


def test_opcheck():
    k, scale, g = (t.to(DEVICE) for t in tables())
    op, counter = torch.ops.sdfast.diffusion_step_from_table_triton.default, torch.tensor(2, device=DEVICE)
    for arrangement in ("contiguous", "channels_last"):
        x, m, previous = (arranged(t.to(DEVICE), arrangement) for t in tensors(shape=(2, 3, 4, 5)))
        options = {"guidance_scale": g, "previous_x0": previous, "clip": 1.0, "seeds": SEEDS.to(DEVICE)}
        torch.library.opcheck(op, (x, m, k, scale, counter), options)
        torch.library.opcheck(op, (x, x, k, scale, counter), {"noise": torch.stack([x] * STEPS)})
