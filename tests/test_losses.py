"""Losses and Gaussians against torch.distributions, Monte-Carlo estimates and each other."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import distributions

from sdfast import diffusion
from sdfast.diffusion import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normal(mean, logvar):
    return distributions.Normal(mean, (0.5 * logvar).exp())


# Gaussians


def test_gaussian_kl_equals_torch_distributions():
    q_mean, q_logvar, p_mean, p_logvar = (randn(3, 4, 5, seed=s) for s in range(4))
    expected = distributions.kl_divergence(normal(q_mean, q_logvar), normal(p_mean, p_logvar)).sum((1, 2))
    torch.testing.assert_close(diffusion.gaussian_kl(q_mean, q_logvar, p_mean, p_logvar), expected)
    one = torch.zeros(1, dtype=torch.float64)
    broadcast = diffusion.gaussian_kl(q_mean, q_logvar[:, :1, :1], one, one)
    expected = distributions.kl_divergence(
        normal(q_mean, q_logvar[:, :1, :1].expand_as(q_mean)), distributions.Normal(0, 1)
    )
    torch.testing.assert_close(broadcast, expected.sum((1, 2)))


def test_kl_to_standard_normal():
    mean, logvar = randn(3, 4, 2), randn(3, 4, 2, seed=1)
    kl = diffusion.kl_to_standard_normal(mean, logvar)
    zero = torch.zeros_like(mean)
    torch.testing.assert_close(kl, diffusion.gaussian_kl(mean, logvar, zero, zero))
    assert diffusion.kl_to_standard_normal(zero, zero).abs().max() == 0
    # Eq. 9 with its one shared σ, but for the constant -N/2.
    shared = torch.full_like(logvar, -0.7)
    sigma = math.exp(-0.35)
    printed = 0.5 * (8 * sigma**2 + (mean**2).sum((1, 2)) - 2 * 8 * math.log(sigma))
    torch.testing.assert_close(diffusion.kl_to_standard_normal(mean, shared), printed - 8 / 2)


def test_kl_survives_an_extreme_logvar():
    logvar = torch.tensor([[1e4, -1e4]], requires_grad=True)
    kl = diffusion.kl_to_standard_normal(torch.zeros(1, 2), logvar)
    kl.sum().backward()
    assert kl.isfinite().all() and logvar.grad.isfinite().all()


def test_log_density():
    z, mean, logvar = (randn(3, 2, 4, seed=s) for s in range(3))
    expected = normal(mean, logvar).log_prob(z).sum((1, 2))
    torch.testing.assert_close(diffusion.log_density(z, mean, logvar), expected)


def full_covariance(n=3, d=4):
    a = randn(n, d, d, seed=5)
    return a @ a.mT + 0.5 * torch.eye(d, dtype=torch.float64)


def test_full_covariance_density():
    covariance = full_covariance()
    cholesky = torch.linalg.cholesky(covariance)
    mean, z = randn(3, 4), randn(3, 4, seed=1)
    expected = distributions.MultivariateNormal(mean, covariance).log_prob(z)
    torch.testing.assert_close(diffusion.log_density_full(z, mean, cholesky), expected)
    diagonal = torch.diag_embed(torch.full((3, 4), math.exp(0.3), dtype=torch.float64))
    torch.testing.assert_close(
        diffusion.log_density_full(z, mean, diagonal),
        diffusion.log_density(z, mean, torch.full((3, 4), 0.6, dtype=torch.float64)),
    )


def test_full_covariance_sample():
    covariance = full_covariance(1, 3)
    cholesky = torch.linalg.cholesky(covariance)
    n = 200_000
    mean = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    z = diffusion.sample_full(mean.expand(n, 3), cholesky.expand(n, 3, 3), randn(n, 3))
    assert (z.mean(0) - mean[0]).abs().max() < 5 * covariance.max().sqrt() / math.sqrt(n)
    torch.testing.assert_close(z.T.cov(), covariance[0], rtol=0.03, atol=0.05)
    # ε comes back: the density of the sample is that of its noise, less ln |det L|.
    noise = randn(5, 3, seed=3)
    z = diffusion.sample_full(mean.expand(5, 3), cholesky.expand(5, 3, 3), noise)
    expected = distributions.Normal(0, 1).log_prob(noise).sum(1) - torch.logdet(cholesky)
    torch.testing.assert_close(
        diffusion.log_density_full(z, mean.expand(5, 3), cholesky.expand(5, 3, 3)), expected
    )


def test_full_covariance_gradients():
    mean, noise = randn(2, 3).requires_grad_(), randn(2, 3, seed=1).requires_grad_()
    cholesky = torch.linalg.cholesky(full_covariance(2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(diffusion.sample_full, (mean, cholesky, noise))
    assert torch.autograd.gradcheck(diffusion.log_density_full, (noise, mean, cholesky))


# Diffusion


def test_simple_loss():
    output, target = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    torch.testing.assert_close(diffusion.simple_loss(output, target), ((output - target) ** 2).mean())


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_weighted_loss_is_equation_23(variance):
    t = torch.tensor([1, 50, 400, 999])
    epsilon, predicted = randn(4, 3, 2), randn(4, 3, 2, seed=1)
    total = 0.0
    for i, step in enumerate(t.tolist()):
        beta, alpha, rest = SCHEDULE.betas[step], SCHEDULE.alphas[step], 1 - SCHEDULE.alphas_cumprod[step]
        small = (1 - SCHEDULE.alphas_cumprod[step - 1]) / rest * beta
        sigma2 = beta if variance == "fixed_large" else small
        total += beta**2 / (2 * sigma2 * alpha * rest) * ((epsilon[i] - predicted[i]) ** 2).sum()
    loss = diffusion.weighted_loss(SCHEDULE, t, predicted, epsilon, variance=variance)
    torch.testing.assert_close(loss, total / epsilon.numel())


def test_weighted_loss_is_the_transition_term():
    """With σ² = β̃ the two Gaussians of L_{t-1} have one variance, so that C of eq. 19 is 0."""
    t = torch.tensor([1, 50, 400, 999])
    x0, epsilon, predicted = (randn(4, 3, 2, seed=s) for s in range(3))
    x_t = SCHEDULE.q_sample(x0, t, epsilon)
    term = diffusion.transition_term(SCHEDULE, x0, x_t, t, predicted, variance="fixed_small")
    loss = diffusion.weighted_loss(SCHEDULE, t, predicted, epsilon, variance="fixed_small")
    torch.testing.assert_close(term.mean() / 6, loss, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_transition_term_by_monte_carlo(variance, prediction):
    """E_q[ln q(x_{t-1}|x_t, x_0) - ln p(x_{t-1}|x_t)], by drawing x_{t-1}."""
    t = torch.tensor([30])
    x0, epsilon = 0.5 * randn(1, 4), randn(1, 4, seed=1)
    x_t, target = SCHEDULE.training_pair(x0, t, epsilon, prediction=prediction)
    output = target + 0.1
    mean, true_variance = SCHEDULE.q_posterior(x0, x_t, t)
    q = distributions.Normal(mean, true_variance.sqrt())
    guess = SCHEDULE.convert(output, x_t, t, to="sample", prediction=prediction)
    model_mean = SCHEDULE.q_posterior(guess, x_t, t)[0]
    p = distributions.Normal(model_mean, SCHEDULE.model_variance(variance)[t].sqrt())
    torch.manual_seed(0)
    draws = q.sample((200_000,))
    estimate = (q.log_prob(draws) - p.log_prob(draws)).sum((1, 2))
    term = diffusion.transition_term(SCHEDULE, x0, x_t, t, output, variance=variance, prediction=prediction)
    assert abs(term.item() - estimate.mean()) < 5 * estimate.std() / math.sqrt(len(estimate)) + 1e-9


def test_prior_term():
    x0 = randn(3, 4, 2).clamp(-1, 1)
    alpha_bar = SCHEDULE.alphas_cumprod[-1]
    q = distributions.Normal(alpha_bar.sqrt() * x0, (1 - alpha_bar).sqrt())
    expected = distributions.kl_divergence(q, distributions.Normal(0.0, 1.0)).sum((1, 2))
    torch.testing.assert_close(diffusion.prior_term(SCHEDULE, x0), expected)
    assert diffusion.prior_term(SCHEDULE, x0).max() < 1e-3  # §3.2.1: nothing is left of x_0


def grey_levels(n=256):
    return torch.arange(n, dtype=torch.float64) / 127.5 - 1


@pytest.mark.parametrize("mean", [-1.3, -0.2, 0.0, 0.999, 1.1])
def test_reconstruction_term_is_a_distribution(mean):
    """Over the 256 grey values the probabilities add up to 1, whatever the decoder's mean."""
    x0 = grey_levels().view(256, 1)
    x_1 = torch.zeros_like(x0)
    output = torch.full_like(x0, mean)
    nats = diffusion.reconstruction_term(SCHEDULE, x0, x_1, output, prediction="sample")
    torch.testing.assert_close((-nats).exp().sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_reconstruction_term_by_distribution_functions(variance):
    x0 = grey_levels()[[0, 3, 100, 128, 250, 255]].view(1, -1)
    mean = x0 + 0.02 * randn(1, 6)
    std = SCHEDULE.model_variance(variance)[0].sqrt()
    cdf = distributions.Normal(mean, std).cdf
    above = torch.where(x0 > 0.999, torch.ones_like(x0), cdf(x0 + 1 / 255))
    below = torch.where(x0 < -0.999, torch.zeros_like(x0), cdf(x0 - 1 / 255))
    expected = -(above - below).log().sum(1)
    nats = diffusion.reconstruction_term(
        SCHEDULE, x0, torch.zeros_like(x0), mean, variance=variance, prediction="sample"
    )
    torch.testing.assert_close(nats, expected, rtol=1e-6, atol=1e-6)


def test_reconstruction_term_far_off_is_finite_and_pulls_back():
    x0 = grey_levels()[[0, 128, 255]].view(1, -1).float()
    output = -x0.clone() + torch.tensor([[0.0, 1.0, 0.0]])
    output.requires_grad_()
    nats = diffusion.reconstruction_term(SCHEDULE, x0, torch.zeros_like(x0), output, prediction="sample")
    nats.sum().backward()
    assert nats.isfinite().all() and nats.item() > 1000
    assert torch.equal(output.grad.sign(), (output - x0).detach().sign())


def test_reconstruction_term_gradcheck():
    x0 = grey_levels()[[0, 3, 128, 255]].view(1, -1)
    output = (x0 + 0.01 * randn(1, 4)).requires_grad_()
    x_1 = torch.zeros_like(x0)
    assert torch.autograd.gradcheck(
        lambda o: diffusion.reconstruction_term(SCHEDULE, x0, x_1, o, prediction="sample"), (output,)
    )


def test_the_bound_bounds():
    """For Gaussian data the best model is known: its L of eq. 16 exceeds the entropy, and by little."""
    schedule = NoiseSchedule.linear(T=40, beta_start=3e-3, beta_end=0.4)
    std, n = 0.3, 3000
    x0 = ((std * randn(n, 1) + 1) * 127.5).round() / 127.5 - 1
    total = diffusion.prior_term(schedule, x0)
    for step in range(schedule.T):
        t = torch.full((n,), step)
        x_t = schedule.q_sample(x0, t, randn(n, 1, seed=step + 1))
        alpha, sigma = schedule.alpha_sigma(step)
        guess = alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x_t  # E[x_0 | x_t]
        if step == 0:
            term = diffusion.reconstruction_term(schedule, x0, x_t, guess, prediction="sample")
        else:
            term = diffusion.transition_term(schedule, x0, x_t, t, guess, prediction="sample")
        total = total + term
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2) - math.log(2 / 255)
    error = 4 * total.std().item() / math.sqrt(n)
    assert entropy - error < total.mean().item() < entropy + 0.1 + error


