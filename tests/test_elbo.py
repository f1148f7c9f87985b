"""ELBO, likelihoods, posteriors and the importance-weighted estimate, against Monte Carlo and closed forms."""

import math

import pytest
import torch
from torch import distributions

from sdfast import diffusion
from sdfast.diffusion import DiagonalPosterior, FullPosterior

STANDARD = distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(n, d, seed=7):
    """Lower triangular (n, d, d) with a positive diagonal."""
    a = randn(n, d, d, seed=seed)
    return a.tril(-1) + torch.diag_embed(a.diagonal(dim1=1, dim2=2).abs() + 0.3)


POSTERIORS = {
    "diagonal": lambda n, d: DiagonalPosterior(randn(n, d, seed=1), 0.7 * randn(n, d, seed=2)),
    "full": lambda n, d: FullPosterior(randn(n, d, seed=1), factor(n, d)),
}


@pytest.mark.parametrize("kind", POSTERIORS)
def test_closed_form_kl_equals_monte_carlo(kind):
    """E_q[ln q(z|x) - ln p(z)], within four standard errors; a wrong sign of any term is further away."""
    n, d, draws = 5, 3, 40_000
    q = POSTERIORS[kind](n, d)
    noise = randn(draws, n, d, seed=3)
    many = type(q)(*(part.repeat_interleave(draws, 0) for part in vars(q).values()))
    z = many.sample(noise.transpose(0, 1).reshape(-1, d))
    differences = (many.log_density(z) - STANDARD.log_prob(z).sum(1)).view(n, draws)
    mean, error = differences.mean(1), differences.std(1) / math.sqrt(draws)
    kl = q.kl()
    assert ((kl - mean).abs() < 4 * error).all()
    # The test tells such errors apart: each would put the formula beyond four standard errors.
    squares = 0.5 * (q.mean**2).sum(1)
    log_det = (
        0.5 * q.logvar.sum(1) if kind == "diagonal" else q.cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
    )
    for wrong in (-kl, kl - 2 * squares, kl + 2 * log_det):
        assert ((wrong - mean).abs() > 4 * error).any()


@pytest.mark.parametrize("kind", POSTERIORS)
def test_posteriors_equal_torch_distributions(kind):
    q = POSTERIORS[kind](4, 3)
    if kind == "diagonal":
        theirs = distributions.Independent(distributions.Normal(q.mean, (0.5 * q.logvar).exp()), 1)
        prior = distributions.Independent(distributions.Normal(torch.zeros_like(q.mean), 1.0), 1)
    else:
        theirs = distributions.MultivariateNormal(q.mean, scale_tril=q.cholesky)
        prior = distributions.MultivariateNormal(torch.zeros_like(q.mean), torch.eye(3, dtype=torch.float64))
    z = randn(4, 3, seed=4)
    torch.testing.assert_close(q.log_density(z), theirs.log_prob(z))
    torch.testing.assert_close(q.kl(), distributions.kl_divergence(theirs, prior))


def test_full_covariance_with_a_diagonal_factor_is_the_diagonal_one():
    diagonal = POSTERIORS["diagonal"](4, 3)
    above = torch.triu(randn(4, 3, 3, seed=5), 1)  # is not read
    full = FullPosterior(diagonal.mean, torch.diag_embed((0.5 * diagonal.logvar).exp()) + above)
    noise, z = randn(4, 3, seed=6), randn(4, 3, seed=7)
    torch.testing.assert_close(full.sample(noise), diagonal.sample(noise))
    torch.testing.assert_close(full.log_density(z), diagonal.log_density(z))
    torch.testing.assert_close(full.kl(), diagonal.kl())


@pytest.mark.parametrize("kind", POSTERIORS)
def test_gradients_pass_through_sample_density_and_kl(kind):
    q = POSTERIORS[kind](2, 3)
    noise = randn(2, 3, seed=6)

    def all_of_it(*parts):
        one = type(q)(*parts)
        z = one.sample(noise)
        return z, one.log_density(z), one.kl()

    assert torch.autograd.gradcheck(all_of_it, [part.requires_grad_() for part in vars(q).values()])


def test_posterior_by_the_rank_of_its_spread():
    mean = randn(2, 3)
    assert isinstance(diffusion.as_posterior(mean, mean), DiagonalPosterior)
    assert isinstance(diffusion.as_posterior(mean, factor(2, 3)), FullPosterior)
    with pytest.raises(ValueError, match=r"spread: got shape \(2,\), expected \(N, D\) or \(N, D, D\)"):
        diffusion.as_posterior(mean, mean[:, 0])


@pytest.mark.parametrize("std", [1.0, 0.15])
def test_likelihoods_equal_torch_distributions(std):
    x, decoded = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    expected = distributions.Normal(decoded, std).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(diffusion.log_likelihood(x, decoded, std=std), expected)
    black_and_white = (x > 0).double()
    expected = distributions.Bernoulli(logits=decoded).log_prob(black_and_white).sum((1, 2, 3))
    found = diffusion.log_likelihood(black_and_white, decoded, "bernoulli", std=std)
    torch.testing.assert_close(found, expected)


