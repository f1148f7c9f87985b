"""diffusion_step's CUDA kernels: torch's bits, the noise that is defined, whatever the layout and the counter."""

import ctypes
import itertools
import subprocess
import sysconfig

import emulated_cuda
import pytest
import torch
from elementwise import ARRANGEMENTS, DTYPES, SHAPES, arranged, check_results
from emulated_cuda import device, thread_order
from test_diffusion_step import native_calls
from test_diffusion_step_from_table import STEPS, check_step, tables, tensors
from test_diffusion_step_seeds import SEEDS, WORD, X_IS_Z
from test_diffusion_step_seeds import native_calls as seeded_calls

from sdfast.ops import diffusion_step, diffusion_step_from_table
from sdfast.ops._philox import philox4x32, philox_normals
from sdfast.testing import assert_within_budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_torchs(dtype, cuda_kernels):
    """Sizes of a latent, those of odd samples and of none; every form of the update."""
    for seed, shape in enumerate((*SHAPES, (1, 4, 64, 64))):
        for call, make in native_calls():
            given = [t.to(cuda_kernels) for t in make(shape, dtype)]
            with thread_order(seed):
                results = call(given, "cuda")
            for a, b in zip(results, call(given, "torch"), strict=True):
                assert torch.equal(a, b)


