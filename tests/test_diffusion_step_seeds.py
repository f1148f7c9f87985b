"""diffusion_step's own noise: the generator's known answers, its distribution, and what it does not depend on."""

import math

import pytest
import torch
from elementwise import check_layouts, check_shapes, check_threads
from processes import run_with_library

from sdfast import _library
from sdfast.ops import diffusion_step
from sdfast.ops._philox import philox4x32, philox_normals, philox_uniforms

WORD = 2**32 - 1
X_IS_Z = torch.tensor([0.0, 0, 0, 0, 0, 0, 1])
SEEDS = torch.tensor([0, 1, -1, 0x123456789ABCDEF, -(2**63)])
needs_kernel = pytest.mark.skipif(
    not _library.has_kernel("diffusion_step", "cpu"), reason=_library.load_cpu_library().detail
)
BACKENDS = ["torch", pytest.param("cpu", marks=needs_kernel)]


def draw(seeds, shape, step=0, *, backend=None, dtype=torch.float32):
    """z itself: x' with coefficients that leave nothing else."""
    x = torch.zeros(len(seeds), *shape, dtype=dtype)
    return diffusion_step(x, x, X_IS_Z, seeds=seeds, step=step, backend=backend)[0]


# The vectors that come with the paper's Random123, in its file kat_vectors.
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, answer):
    words = philox4x32([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(w.item() for w in words) == answer
    assert philox(counter, key) == answer


def philox(counter, key):
    """In Python's integers, as the paper writes it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


@pytest.mark.parametrize("step", [0, 1, 2**32 + 5, 2**63 - 1])
def test_where_seed_step_and_element_go(step):
    u = philox_uniforms(SEEDS, 37, step)
    assert u.shape == (len(SEEDS), 10, 4)
    for seed, sample in zip(SEEDS.tolist(), u, strict=True):
        key = seed & WORD, (seed >> 32) & WORD
        for block in (0, 1, 9):
            words = philox((block, 0, step & WORD, step >> 32), key)
            # Python rounds to fp64, exact here; torch once more to fp32.
            rounded = torch.tensor(words, dtype=torch.float64).float()
            assert torch.equal(sample[block], rounded / 2**32 + 2**-33)


def test_box_muller():
    u = philox_uniforms(SEEDS, 9, 4).double()
    z = philox_normals(SEEDS, (len(SEEDS), 3, 3), 4).flatten(1)
    for i in range(9):
        u0, u1 = u[:, i // 4, 2 * (i % 4 // 2)], u[:, i // 4, 2 * (i % 4 // 2) + 1]
        turn = torch.sin if i % 2 else torch.cos
        torch.testing.assert_close(z[:, i], (-2 * u0.log()).sqrt() * turn(2 * math.pi * u1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_distribution(backend):
    """Moments, Kolmogorov and Smirnov's distance, and the correlations of what is drawn together."""
    n = 2**20
    first, second = draw(torch.tensor([7, 8]), (n,), backend=backend).double()
    next_step = draw(torch.tensor([7]), (n,), 1, backend=backend)[0].double()
    for z in (first, second, next_step):
        assert abs(z.mean()) < 4 / math.sqrt(n)
        assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
        assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
        assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
        ranks = torch.arange(n + 1) / n
        below = torch.special.ndtr(z.sort().values)
        distance = torch.maximum((below - ranks[:-1]).abs().max(), (below - ranks[1:]).abs().max())
        assert distance < 1.95 / math.sqrt(n)  # exceeded once in a thousand
    pairs = [(first, second), (first, next_step), *((first[k:], first[:-k]) for k in (1, 2, 3, 4))]
    for a, b in pairs:
        assert abs((a * b).mean()) < 4 / math.sqrt(n)
        assert abs((a.square() * b.square()).mean() - 1) < 4 * math.sqrt(8 / n)


@needs_kernel
@pytest.mark.parametrize("step", [0, 3, 2**33 + 1])
@pytest.mark.parametrize("shape", [(2**19,), (), (1,), (3, 5, 7), (4, 64, 64)])
def test_kernel_draws_what_is_defined(shape, step):
    """Within 2 units in the last place, which no other word of the generator would be."""
    exact = philox_normals(SEEDS, (len(SEEDS), *shape), step)
    unit = torch.exp2(exact.abs().clamp_min(1e-30).log2().floor() - 23)
    error = (draw(SEEDS, shape, step, backend="cpu") - exact).abs()
    assert (error <= 2 * unit + 1e-15).all()  # where fp64's pi leaves a remainder of zero


@needs_kernel
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set_draws_the_same_bits(isa, tmp_path):
    torch.save(draw(SEEDS, (70001,), 9, backend="cpu"), tmp_path / "z.pt")
    run_with_library(
        isa,
        f"""
        from test_diffusion_step_seeds import SEEDS, draw, native_calls
        from elementwise import check_all
        assert torch.equal(draw(SEEDS, (70001,), 9, backend="cpu"), torch.load(r"{tmp_path / "z.pt"}"))
        for call, make in native_calls():
            check_all(call, make)
        """,
    )


def native_calls():
    """Calls for `elementwise`, each with what makes their tensors."""
    for guided in (False, True):
        for names in ((), ("previous_x0",)):

            def call(tensors, backend, guided=guided, names=names):
                x, m, *rest = tensors
                k = torch.tensor([1.3, -0.8, 0.6, 0.35, 0.2, -0.15, 0.5], dtype=torch.float64)
                options = {"guidance_scale": 7.5 if guided else None, "clip": 1.5, "step": 5}
                optional = dict(zip(names, rest, strict=True))
                return diffusion_step(
                    x, m, k, seeds=torch.arange(len(x)), **options, **optional, backend=backend
                )

            def make(shape, dtype, guided=guided, names=names):
                leading = [shape[0], shape[0] * (1 + guided), *[shape[0]] * len(names)]
                return [torch.randn(n, *shape[1:], dtype=torch.float64).to(dtype) for n in leading]

            yield call, make


@needs_kernel
@pytest.mark.parametrize("check", [check_shapes, check_layouts, check_threads], ids=lambda c: c.__name__)
def test_kernel(check):
    for call, make in native_calls():
        check(call, make)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_layouts_of_samples_that_threads_share(threads):
    """Every dense order of the axes, in parts that begin anywhere."""
    torch.set_num_threads(threads)
    shape = (2, 5, 71, 63)
    expected = draw(SEEDS[:2], shape[1:], backend="cpu")
    for order in [(0, 2, 3, 1), (0, 3, 2, 1), (0, 1, 3, 2), (1, 0, 2, 3), (3, 2, 1, 0)]:
        x = torch.zeros([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(4)])
        assert x.shape == shape
        result, _ = diffusion_step(x, x, X_IS_Z, seeds=SEEDS[:2], backend="cpu")
        assert torch.equal(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_is_drawn_alike_in_any_batch(backend):
    together = draw(SEEDS, (4, 33, 17), 2, backend=backend)
    for i in range(len(SEEDS)):
        assert torch.equal(draw(SEEDS[i : i + 1], (4, 33, 17), 2, backend=backend)[0], together[i])
    wide = SEEDS.repeat_interleave(2)[::2]
    assert not wide.is_contiguous()
    assert torch.equal(draw(wide, (4, 33, 17), 2, backend=backend), together)
    same = draw(torch.tensor([3]).expand(4), (100,), backend=backend)
    assert torch.equal(same, same[:1].expand(4, 100))


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_seeds_and_steps_draw_other_noise(backend):
    seeds = torch.tensor([0, 1, 2**32, -1, 2**31])
    steps = (0, 1, 2, 2**32, 2**62)
    drawn = torch.cat([draw(seeds, (1000,), step, backend=backend) for step in steps])
    assert len(drawn.unique()) > 0.999 * drawn.numel()
    correlation = drawn @ drawn.T / 1000
    assert (correlation - torch.eye(len(drawn))).abs().max() < 0.25


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents_take_noise_in_fp32(dtype, backend):
    x = torch.randn(2, 3, 40).to(dtype)
    k = torch.tensor([1.3, -0.8, 0.6, 0.35, 0.2, -0.15, 0.5])
    half = diffusion_step(x, x, k, seeds=SEEDS[:2], backend=backend)
    wide = diffusion_step(x.float(), x.float(), k, seeds=SEEDS[:2], backend=backend)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(half, wide, strict=True))


def test_fp64_takes_noise_in_fp64():
    exact = philox_normals(SEEDS, (len(SEEDS), 50), 0)
    assert torch.equal(draw(SEEDS, (50,), dtype=torch.float64), exact)
    assert torch.equal(draw(SEEDS, (50,), backend="torch"), exact.float())


def test_gradients_pass_beside_the_noise():
    x = torch.randn(2, 6, requires_grad=True)
    k = torch.tensor([1.3, -0.8, 0.6, 0.35, 0.2, -0.15, 0.5])
    noise = philox_normals(SEEDS[:2], (2, 6), 1).float()
    actual, expected = (
        diffusion_step(x, x, k, **z)[0] for z in ({"seeds": SEEDS[:2], "step": 1}, {"noise": noise})
    )
    assert torch.equal(actual, expected)
    assert torch.equal(*(torch.autograd.grad(r.square().sum(), x)[0] for r in (actual, expected)))


@needs_kernel
def test_opcheck():
    x = torch.randn(2, 3, 4)
    for view in (x, x.transpose(1, 2)):
        options = {"seeds": SEEDS[:2], "step": 3}
        torch.library.opcheck(torch.ops.sdfast.diffusion_step.default, (view, view, X_IS_Z), options)


def test_compiles_once_for_all_steps():
    x = torch.randn(2, 3, 4)
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=count)
    def run(x, step):
        return diffusion_step(x, x, X_IS_Z, seeds=SEEDS[:2], step=step)[0]

    for step in range(2, 8):
        assert torch.equal(run(x, step), draw(SEEDS[:2], (3, 4), step))
    assert len(compilations) <= 2  # the second for a number that is no constant


@needs_kernel
def test_what_is_unsafe_is_refused_by_the_operation_itself():
    x, op = torch.zeros(2, 3), torch.ops.sdfast.diffusion_step
    for options in (
        {"seeds": SEEDS[:3]},
        {"seeds": SEEDS[:2].int()},
        {"seeds": SEEDS[:2, None]},
        {"seeds": SEEDS[:2], "noise": x},
    ):
        with pytest.raises(RuntimeError, match="seeds"):
            op(x, x, X_IS_Z, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seeds": [1, 2]}, TypeError, "seeds: got list, expected a torch.Tensor"),
        ({"seeds": SEEDS[:2].int()}, TypeError, "seeds: got dtype torch.int32, expected torch.int64"),
        ({"seeds": SEEDS[:2].double()}, TypeError, "seeds: got dtype torch.float64"),
        ({"seeds": SEEDS[:3]}, ValueError, r"seeds: got shape \(3,\), expected \(2,\)"),
        ({"seeds": SEEDS[:2, None]}, ValueError, r"seeds: got shape \(2, 1\), expected \(2,\)"),
        ({"seeds": SEEDS[:2].to("meta")}, ValueError, "seeds: is on meta, expected the CPU or cpu"),
        ({"seeds": SEEDS[:2], "noise": torch.zeros(2, 3)}, ValueError, "seeds: got them beside noise"),
        ({"seeds": SEEDS[:2], "step": -1}, ValueError, "step: got -1, expected a number from 0 to 2"),
        ({"seeds": SEEDS[:2], "step": 2**63}, ValueError, "step: got 9223372036854775808"),
        ({"seeds": SEEDS[:2], "step": 1.0}, TypeError, "step: got float, expected an int"),
    ],
)
def test_errors_name_the_argument(options, error, message):
    x = torch.zeros(2, 3)
    with pytest.raises(error, match=message):
        diffusion_step(x, x, X_IS_Z, **options)
