"""add_noise: eq. 15 and its targets, dtypes, registration and errors."""

import hypothesis
import pytest
import torch
from elementwise import check_layouts, check_non_finite, check_results, check_shapes, check_threads
from hypothesis import strategies as st
from processes import run_with_library

from sdfast import _library
from sdfast.dispatch import use_backend
from sdfast.ops import add_noise

needs_kernel = pytest.mark.skipif(
    not _library.has_kernel("add_noise", "cpu"), reason=_library.load_cpu_library().detail
)
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def levels(n, dtype=torch.float32):
    alpha_bar = (
        torch.linspace(0.95, 0.02, n, dtype=torch.float64) if n else torch.empty(0, dtype=torch.float64)
    )
    return alpha_bar.sqrt().to(dtype), (1 - alpha_bar).sqrt().to(dtype)


def by_hand(x0, noise, alpha, sigma, prediction):
    """Sample by sample, in fp64."""
    samples = list(zip(alpha.tolist(), sigma.tolist(), x0.double(), noise.double(), strict=True))
    x_t = [a * x + s * e for a, s, x, e in samples]
    v = [a * e - s * x for a, s, x, e in samples]
    target = {
        "epsilon": noise.double(),
        "sample": x0.double(),
        "v_prediction": torch.stack(v) if v else x0.double(),
    }
    return torch.stack(x_t) if x_t else x0.double(), target[prediction]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_formula(dtype, prediction):
    x0, noise = randn(3, 4, 5, 2, dtype=dtype), randn(3, 4, 5, 2, seed=1, dtype=dtype)
    for level_dtype in (torch.float32, torch.float64):
        alpha, sigma = levels(3, level_dtype)
        expected = by_hand(x0, noise, alpha, sigma, prediction)
        results = add_noise(x0, noise, alpha, sigma, prediction=prediction)
        for result, wanted in zip(results, expected, strict=True):
            assert result.dtype == dtype
            assert ((result - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_once(dtype):
    x0, noise = randn(3, 64, dtype=dtype), randn(3, 64, seed=1, dtype=dtype)
    alpha, sigma = levels(3)
    half = add_noise(x0, noise, alpha, sigma, prediction="v_prediction")
    wide = add_noise(x0.float(), noise.float(), alpha, sigma, prediction="v_prediction")
    for a, b in zip(half, wide, strict=True):
        assert torch.equal(a, b.to(dtype))


@hypothesis.given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    step=st.integers(1, 3),
    prediction=st.sampled_from(PREDICTIONS),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_shape_and_stride(shape, step, prediction):
    wide = [*shape[:-1], shape[-1] * step]
    x0 = randn(*wide)[..., ::step]
    noise = randn(*reversed(shape), seed=1).permute(tuple(reversed(range(len(shape)))))
    alpha, sigma = levels(2 * shape[0])
    alpha, sigma = alpha[::2][: len(x0)], sigma[::2][: len(x0)]
    x0 = x0[: len(noise)]
    expected = by_hand(x0, noise, alpha[: len(x0)], sigma[: len(x0)], prediction)
    results = add_noise(x0, noise, alpha[: len(x0)], sigma[: len(x0)], prediction=prediction)
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == x0.shape
        torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)


def test_targets_that_are_inputs_are_not_copied():
    x0, noise, (alpha, sigma) = randn(2, 3), randn(2, 3, seed=1), levels(2)
    assert add_noise(x0, noise, alpha, sigma)[1] is noise
    assert add_noise(x0, noise, alpha, sigma, prediction="sample")[1] is x0


def native_calls():
    """Calls for `elementwise`, each with what makes their tensors, x0 and noise."""

    def make(shape, dtype):
        return [randn(*shape, seed=i, dtype=dtype) for i in range(2)]

    def noised(tensors, backend):
        return add_noise(*tensors, *levels(len(tensors[0])), backend=backend)[:1]

    def with_velocity(tensors, backend):
        some = levels(len(tensors[0]), torch.float64)
        return add_noise(*tensors, *some, prediction="v_prediction", backend=backend)

    return [(noised, make), (with_velocity, make)]


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
        from test_add_noise import native_calls
        for call, make in native_calls():
            check_all(call, make)
        """,
    )


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_gives_the_bits_of_torch(dtype):
    for call, make in native_calls():
        tensors = make((2, 4, 9, 7), dtype)
        for a, b in zip(call(tensors, "cpu"), call(tensors, "torch"), strict=True):
            assert torch.equal(a, b)


@needs_kernel
def test_opcheck():
    image = randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for x0 in (randn(2, 3, 4), image, randn(2, 8, 3, 4)[:, :4], randn(2, 3, 8)[..., ::2]):
        for op in (torch.ops.sdfast.add_noise, torch.ops.sdfast.add_noise_velocity):
            torch.library.opcheck(op.default, (x0, x0, *levels(2)))


@needs_kernel
def test_what_is_unsafe_is_refused_by_the_operation_itself():
    x, (alpha, sigma) = randn(2, 3), levels(2)
    for op in (torch.ops.sdfast.add_noise, torch.ops.sdfast.add_noise_velocity):
        for args in [
            (x, x[:1], alpha, sigma),
            (x, x, alpha[:1], sigma),
            (x, x.half(), alpha, sigma),
            (x.double(), x.double(), alpha, sigma),
            (x[0, 0], x[0, 0], alpha, sigma),
        ]:
            with pytest.raises(RuntimeError):
                op(*args)


def test_gradients_are_those_of_torch():
    """The kernel has none, so a call that needs them goes to torch, and a named kernel says so."""
    x0, noise, (alpha, sigma) = randn(2, 80).requires_grad_(), randn(2, 80, seed=1), levels(2)
    x_t, v = add_noise(x0, noise, alpha, sigma, prediction="v_prediction")
    (gradient,) = torch.autograd.grad((x_t + v).sum(), x0)
    torch.testing.assert_close(gradient, (alpha - sigma)[:, None].expand(2, 80))
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: "):
        add_noise(x0, noise, alpha, sigma, backend="cpu")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradcheck(prediction):
    inputs = [randn(2, 3, seed=s, dtype=torch.float64).requires_grad_() for s in range(2)]
    alpha, sigma = (c.requires_grad_() for c in levels(2, torch.float64))
    assert torch.autograd.gradcheck(lambda *a: add_noise(*a, prediction=prediction), (*inputs, alpha, sigma))


def test_compiles_without_a_break():
    def run(x0, noise, alpha, sigma):
        return add_noise(x0, noise, alpha, sigma, prediction="v_prediction")

    args = (randn(2, 3), randn(2, 3, seed=1), *levels(2))
    for a, b in zip(torch.compile(run, fullgraph=True, backend="eager")(*args), run(*args), strict=True):
        assert torch.equal(a, b)


def test_backends():
    args = (randn(2, 3), randn(2, 3, seed=1), *levels(2))
    for backend in ("reference", "torch"):
        assert torch.equal(add_noise(*args, backend=backend)[0], add_noise(*args)[0])
    with use_backend("reference"):
        add_noise(*args)
    with pytest.raises(ValueError, match="add_noise: backend 'cuda' cannot run"):
        add_noise(*args, backend="cuda")


X, (A, S) = randn(2, 3), levels(2)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((None, X, A, S), {}, TypeError, "x0: got NoneType, expected a torch.Tensor"),
        ((torch.tensor(1.0), X, A, S), {}, ValueError, "x0: got a scalar"),
        ((X, X[:, :2], A, S), {}, ValueError, r"noise: got shape \(2, 2\), expected \(2, 3\)"),
        ((X, X.half(), A, S), {}, TypeError, "noise: got dtype torch.float16"),
        ((X, X, A[:1], S), {}, ValueError, r"alpha: got shape \(1,\), expected \(2,\)"),
        ((X, X, A.bfloat16(), S), {}, TypeError, "alpha: got dtype torch.bfloat16.*too coarse"),
        ((X, X, A.to("meta"), S), {}, ValueError, "alpha: is on meta, expected cpu"),
        ((X, X, A, S.double()), {}, TypeError, "sigma: got dtype torch.float64, expected torch.float32"),
        ((X, X, A, S), {"prediction": "x0"}, ValueError, "prediction: got 'x0', expected one of epsilon"),
    ],
)
def test_errors_name_the_argument(args, options, error, message):
    with pytest.raises(error, match=message):
        add_noise(*args, **options)