# VAE


def test_gaussian_vae_loss_is_equation_9():
    x, output = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    mean, logvar = randn(3, 5, seed=2), randn(3, 5, seed=3)
    loss = diffusion.vae_loss(x, output, mean, logvar)
    log_likelihood = distributions.Normal(output, 1.0).log_prob(x).sum((1, 2)) + 4 * math.log(2 * math.pi)
    kl = distributions.kl_divergence(normal(mean, logvar), distributions.Normal(0, 1)).sum(1)
    torch.testing.assert_close(loss.reconstruction, -log_likelihood.mean())
    torch.testing.assert_close(loss.kl, kl.mean())
    torch.testing.assert_close(loss.total, (kl - log_likelihood).mean())
    weighted = diffusion.vae_loss(x, output, mean, logvar, kl_weight=0.25)
    torch.testing.assert_close(weighted.total, loss.reconstruction + 0.25 * loss.kl)


def test_bernoulli_vae_loss():
    x, logits = torch.rand(3, 2, 4).round().double(), randn(3, 2, 4)
    mean, logvar = randn(3, 5, seed=2), randn(3, 5, seed=3)
    loss = diffusion.vae_loss(x, logits, mean, logvar, likelihood="bernoulli")
    expected = -distributions.Bernoulli(logits=logits).log_prob(x).sum((1, 2)).mean()
    torch.testing.assert_close(loss.reconstruction, expected)