class LinearGaussian:
    """p(z) = N(0, I), p(x|z) = N(W z, std² I): p(x) = N(0, W Wᵀ + std² I) and p(z|x) are known."""

    def __init__(self, n=6, pixels=4, latents=3, std=0.6):
        self.W, self.std = randn(pixels, latents, seed=11), std
        covariance = self.W @ self.W.T + std**2 * torch.eye(pixels, dtype=torch.float64)
        self.x = randn(n, pixels, seed=12) @ torch.linalg.cholesky(covariance).T
        marginal = distributions.MultivariateNormal(torch.zeros(pixels, dtype=torch.float64), covariance)
        self.evidence = marginal.log_prob(self.x)
        precision = torch.eye(latents, dtype=torch.float64) + self.W.T @ self.W / std**2
        posterior = torch.linalg.inv(precision)
        self.posterior = FullPosterior(
            self.x @ self.W @ posterior / std**2, torch.linalg.cholesky(posterior).expand(n, -1, -1)
        )

    def decode(self, z):
        return z @ self.W.T


def test_importance_weighted_estimate_lies_between_elbo_and_the_evidence():
    model = LinearGaussian()
    draws = 150
    q = DiagonalPosterior(model.posterior.mean + 0.1, torch.full_like(model.posterior.mean, -1.0))
    noise = randn(draws * 16, *q.mean.shape, seed=13)
    bound = diffusion.evidence_lower_bound(model.x, q, model.decode, noise, std=model.std)
    torch.testing.assert_close(bound.total, bound.reconstruction - bound.kl)
    weights = diffusion.log_weights(model.x, q, model.decode, noise, std=model.std)
    # K = 1 is the ELBO, with the KL by Monte Carlo too.
    error = weights.std(0) / math.sqrt(len(weights))
    assert ((weights.mean(0) - bound.total).abs() < 4 * error).all()
    by_sixteen = torch.stack([diffusion.importance_weighted(part) for part in weights.chunk(draws)])
    mean, error = by_sixteen.mean(0), by_sixteen.std(0) / math.sqrt(draws)
    assert (bound.total + 4 * error < mean).all()
    assert (mean < model.evidence + 4 * error).all()
    # p(x|z) p(z) / q(z|x) is an unbiased estimate of p(x).
    ratio = (weights - model.evidence).exp()
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(len(ratio))).all()


def test_the_bound_is_tight_at_the_true_posterior():
    """There ln p(x|z) + ln p(z) - ln q(z|x) is ln p(x) for every z: each part with its constants and signs."""
    model = LinearGaussian()
    noise = randn(3, *model.posterior.mean.shape, seed=14)
    weights = diffusion.log_weights(model.x, model.posterior, model.decode, noise, std=model.std)
    torch.testing.assert_close(weights, model.evidence.expand_as(weights))
    torch.testing.assert_close(diffusion.importance_weighted(weights), model.evidence)
    # The ELBO has its reconstruction from samples; noise ±√D along each axis has their mean and covariance.
    d = noise.shape[-1]
    axes = math.sqrt(d) * torch.cat([torch.eye(d), -torch.eye(d)]).double()
    spread = axes[:, None].expand(-1, len(model.x), -1)
    bound = diffusion.evidence_lower_bound(model.x, model.posterior, model.decode, spread, std=model.std)
    torch.testing.assert_close(bound.total, model.evidence)


def test_importance_weights_that_would_overflow():
    weights = torch.tensor([[-2000.0, 1000.0], [-2001.0, 1000.0]])
    expected = torch.tensor([-2000 + math.log((1 + math.exp(-1)) / 2), 1000.0])
    torch.testing.assert_close(diffusion.importance_weighted(weights), expected)


Q = DiagonalPosterior(randn(2, 3), randn(2, 3))
X = randn(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: diffusion.log_likelihood(X, X, "laplace"),
            "likelihood: got 'laplace', expected one of gaussian",
        ),
        (lambda: diffusion.log_likelihood(X, X[:1]), r"decoded: got shape \(1, 3\), expected \(2, 3\)"),
        (lambda: diffusion.log_likelihood(X, X, std=0.0), "std: got 0.0, expected a number > 0"),
        (
            lambda: diffusion.evidence_lower_bound(X, Q, lambda z: z, X),
            r"noise: got shape \(2, 3\), expected \(K, 2, 3\)",
        ),
        (lambda: diffusion.log_weights(X, Q, lambda z: z, randn(0, 2, 3)), "with K >= 1"),
        (lambda: diffusion.importance_weighted(randn(0, 2)), "weights: got no samples"),
        (
            lambda: diffusion.kl_full_to_standard_normal(X, X),
            r"cholesky: got shape \(2, 3\), expected \(2, 3, 3\)",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
