"""reparameterize: eq. 10, its gradient, dtypes, registration and errors."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from sdfast.dispatch import use_backend
from sdfast.ops import reparameterize


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


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    args = tuple(randn(2, 3, 4, seed=s).requires_grad_(requires_grad) for s in range(3))
    torch.library.opcheck(torch.ops.sdfast.reparameterize.default, args)


def test_compiles_without_a_break():
    args = tuple(randn(2, 3, seed=s) for s in range(3))
    compiled = torch.compile(reparameterize, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*args), reparameterize(*args))


def test_backends():
    args = tuple(randn(2, 3, seed=s) for s in range(3))
    for backend in ("reference", "torch"):
        assert torch.equal(reparameterize(*args, backend=backend), reparameterize(*args))
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