def test_elbo_by_monte_carlo():
    """For a linear Gaussian decoder ln p(x) is known; the bound is tight at the true posterior (eq. 6)."""
    w, x = 0.8, 1.3
    posterior_variance = 1 / (1 + w**2)
    mean = torch.full((1, 1), posterior_variance * w * x, dtype=torch.float64)
    logvar = torch.full((1, 1), math.log(posterior_variance), dtype=torch.float64)
    evidence = distributions.Normal(0.0, math.sqrt(1 + w**2)).log_prob(torch.tensor(x)).item()

    def bound(mean, logvar, n=100_000):
        z = mean + (0.5 * logvar).exp() * randn(n, 1)
        data = torch.full((n, 1), x, dtype=torch.float64)
        loss = diffusion.vae_loss(data, w * z, mean.expand(n, 1), logvar.expand(n, 1))
        return -loss.total.item() - 0.5 * math.log(2 * math.pi)

    assert bound(mean, logvar) == pytest.approx(evidence, abs=0.01)
    assert bound(mean + 0.5, logvar + 0.5) < evidence - 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    a, b, mean, logvar = (randn(2, 300, seed=s).to(dtype) for s in range(4))
    wide = [v.float() for v in (a, b, mean, logvar)]
    loss = diffusion.simple_loss(a, b)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.mse_loss(*wide[:2]))
    assert torch.equal(diffusion.vae_loss(a, b, mean, logvar).total, diffusion.vae_loss(*wide).total)
    t = torch.tensor([3, 900])
    for x, y in ((a, b), wide[:2]):
        assert diffusion.weighted_loss(SCHEDULE, t, x, y).dtype == torch.float32
    assert torch.equal(
        diffusion.transition_term(SCHEDULE, a, b, t, mean),
        diffusion.transition_term(SCHEDULE, *wide[:2], t, wide[2]),
    )


