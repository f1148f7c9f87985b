"""diffusion_step: the formula, its dtypes, its registration and its errors."""

import hypothesis
import pytest
import torch
from elementwise import check_layouts, check_non_finite, check_results, check_shapes, check_threads
from hypothesis import strategies as st
from processes import run_with_library

from sdfast import _library
from sdfast.dispatch import use_backend
from sdfast.ops import diffusion_step

TABLE = [1.3, -0.8, 0.6, 0.35, 0.2, -0.15, 0.5]
needs_kernel = pytest.mark.skipif(
    not _library.has_kernel("diffusion_step", "cpu"), reason=_library.load_cpu_library().detail
)
BACKENDS = ["torch", pytest.param("cpu", marks=needs_kernel)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def coefficients(dtype=torch.float64):
    return torch.tensor(TABLE, dtype=dtype)


def by_hand(x, m, k, *, guidance_scale=None, previous_x0=None, noise=None, clip=None):
    """The formula in fp64."""
    x, m = x.double(), m.double()
    if guidance_scale is not None:
        n = len(x)
        m = m[:n] + guidance_scale * (m[n:] - m[:n])
    x0 = k[0] * x + k[1] * m
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    previous = k[2] * x0 + k[3] * x + k[4] * m
    if previous_x0 is not None:
        previous += k[5] * previous_x0.double()
    if noise is not None:
        previous += k[6] * noise.double()
    return previous, x0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance_scale", [None, 1.0, 7.5])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("optional", [(), ("noise",), ("previous_x0",), ("noise", "previous_x0")])
def test_formula(dtype, guidance_scale, clip, optional):
    x = randn(2, 4, 5, 3, dtype=dtype)
    m = randn(2 if guidance_scale is None else 4, 4, 5, 3, seed=1, dtype=dtype)
    extra = {name: randn(2, 4, 5, 3, seed=2 + i, dtype=dtype) for i, name in enumerate(optional)}
    options = {"guidance_scale": guidance_scale, "clip": clip, **extra}
    expected = by_hand(x, m, TABLE, **options)
    for k in (coefficients(), coefficients(torch.float32)):
        for result, wanted in zip(diffusion_step(x, m, k, **options), expected, strict=True):
            assert result.dtype == dtype
            # fp32 arithmetic, then one rounding.
            assert ((result - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_once(dtype):
    """Bit for bit the fp32 result, rounded; arithmetic in half precision differs in most elements."""
    x, m, z = (randn(1, 4, 16, 16, seed=s, dtype=dtype) for s in range(3))
    k = coefficients()
    for half, wide in zip(
        diffusion_step(x, m, k, noise=z),
        diffusion_step(x.float(), m.float(), k, noise=z.float()),
        strict=True,
    ):
        assert torch.equal(half, wide.to(dtype))
    in_half = TABLE[2] * (TABLE[0] * x + TABLE[1] * m) + TABLE[3] * x + TABLE[4] * m + TABLE[6] * z
    assert not torch.equal(diffusion_step(x, m, k, noise=z)[0], in_half)


@hypothesis.given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    guided=st.booleans(),
    transpose=st.booleans(),
    step=st.integers(1, 3),
    clip=st.sampled_from([None, 0.3, 2.0]),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_shape_and_stride(shape, guided, transpose, step, clip):
    def strided(leading, seed):
        full = randn(leading, *shape[1:-1], *(s * step for s in shape[1:][-1:]), seed=seed)
        out = full[..., ::step] if len(shape) > 1 else full
        return out.transpose(1, -1).contiguous().transpose(1, -1) if transpose and out.dim() > 2 else out

    x, m, z = strided(shape[0], 0), strided(shape[0] * (1 + guided), 1), strided(shape[0], 2)
    options = {"guidance_scale": 3.0 if guided else None, "noise": z, "previous_x0": z, "clip": clip}
    expected = by_hand(x, m, TABLE, **options)
    for result, wanted in zip(diffusion_step(x, m, coefficients(), **options), expected, strict=True):
        assert result.shape == x.shape
        torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_sample_has_any_stride(backend):
    """Its own along the batch means nothing, and is not that of the two halves of m."""
    for x in (randn(8, 8, 4).permute(2, 0, 1)[None], randn(4, 8, 8).expand(1, 4, 8, 8)):
        m = randn(2, 4, 8, 8, seed=1)
        results = diffusion_step(x, m, coefficients(), guidance_scale=3.0, backend=backend)
        for result, wanted in zip(results, by_hand(x, m, TABLE, guidance_scale=3.0), strict=True):
            torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)


def test_inputs_are_not_written():
    x, m, z = (randn(2, 3, seed=s) for s in range(3))
    kept = [v.clone() for v in (x, m, z)]
    diffusion_step(x, m, coefficients(), previous_x0=z, noise=z, clip=0.1)
    assert all(torch.equal(a, b) for a, b in zip((x, m, z), kept, strict=True))


def test_guidance_takes_the_unconditional_half_first():
    u, c = torch.zeros(1, 2), torch.ones(1, 2)
    k = torch.tensor([0, 1.0, 1, 0, 0, 0, 0])
    result, _ = diffusion_step(torch.zeros(1, 2), torch.cat([u, c]), k, guidance_scale=0.0)
    assert torch.equal(result, u)
    result, _ = diffusion_step(torch.zeros(1, 2), torch.cat([u, c]), k, guidance_scale=5.0)
    assert torch.equal(result, 5 * c)


def arguments(dtype=torch.float32, requires_grad=False):
    x, z, p = (randn(2, 3, 4, seed=s, dtype=dtype).requires_grad_(requires_grad) for s in range(3))
    m = randn(4, 3, 4, seed=3, dtype=dtype).requires_grad_(requires_grad)
    return (x, m, coefficients()), {"guidance_scale": 2.0, "previous_x0": p, "noise": z, "clip": 1.5}


def native_calls():
    """Calls for `elementwise`, each with what makes their tensors: x, m and the optional ones."""
    for guided in (False, True):
        for names in ((), ("noise",), ("previous_x0",), ("previous_x0", "noise")):
            for clip in (None, 1.5):

                def call(tensors, backend, guided=guided, names=names, clip=clip):
                    x, m, *rest = tensors
                    options = {"guidance_scale": 7.5 if guided else None, "clip": clip}
                    optional = dict(zip(names, rest, strict=True))
                    return diffusion_step(x, m, coefficients(), **options, **optional, backend=backend)

                def make(shape, dtype, guided=guided, names=names):
                    leading = [shape[0], shape[0] * (1 + guided), *[shape[0]] * len(names)]
                    return [randn(n, *shape[1:], seed=i, dtype=dtype) for i, n in enumerate(leading)]

                yield call, make


@needs_kernel
@pytest.mark.parametrize(
    "check", [check_shapes, check_layouts, check_non_finite, check_threads], ids=lambda check: check.__name__
)
def test_kernel(check):
    for call, make in native_calls():
        check(call, make)


@needs_kernel
@pytest.mark.usefixtures("poisoned_memory")
def test_everything_is_written():
    for call, make in native_calls():
        for shape in ((2, 4, 9, 7), (3, 4, 64, 64)):
            check_results(call, make(shape, torch.float32))


@needs_kernel
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa):
    run_with_library(
        isa,
        """
        from elementwise import check_all
        from test_diffusion_step import native_calls
        for call, make in native_calls():
            check_all(call, make)
        """,
    )


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_kernel_gives_the_bits_of_torch(dtype):
    for call, make in native_calls():
        tensors = make((2, 4, 9, 7), dtype)
        for a, b in zip(call(tensors, "cpu"), call(tensors, "torch"), strict=True):
            assert torch.equal(a, b)


@needs_kernel
def test_inputs_shared_by_all_samples():
    """Expanded tensors are read with a stride of zero, and coefficients with any."""
    x, z = randn(4, 3, 50), randn(1, 3, 50, seed=1)
    k = torch.stack([coefficients(), coefficients()], 1)[:, 0]
    for actual, expected in zip(
        diffusion_step(x, x, k, noise=z.expand(4, 3, 50), backend="cpu"),
        diffusion_step(x, x, coefficients(), noise=z.repeat(4, 1, 1), backend="cpu"),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@needs_kernel
def test_opcheck():
    args, kwargs = arguments()
    torch.library.opcheck(torch.ops.sdfast.diffusion_step.default, args, kwargs)
    x, m, _ = args
    torch.library.opcheck(
        torch.ops.sdfast.diffusion_step.default, (x, m[:2], coefficients(torch.float32)), {}
    )
    image = randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for x in (image, randn(2, 8, 3, 4)[:, :4], randn(2, 3, 8)[..., ::2]):
        torch.library.opcheck(torch.ops.sdfast.diffusion_step.default, (x, x, coefficients()), {})


@needs_kernel
def test_what_is_unsafe_is_refused_by_the_operation_itself():
    x, k, op = randn(2, 3), coefficients(), torch.ops.sdfast.diffusion_step
    for args, options in [
        ((x, x[:1], k), {}),
        ((x, x, k[:6]), {}),
        ((x, x, k), {"guidance_scale": 2.0}),
        ((x, x.half(), k), {}),
        ((x, x, k), {"noise": x[:, :2]}),
        ((x.double(), x.double(), k), {}),
    ]:
        with pytest.raises(RuntimeError):
            op(*args, **options)


def test_gradients_are_those_of_torch():
    """The kernel has none, so a call that needs them goes to torch, and a named kernel says so."""
    (x, m, k), options = arguments(requires_grad=True)
    result, _ = diffusion_step(x, m, k, **options)
    expected, _ = diffusion_step(x, m, k, **options, backend="torch")
    for a, b in zip(
        *(torch.autograd.grad(r.square().sum(), (x, m)) for r in (result, expected)), strict=True
    ):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: "):
        diffusion_step(x, m, k, **options, backend="cpu")


def test_gradcheck():
    (x, m, k), options = arguments(torch.float64, requires_grad=True)
    options["clip"] = None

    def step(x, m, p, z):
        return diffusion_step(x, m, k, **{**options, "previous_x0": p, "noise": z})

    assert torch.autograd.gradcheck(step, (x, m, options["previous_x0"], options["noise"]))


def test_compiles_without_a_break():
    (x, m, k), options = arguments()

    def run(x, m, k):
        return diffusion_step(x, m, k, **options)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for a, b in zip(compiled(x, m, k), run(x, m, k), strict=True):
        assert torch.equal(a, b)


def test_backends():
    args, options = arguments()
    expected = diffusion_step(*args, **options)
    for backend in ("reference", "torch"):
        results = diffusion_step(*args, **options, backend=backend)
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a, b)
        with use_backend(backend):
            assert torch.equal(diffusion_step(*args, **options)[0], results[0])
    with pytest.raises(ValueError, match="diffusion_step: backend 'cuda' cannot run"):
        diffusion_step(*args, **options, backend="cuda")
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        diffusion_step(*args, **options, backend="fast")


X, K = randn(2, 3), coefficients()


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (([1.0], X, K), {}, TypeError, "sample: got list, expected a torch.Tensor"),
        ((X.int(), X, K), {}, TypeError, "sample: got dtype torch.int32"),
        ((torch.tensor(1.0), X, K), {}, ValueError, r"sample: got a scalar, expected shape \(N, ...\)"),
        ((X, X[:1], K), {}, ValueError, r"model_output: got shape \(1, 3\), expected \(2, 3\)"),
        (
            (X, X, K),
            {"guidance_scale": 2.0},
            ValueError,
            r"model_output: got shape \(2, 3\), expected \(4, 3\)",
        ),
        ((X, X.half(), K), {}, TypeError, "model_output: got dtype torch.float16, expected torch.float32"),
        ((X, X, K[:6]), {}, ValueError, r"coefficients: got shape \(6,\), expected \(7,\)"),
        (
            (X, X, K.half()),
            {},
            TypeError,
            "coefficients: got dtype torch.float16, expected float32 or float64",
        ),
        ((X, X, K.to("meta")), {}, ValueError, "coefficients: is on meta, expected the CPU or cpu"),
        (
            (X, torch.cat([X, X]), K),
            {"guidance_scale": float("nan")},
            ValueError,
            "guidance_scale: got nan, expected a finite number",
        ),
        ((X, X, K), {"noise": X[:, :2]}, ValueError, r"noise: got shape \(2, 2\), expected \(2, 3\)"),
        ((X, X, K), {"previous_x0": X.double()}, TypeError, "previous_x0: got dtype torch.float64"),
        ((X, X, K), {"clip": 0.0}, ValueError, "clip: got 0.0, expected a positive number or None"),
        ((X, X, K), {"clip": -1.0}, ValueError, "clip: got -1.0"),
    ],
)
def test_errors_name_the_argument(args, options, error, message):
    with pytest.raises(error, match=message):
        diffusion_step(*args, **options)
