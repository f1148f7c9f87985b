"""The operations a latent diffusion model spends its time in. Each has a file of its own name."""

from sdfast import _library
from sdfast.ops.add_noise import add_noise
from sdfast.ops.attention import attention
from sdfast.ops.conv2d import NormPrologue, conv2d, reads_skip
from sdfast.ops.diffusion_step import diffusion_step
from sdfast.ops.diffusion_step_from_table import diffusion_step_from_table
from sdfast.ops.group_norm import group_norm
from sdfast.ops.group_norm_parts import Moments, group_norm_apply, group_norm_moments
from sdfast.ops.layer_norm import layer_norm
from sdfast.ops.linear import linear
from sdfast.ops.reparameterize import reparameterize

_library.load_cpu_library()  # after the schemas: kernels register under them
_library.load_cuda_library()

__all__ = [
    "Moments",
    "NormPrologue",
    "add_noise",
    "attention",
    "conv2d",
    "diffusion_step",
    "diffusion_step_from_table",
    "group_norm",
    "group_norm_apply",
    "group_norm_moments",
    "layer_norm",
    "linear",
    "reads_skip",
    "reparameterize",
]