def test_gradients_reach_the_model():
    t = torch.tensor([3, 900])
    x0, epsilon, output = (randn(2, 3, seed=s) for s in range(3))
    output.requires_grad_()
    assert torch.autograd.gradcheck(lambda o: diffusion.weighted_loss(SCHEDULE, t, o, epsilon), (output,))
    x_t = SCHEDULE.q_sample(x0, t, epsilon)
    assert torch.autograd.gradcheck(
        lambda o: diffusion.transition_term(SCHEDULE, x0, x_t, t, o), (output,), atol=1e-4
    )


X, T2 = randn(2, 3), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diffusion.simple_loss(X, X[:1]), r"target: got shape \(1, 3\), expected \(2, 3\)"),
        (lambda: diffusion.weighted_loss(SCHEDULE, T2, X, X[:, :1]), "noise: got shape"),
        (lambda: diffusion.weighted_loss(SCHEDULE, T2, X, X, variance="small"), "variance: got 'small'"),
        (
            lambda: diffusion.transition_term(SCHEDULE, X, X, T2 - 1, X),
            "t: got index 0, expected indices >= 1",
        ),
        (lambda: diffusion.transition_term(SCHEDULE, X, X, T2, X, prediction="x"), "prediction: got 'x'"),
        (lambda: diffusion.vae_loss(X, X[:1], X, X), "reconstruction: got shape"),
        (lambda: diffusion.vae_loss(X, X, X[:1], X[:1]), r"mean: got a batch of \(1,\), expected 2 as x"),
        (lambda: diffusion.vae_loss(X, X, X, X, kl_weight=-1), "kl_weight: got -1"),
        (lambda: diffusion.vae_loss(X, X, X, X, likelihood="laplace"), "likelihood: got 'laplace'"),
        (lambda: diffusion.sample_full(X, X, X), r"cholesky: got shape \(2, 3\), expected \(2, 3, 3\)"),
        (lambda: diffusion.log_density(X, X, X[:1]), "logvar: got shape"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
