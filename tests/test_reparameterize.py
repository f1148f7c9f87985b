"""reparameterize: eq. 10, its gradient, dtypes, registration and errors."""

import math

import hypothesis
import pytest
import torch
from elementwise import check_layouts, check_non_finite, check_results, check_shapes, check_threads
from hypothesis import strategies as st
from processes import run_with_library

from sdfast import _library
from sdfast.dispatch import use_backend
from sdfast.ops import reparameterize

needs_kernel = pytest.mark.skipif(
    not _library.has_kernel("reparameterize", "cpu"), reason=_library.load_cpu_library().detail
)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_formula(dtype):
    mean, logvar, noise = (randn(2, 4, 3, 5, seed=s, dtype=dtype) for s in range(3))
    z = reparameterize(mean, logvar, noise)
    expected = mean.double() + (0.5 * logvar.double()).exp() * noise.double()
    assert z.dtype == dtype
    assert ((z - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-6).all()
    wide = reparameterize(mean.float(), logvar.float(), noise.float())
    if dtype != torch.float64:
        assert torch.equal(z, wide.to(dtype))  # fp32 arithmetic, rounded once


def test_moments():
    n = 200_000
    mean, logvar = torch.full((n,), 0.3), torch.full((n,), -1.2)
    z = reparameterize(mean, logvar, randn(n))
    std = math.exp(-0.6)
    assert abs(z.mean() - 0.3) < 5 * std / math.sqrt(n)
    assert abs(z.std() / std - 1) < 5 / math.sqrt(2 * n)


def test_extreme_logvar_is_clamped():
    logvar = torch.tensor([-1e4, -30.0, 20.0, 1e4], requires_grad=True)
    z = reparameterize(torch.zeros(4), logvar, torch.ones(4))
    torch.testing.assert_close(z, torch.tensor([-15.0, -15, 10, 10]).exp())
    z.sum().backward()
    assert logvar.grad[0] == logvar.grad[3] == 0
    assert logvar.grad.isfinite().all()


def test_gradients_by_hand():
    mean, logvar, noise = (randn(3, 4, seed=s).requires_grad_() for s in range(3))
    upstream = randn(3, 4, seed=3)
    reparameterize(mean, logvar, noise).backward(upstream)
    std = (0.5 * logvar).exp().detach()
    assert torch.equal(mean.grad, upstream)
    torch.testing.assert_close(logvar.grad, 0.5 * upstream * std * noise.detach())
    torch.testing.assert_close(noise.grad, upstream * std)


def test_gradcheck():
    assert torch.autograd.gradcheck(
        reparameterize, tuple(randn(2, 3, seed=s, dtype=torch.float64).requires_grad_() for s in range(3))
    )


@hypothesis.given(shape=st.lists(st.integers(0, 6), max_size=5), step=st.integers(1, 3))
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_shape_and_stride(shape, step):
    wide = [s * step for s in shape]
    mean = randn(*wide)[tuple(slice(None, None, step) for _ in shape)]
    logvar = randn(*reversed(shape), seed=1).permute(tuple(reversed(range(len(shape)))))
    noise = randn(*shape, seed=2)
    z = reparameterize(mean, logvar, noise)
    assert z.shape == mean.shape
    torch.testing.assert_close(z, mean + (0.5 * logvar).exp() * noise, rtol=1e-5, atol=1e-6)


def native_calls():
    """Calls for `elementwise`, each with what makes their tensors: mean, logvar, noise, and dz for the gradient."""

    def make(shape, dtype, count=3):
        return [randn(*shape, seed=i, dtype=dtype) * (1 if i != 1 else 3) for i in range(count)]

    def forward(tensors, backend):
        return [reparameterize(*tensors, backend=backend)]

    def backward(tensors, backend):
        mean, logvar, noise, dz = tensors
        leaves = mean.detach().requires_grad_(), logvar.detach().requires_grad_()
        dmean, dlogvar = torch.autograd.grad(reparameterize(*leaves, noise, backend=backend), leaves, dz)
        assert torch.equal(dmean, dz) or dz.isnan().any()
        return [dlogvar]

    return [(forward, make), (backward, lambda shape, dtype: make(shape, dtype, 4))]


@needs_kernel
@pytest.mark.parametrize(
    "check", [check_shapes, check_layouts, check_non_finite, check_threads], ids=lambda check: check.__name__
)
def test_kernel(check):
    for call, make in native_calls():
        if check is check_layouts:  # results lie as the first tensor does, a gradient as its own input

            def lying_as_logvar(tensors, backend, call=call):
                order = (0, 1, 2) if len(tensors) == 3 else (1, 0, 2, 3)
                return call([tensors[i] for i in order], backend)

            check(lying_as_logvar, make)
        else:
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
        import test_reparameterize as t
        for check in (t.check_shapes, t.check_layouts, t.check_non_finite, t.check_threads):
            t.test_kernel(check)
        t.test_kernel_clamps_as_torch_does()
        """,
    )


@needs_kernel
def test_kernel_clamps_as_torch_does():
    """At the bounds the gradient passes, beyond them it is zero."""
    values = [-1e4, -30.001, -30.0, -29.9, 0.0, 19.9, 20.0, 20.001, 1e4, float("inf"), -float("inf")]
    for dtype in (torch.float32, torch.bfloat16):
        logvar = torch.tensor(values, dtype=dtype).repeat(3).requires_grad_()
        results = []
        for backend in ("cpu", "torch"):
            z = reparameterize(torch.zeros_like(logvar), logvar, torch.ones_like(logvar), backend=backend)
            results.append((z, *torch.autograd.grad(z.sum(), logvar)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
            assert torch.equal(actual == 0, expected == 0)


@needs_kernel
def test_opcheck():
    image = randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for x in (randn(2, 3, 4), image, randn(2, 8, 3, 4)[:, :4], randn(2, 3, 8)[..., ::2], randn()):
        for op in (torch.ops.sdfast.reparameterize, torch.ops.sdfast.reparameterize_backward):
            torch.library.opcheck(op.default, (x, x, x))


@needs_kernel
def test_what_is_unsafe_is_refused_by_the_operation_itself():
    x = randn(2, 3)
    for op in (torch.ops.sdfast.reparameterize, torch.ops.sdfast.reparameterize_backward):
        for args in [(x, x[:1], x), (x, x, x[0]), (x, x.half(), x), (x.double(),) * 3]:
            with pytest.raises(RuntimeError):
                op(*args)


def test_compiles_without_a_break():
    args = tuple(randn(2, 3, seed=s) for s in range(3))
    compiled = torch.compile(reparameterize, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*args), reparameterize(*args))


def test_backends():
    args = tuple(randn(2, 3, seed=s) for s in range(3))
    for backend in ("reference", "torch"):
        torch.testing.assert_close(reparameterize(*args, backend=backend), reparameterize(*args))
    with use_backend("reference"):
        reparameterize(*args)
    with pytest.raises(ValueError, match="reparameterize: backend 'cuda' cannot run"):
        reparameterize(*args, backend="cuda")


X = randn(2, 3)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((1.0, X, X), TypeError, "mean: got float, expected a torch.Tensor"),
        ((X.long(), X, X), TypeError, "mean: got dtype torch.int64"),
        ((X, X[:1], X), ValueError, r"logvar: got shape \(1, 3\), expected \(2, 3\)"),
        ((X, X.double(), X), TypeError, "logvar: got dtype torch.float64, expected torch.float32"),
        ((X, X, X[0]), ValueError, r"noise: got shape \(3,\), expected \(2, 3\)"),
        ((X, X, X.to("meta")), ValueError, "noise: is on meta, expected cpu"),
    ],
)
def test_errors_name_the_argument(args, error, message):
    with pytest.raises(error, match=message):
        reparameterize(*args)
