"""GroupNorm in parts: moments merge to those of the whole image, and each part gets the whole one's formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sdfast import _library
from sdfast.ops import group_norm_apply, group_norm_moments
from sdfast.ops.group_norm_parts import Moments
from sdfast.testing import assert_within_budget

has_kernel = _library.has_kernel("group_norm_moments", "cpu")
needs_kernel = pytest.mark.skipif(not has_kernel, reason=_library.load_cpu_library().detail)
BACKENDS = ("reference", pytest.param("cpu", marks=needs_kernel))


def merged(parts, groups, backend):
    moments = [group_norm_moments(part, groups, backend=backend) for part in parts]
    total = moments[0]
    for more in moments[1:]:
        total = total.merged(more)
    return total


def in_layout(x, layout):
    if layout == "first":
        return x.contiguous()
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return last if layout == "last" else x.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["last", "first", "strided"])
@pytest.mark.parametrize("silu", [True, False])
def test_parts_equal_the_whole(silu, layout, dtype, backend):
    x = (torch.randn(2, 24, 37, 19) * 2 + 30).to(
        dtype
    )  # a mean far from zero cancels where squares are summed
    weight, bias = torch.randn(24).to(dtype), torch.randn(24).to(dtype)
    activation = "silu" if silu else None

    def formula(*arguments):
        z = F.group_norm(arguments[0], 6, *arguments[1:], eps=1e-6)
        return F.silu(z) if silu else z

    parts = [in_layout(part, layout) for part in x.split((1, 20, 3, 13), 2)]
    moments = merged(parts, 6, backend)
    results = [
        group_norm_apply(part, moments, 6, weight, bias, 1e-6, activation=activation, backend=backend)
        for part in parts
    ]
    exact = formula(x.double(), weight.double(), bias.double())
    assert_within_budget(torch.cat(results, 2), formula(x, weight, bias), exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_are_those_of_all_pixels(backend):
    x = torch.randn(3, 8, 5, 70) + 1000
    moments = merged([x[:, :, :1], x[:, :, 1:], x[:, :, :0]], 4, backend)
    grouped = x.double().reshape(3, 4, -1)
    assert moments.count == grouped.shape[2]
    torch.testing.assert_close(moments.mean, grouped.mean(2), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        moments.squares / moments.count, grouped.var(2, correction=0), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_written_where_it_lies(backend):
    x = torch.randn(1, 16, 6, 5).contiguous(memory_format=torch.channels_last)
    moments = group_norm_moments(x, 4, backend=backend)
    whole = torch.full((1, 8, 5, 16), float("nan")).permute(0, 3, 1, 2)
    out = whole[:, :, 1:7]
    assert group_norm_apply(x, moments, 4, out=out, backend=backend) is out
    assert torch.equal(out, group_norm_apply(x, moments, 4, backend=backend))
    assert whole[:, :, :1].isnan().all() and whole[:, :, 7:].isnan().all()


@needs_kernel
def test_registration():
    x, weight = torch.randn(2, 8, 3, 5), torch.randn(8)
    torch.library.opcheck(torch.ops.sdfast.group_norm_moments.default, (x, 4))
    moments = group_norm_moments(x, 4)
    arguments = (x, moments.mean, moments.rstd(1e-5), 4, weight, None, True, torch.empty_like(x))
    torch.library.opcheck(torch.ops.sdfast.group_norm_apply_out.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_image_and_nan(backend):
    constant = torch.full((1, 4, 3, 3), 7.1)
    moments = group_norm_moments(constant, 2, backend=backend)
    assert (moments.squares / moments.count < 1e-12).all() and (moments.squares >= -1e-9).all()
    constant[0, 3, 1, 1] = float("nan")
    moments = group_norm_moments(constant, 2, backend=backend)
    assert moments.mean[0, 1].isnan() and not moments.mean[0, 0].isnan()


def test_argument_errors():
    x = torch.randn(1, 8, 3, 3)
    moments = group_norm_moments(x, 4)
    with pytest.raises(ValueError, match=r"x: got shape \(1, 8\), expected \(N, C, \*\)"):
        group_norm_moments(x[:, :, 0, 0], 4)
    with pytest.raises(ValueError, match="num_groups: got 3, expected a divisor of the 8 channels"):
        group_norm_moments(x, 3)
    for keywords, error, message in (
        ({"activation": "relu"}, ValueError, "activation: got 'relu', expected None or 'silu'"),
        ({"weight": torch.ones(7)}, ValueError, r"weight: got shape \(7,\), expected \(8,\)"),
        ({"out": torch.empty(1, 8, 3, 4)}, ValueError, r"out: got shape \(1, 8, 3, 4\)"),
        (
            {"out": torch.empty(1, 8, 3, 6)[..., ::2]},
            ValueError,
            "out: got strides .* expected a dense tensor",
        ),
        ({"out": torch.empty(1, 8, 3, 3).half()}, TypeError, "out: got dtype torch.float16"),
    ):
        with pytest.raises(error, match=message):
            group_norm_apply(x, moments, 4, **keywords)
    with pytest.raises(ValueError, match=r"moments.mean: got shape \(1, 4\), expected \(1, 2\)"):
        group_norm_apply(x, moments, 2)
    with pytest.raises(ValueError, match="cannot run: x is float64"):
        group_norm_moments(x.double(), 4, backend="cpu")


def test_no_pixels():
    empty = torch.empty(2, 8, 0, 3)
    moments = group_norm_moments(empty, 4)
    assert moments.count == 0 and moments.mean.shape == (2, 4)
    assert group_norm_apply(empty, moments, 4).shape == empty.shape
    assert isinstance(moments.merged(moments), Moments)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_no_images(backend):
    empty = torch.empty(0, 4, 3)
    moments = group_norm_moments(empty, 2, backend=backend)
    assert moments.count == 6 and moments.mean.shape == moments.squares.shape == (0, 2)
    assert group_norm_apply(empty, moments, 2, backend=backend).shape == empty.shape