def test_many_multiprocessors_change_no_bit(cuda_kernels):
    """Blocks are short where there are few of them, and long where there are many."""
    call, make = list(native_calls())[-1]
    given = [t.to(cuda_kernels) for t in make((2, 4, 40, 40), torch.float32)]
    with device(80, 1):
        long = call(given, "cuda")
    with device(90, 132):
        assert all(torch.equal(a, b) for a, b in zip(call(given, "cuda"), long, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts_give_the_same_bits(dtype, cuda_kernels):
    for calls in (native_calls, seeded_calls):
        call, make = list(calls())[-1]
        given = [t.to(cuda_kernels) for t in make((2, 4, 9, 7), dtype)]
        expected = call(given, "cuda")
        for arrangement, mixed in itertools.product(ARRANGEMENTS, (slice(None), slice(1), slice(1, None))):
            views = list(given)
            views[mixed] = [arranged(t, arrangement) for t in given[mixed]]
            for a, b in zip(call(views, "cuda"), expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_within_budget(dtype, cuda_kernels):
    for shape, (call, make) in zip(((2, 4, 9, 7), (3, 5, 33), (2,), (20, 6)), seeded_calls(), strict=False):
        given = [t.to(cuda_kernels) for t in make(shape, dtype)]
        for a, b in zip(check_results(call, given, "cuda"), call(given, "cuda"), strict=True):
            assert torch.equal(a, b)


def draw(seeds, x, step):
    return diffusion_step(x, x, X_IS_Z, seeds=seeds, step=step, backend="cuda")[0]


@pytest.mark.parametrize("step", [0, 3, 2**33 + 1, 2**63 - 1])
def test_noise_is_within_two_units_in_the_last_place(step, cuda_kernels):
    for size in (20_000, 2501):  # in vectors, and element by element
        x = torch.zeros(len(SEEDS), size, device=cuda_kernels)
        exact = philox_normals(SEEDS, x.shape, step)
        unit = torch.exp2(exact.abs().clamp_min(1e-30).log2().floor() - 23)
        error = (draw(SEEDS, x, step).cpu() - exact).abs()
        assert (error <= 2 * unit + 1e-15).all()  # where fp64's pi leaves a remainder of zero


def test_noise_does_not_depend_on_layout_or_batch(cuda_kernels):
    x = torch.zeros(len(SEEDS), 3, 4, 7, device=cuda_kernels)
    z = draw(SEEDS, x, 4)
    for seed, order in enumerate(((0, 2, 3, 1), (0, 3, 1, 2), (0, 2, 1, 3), (0, 3, 2, 1))):
        back = [order.index(axis) for axis in range(4)]
        permuted = x.permute(order).contiguous().permute(back)
        with thread_order(seed):
            result = draw(SEEDS, permuted, 4)
        assert torch.equal(result, z) and result.stride() == permuted.stride()
    assert torch.equal(draw(SEEDS[2:3], x[:1], 4), z[2:3])
    five = torch.zeros(2, 2, 3, 4, 5, device=cuda_kernels)
    disordered = five.permute(0, 4, 2, 3, 1).contiguous().permute(0, 4, 2, 3, 1)
    assert torch.equal(draw(SEEDS[:2], disordered, 1), draw(SEEDS[:2], five, 1))
    many = torch.zeros(20, 8, device=cuda_kernels)  # more seeds than a launch takes along
    assert torch.equal(draw(torch.arange(20), many, 0)[7:9], draw(torch.tensor([7, 8]), many[:2], 0))
    strided = torch.stack([torch.arange(20), torch.arange(20)], 1)[:, 0].to(cuda_kernels)
    assert torch.equal(draw(strided, many, 0), draw(torch.arange(20), many, 0))


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """draw_words and uniform of csrc/cuda_philox.cuh, from the host."""
    if (reason := emulated_cuda.why_not()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("philox")
    (folder / "words.cpp").write_text("""
        #include "cuda_philox.cuh"
        extern "C" void draw(uint64_t seed, uint64_t block, uint64_t step, uint32_t* words, float* uniforms) {
          const auto drawn = sdfast::philox::draw_words(seed, block, step);
          for (int i = 0; i < 4; ++i) words[i] = drawn.r[i], uniforms[i] = sdfast::philox::uniform(drawn.r[i]);
        }
    """)
    includes = (
        emulated_cuda.ROOT / "csrc",
        emulated_cuda.ROOT / "tests/simt",
        emulated_cuda.cuda_include_dir(),
    )
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-DSDFAST_SIMT",
         *(f"-I{folder}" for folder in includes), "words.cpp", "-o", "words.so"],
        cwd=folder, check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(folder / "words.so")).draw


@pytest.mark.parametrize("seed", SEEDS.tolist())
def test_words_and_uniforms(seed, generator):
    """Bit for bit, also where halves of the counter end and signs would turn."""
    key = [torch.tensor(w) for w in (seed & WORD, (seed >> 32) & WORD)]
    for step, first in itertools.product((0, 2**31, 2**32 + 5, 2**63 - 1), (0, 2**31 - 4, 2**32 - 4, 2**40)):
        block = torch.arange(first, first + 8)
        counter = [block & WORD, block >> 32, *(torch.tensor(w) for w in (step & WORD, step >> 32))]
        exact = torch.stack(philox4x32(counter, key), 1)
        for i in range(8):
            words, uniforms = (ctypes.c_uint32 * 4)(), (ctypes.c_float * 4)()
            generator(*(ctypes.c_uint64(v) for v in (seed & (2**64 - 1), first + i, step)), words, uniforms)
            assert list(words) == exact[i].tolist()
            assert torch.equal(torch.tensor(list(uniforms)), exact[i].float() * 2**-32 + 2**-33)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_every_form_with_a_table(dtype, guided, cuda_kernels):
    for takes_x0, seeds, clip in itertools.product((False, True), (None, SEEDS[:2]), (None, 0.5)):
        options = {"guided": guided, "takes_x0": takes_x0, "seeds": seeds, "clip": clip}
        results, fed = check_step(2, dtype, "cuda", device=cuda_kernels, **options)
        assert torch.equal(results[2], fed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_and_beyond(dtype, cuda_kernels):
    options = {"guided": True, "takes_x0": True, "clip": 1.0, "device": cuda_kernels}
    for counter in (0, STEPS // 2, STEPS - 1, STEPS, 2**40, -1):
        for drawn in ({"seeds": SEEDS[:2]}, {"seeds": None, "noise": "placed"}):
            results, fed = check_step(counter, dtype, "cuda", **drawn, **options)
            assert torch.equal(results[2], fed)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_layouts_with_a_table(arrangement, cuda_kernels):
    options = {"guided": True, "takes_x0": True, "clip": 1.0, "device": cuda_kernels}
    for drawn in (
        {"seeds": SEEDS[:2]},
        {"seeds": None, "noise": "dense"},
        {"seeds": None, "noise": "placed"},
    ):
        plain = check_step(1, torch.float32, "cuda", **drawn, **options)[0]
        moved, fed = check_step(1, torch.float32, "cuda", arrangement=arrangement, **drawn, **options)
        assert all(torch.equal(a, b) for a, b in zip(moved, plain, strict=True))
        assert torch.equal(moved[2], fed)


@pytest.mark.parametrize(
    "shape", [(0, 4, 3, 3), (2, 0, 4), (2,), (1, 1, 1, 1), (2, 4, 11, 13), (2, 2, 3, 4, 5), (20, 4, 8)]
)
def test_shapes_with_a_table(shape, cuda_kernels):
    for guided in (False, True):
        options = {"guided": guided, "takes_x0": False, "seeds": torch.arange(shape[0]), "clip": None}
        check_step(3, torch.float32, "cuda", shape=shape, device=cuda_kernels, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_table_within_budget_of_fp64(dtype, cuda_kernels):
    k, scale, g = tables()
    where = cuda_kernels

    def call(tensors, backend, where):
        x, m, previous = (t.to(where) for t in tensors)
        numbers = (t.to(where) for t in (k, scale, torch.tensor(2)))
        return diffusion_step_from_table(
            x, m, *numbers, guidance_scale=g.to(where), previous_x0=previous, seeds=SEEDS[:2].to(where),
            clip=2.0, backend=backend,
        )[:3]  # fmt: skip

    given = tensors(dtype)
    exact = call([t.double() for t in given], "torch", "cpu")
    results, eager = call(given, "cuda", where), call(given, "torch", where)
    for result, by_torch, right in zip(results, eager, exact, strict=True):
        assert_within_budget(result.cpu(), by_torch.cpu(), right)


def test_a_loop_of_its_own(cuda_kernels):
    """Each call takes the counter and the input that the one before made."""
    k, scale, _ = (t.to(cuda_kernels) for t in tables())
    following = [tensors(guided=False)[0].to(cuda_kernels)] * 3 + [torch.tensor(0, device=cuda_kernels)]
    expected = following
    for i in range(STEPS):
        (x, x0, fed, counter), (y, y0, y_fed, y_counter) = following, expected
        assert counter == i
        following = diffusion_step_from_table(x, fed, k, scale, counter, previous_x0=x0, backend="cuda")
        expected = diffusion_step_from_table(y, y_fed, k, scale, y_counter, previous_x0=y0, backend="torch")
        assert all(torch.equal(a, b) for a, b in zip(following, expected, strict=True))


def test_tables_and_seeds_of_any_stride(cuda_kernels):
    x, m, previous = (t.to(cuda_kernels) for t in tensors())
    k, scale, g = (t.to(cuda_kernels) for t in tables())
    counter = torch.tensor(1, device=cuda_kernels)
    expected = diffusion_step_from_table(x, m, k, scale, counter, guidance_scale=g, backend="cuda")
    wide = torch.stack([k.flatten()] * 2, 1)[:, 0].view(STEPS, 7)
    columns = torch.stack([scale, g.double()], 1)
    for tables_given in ((wide, columns[:, 0], columns[:, 1]), (k.float(), scale.float(), g)):
        *numbers, guidance = tables_given
        actual = diffusion_step_from_table(x, m, *numbers, counter, guidance_scale=guidance, backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_opcheck(cuda_kernels):
    k, scale, g = (t.to(cuda_kernels) for t in tables())
    counter, sdfast = torch.tensor(2, device=cuda_kernels), torch.ops.sdfast
    for arrangement in ("channels_last", "channel_slice"):
        x, m, previous = (arranged(t.to(cuda_kernels), arrangement) for t in tensors(shape=(2, 3, 4, 5)))
        op = sdfast.diffusion_step_cuda.default
        torch.library.opcheck(op, (x, m, X_IS_Z), {"guidance_scale": 2.0, "noise": x, "clip": 1.0})
        torch.library.opcheck(op, (x, x, k[0]), {"seeds": SEEDS[:2], "step": 3})
        options = {"guidance_scale": g, "previous_x0": previous, "clip": 1.0}
        op = sdfast.diffusion_step_from_table_cuda.default
        torch.library.opcheck(op, (x, m, k, scale, counter), {**options, "seeds": SEEDS[:2].to(cuda_kernels)})
        torch.library.opcheck(op, (x, x, k, scale, counter), {"noise": torch.stack([x] * STEPS)})


def test_what_is_unsafe_is_refused_by_the_operation_itself(cuda_kernels):
    x, op = torch.randn(2, 3, device=cuda_kernels), torch.ops.sdfast.diffusion_step_cuda
    for args, options in [
        ((x, x[:1], X_IS_Z), {}),
        ((x, x, X_IS_Z[:6]), {}),
        ((x, x, X_IS_Z), {"guidance_scale": 2.0}),
        ((x, x.half(), X_IS_Z), {}),
        ((x, x, X_IS_Z), {"noise": x[:, :2]}),
        ((x.double(), x.double(), X_IS_Z), {}),
        ((x, x, X_IS_Z.half()), {}),
        ((x, x, X_IS_Z), {"seeds": SEEDS[:3]}),
        ((x, x, X_IS_Z), {"seeds": SEEDS[:2].int()}),
        ((x, x, X_IS_Z), {"seeds": SEEDS[:2], "noise": x}),
    ]:
        with pytest.raises(RuntimeError):
            op(*args, **options)
