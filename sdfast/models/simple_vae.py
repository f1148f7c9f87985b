"""The VAE of §2.5: fully connected layers, or convolutions with max-pooling and upsampling.

    encoder  x -> h -> μ_φ(x) and the spread of q_φ(z|x): log-variances, or a Cholesky factor L (§2.4)
    decoder  z -> h -> the mean of x (Gaussian likelihood), or its logits (Bernoulli)

The log-variance, not the variance, is what the network outputs: exp keeps it positive. L's diagonal comes of
log-variances too, so that a full covariance without its off-diagonal entries is the diagonal one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sdfast.models.layers import Conv2d, Linear, Upsample2D
from sdfast.ops.reparameterize import LOGVAR_RANGE

KINDS = ("fc", "conv")
COVARIANCES = ("diagonal", "full")
_WIDTHS = {"fc": 256, "conv": 32}
_HALVINGS = 2  # of the convolutional form


@dataclasses.dataclass(frozen=True)
class SimpleVAEConfig:
    """Settings of `SimpleVAE`, its config.json.

    Attributes:
        kind: "fc" or "conv".
        covariance: of q(z|x), "diagonal" or "full".
        likelihood: p(x|z), "gaussian" or "bernoulli": what the decoder was trained for.
        std: σ of the Gaussian likelihood.
        latent_dim: D, the numbers in z.
        image_size, channels: of x; "conv" needs an image_size that 4 divides.
        width: units of each hidden layer ("fc"), or channels of the first convolution, twice as many of the
            second ("conv"); 0 takes 256 or 32.
    """

    kind: str = "fc"
    covariance: str = "diagonal"
    likelihood: str = "bernoulli"
    std: float = 1.0
    latent_dim: int = 2
    image_size: int = 8
    channels: int = 1
    width: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("kind", KINDS),
            ("covariance", COVARIANCES),
            ("likelihood", ("gaussian", "bernoulli")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        for name in ("latent_dim", "image_size", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.width < 0:
            raise ValueError(f"width: got {self.width}, expected at least 0")
        if not self.std > 0:
            raise ValueError(f"std: got {self.std}, expected a number > 0")
        if self.kind == "conv" and self.image_size % 2**_HALVINGS:
            raise ValueError(f"image_size: got {self.image_size}, expected a multiple of {2**_HALVINGS}")


class SimpleVAE(nn.Module):
    """Encoder and decoder. `sdfast.diffusion.as_posterior` and `evidence_lower_bound` do the rest."""

    config_class = SimpleVAEConfig
    fixed_config: Mapping[str, object] = {"model_type": "simple_vae"}

    def __init__(self, config: SimpleVAEConfig) -> None:
        super().__init__()
        self.config = config
        make = _fully_connected if config.kind == "fc" else _convolutional
        self.encoder, self.decoder = make(config, config.width or _WIDTHS[config.kind])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and spread of q_φ(z|x).

        Args:
            x: (N, channels, image_size, image_size).

        Returns:
            mean (N, D), and the log-variances (N, D) or for a full covariance L (N, D, D), lower triangular
            with a positive diagonal.
        """
        D = self.config.latent_dim
        h = self.encoder(x)
        mean, logvar = h[:, :D], h[:, D : 2 * D]
        if self.config.covariance == "diagonal":
            return mean, logvar
        rows, columns = torch.tril_indices(D, D, offset=-1, device=x.device)
        std = torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE))
        cholesky = torch.diag_embed(std).index_put(
            (torch.arange(len(x), device=x.device)[:, None], rows, columns), h[:, 2 * D :]
        )
        return mean, cholesky

    def decode(self, z: Tensor) -> Tensor:
        """(N, D) -> (N, channels, image_size, image_size): means, or logits for "bernoulli"."""
        shape = (self.config.channels, self.config.image_size, self.config.image_size)
        return self.decoder(z).unflatten(1, shape) if self.config.kind == "fc" else self.decoder(z)

    def picture(self, z: Tensor) -> Tensor:
        """The mean of p(x|z) as a picture: `decode` in [0, 1]."""
        x = self.decode(z)
        return x.sigmoid() if self.config.likelihood == "bernoulli" else x.clamp(0, 1)


def _outputs(config: SimpleVAEConfig) -> int:
    """How many numbers the encoder gives for one picture."""
    D = config.latent_dim
    return 2 * D if config.covariance == "diagonal" else 2 * D + D * (D - 1) // 2


def _fully_connected(config: SimpleVAEConfig, width: int) -> tuple[nn.Module, nn.Module]:
    pixels = config.channels * config.image_size**2

    def network(inputs: int, outputs: int) -> list[nn.Module]:
        hidden = [Linear(inputs, width), nn.SiLU(), Linear(width, width), nn.SiLU()]
        return [*hidden, Linear(width, outputs)]

    encoder = nn.Sequential(nn.Flatten(), *network(pixels, _outputs(config)))
    return encoder, nn.Sequential(*network(config.latent_dim, pixels))


def _convolutional(config: SimpleVAEConfig, width: int) -> tuple[nn.Module, nn.Module]:
    wide, small = 2 * width, config.image_size // 2**_HALVINGS
    encoder = nn.Sequential(
        Conv2d(config.channels, width, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2),
        Conv2d(width, wide, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2),
        Conv2d(wide, wide, 3, padding=1), nn.SiLU(),
        nn.Flatten(), Linear(wide * small**2, _outputs(config)),
    )  # fmt: skip
    decoder = nn.Sequential(
        Linear(config.latent_dim, wide * small**2), nn.SiLU(), nn.Unflatten(1, (wide, small, small)),
        Upsample2D(wide), nn.SiLU(),
        Conv2d(wide, width, 3, padding=1), nn.SiLU(),
        Upsample2D(width), nn.SiLU(),
        Conv2d(width, config.channels, 3, padding=1),
    )  # fmt: skip
    return encoder, decoder
