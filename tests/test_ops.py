"""conv2d, linear and attention: backends against fp64, registration, gradients, argument errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdfast import dispatch, ops
from sdfast.testing import assert_within_budget

SAMPLE_ARGUMENTS = {
    "conv2d": (
        lambda make: (make(2, 4, 5, 6), make(6, 4, 3, 3), make(6)),
        {"padding": (1, 1, 1, 1)},
    ),
    "linear": (lambda make: (make(2, 3, 8), make(6, 8), make(6)), {"activation": "geglu"}),
    "attention": (lambda make: (make(2, 3, 5, 8), make(2, 3, 7, 8), make(2, 3, 7, 8)), {}),
}
BACKENDS = ("reference", "torch")


def arguments(name, dtype=torch.float64, requires_grad=False):
    torch.manual_seed(0)
    make, keywords = SAMPLE_ARGUMENTS[name]
    return make(lambda *shape: torch.randn(shape, dtype=dtype, requires_grad=requires_grad)), keywords


@pytest.mark.parametrize("name", SAMPLE_ARGUMENTS)
def test_opcheck(name):
    args, keywords = arguments(name, torch.float32, requires_grad=True)
    torch.library.opcheck(getattr(torch.ops.sdfast, name).default, args, keywords)


@pytest.mark.parametrize("name", SAMPLE_ARGUMENTS)
def test_shapes_alone(name):
    """On meta tensors, of which torch knows no autocast."""
    args, keywords = arguments(name, torch.float32)
    result = getattr(ops, name)(*(a.to("meta") for a in args), **keywords)
    expected = getattr(ops, name)(*args, **keywords)
    assert result.device.type == "meta" and result.shape == expected.shape
    with pytest.raises(TypeError, match="got dtype torch.float64, expected torch.float32"):
        getattr(ops, name)(args[0].to("meta"), *(a.to("meta", torch.float64) for a in args[1:]), **keywords)


@pytest.mark.parametrize("name", SAMPLE_ARGUMENTS)
def test_registered_operation_equals_the_reference(name):
    args, keywords = arguments(name)
    expected = getattr(ops, name)(*args, **keywords, backend="reference")
    assert torch.equal(getattr(torch.ops.sdfast, name)(*args, **keywords), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SAMPLE_ARGUMENTS)
def test_gradcheck(name, backend):
    args, keywords = arguments(name, requires_grad=True)
    function = getattr(ops, name)
    assert torch.autograd.gradcheck(lambda *a: function(*a, **keywords, backend=backend), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SAMPLE_ARGUMENTS)
def test_error_is_within_budget(name, backend, dtype):
    args, keywords = arguments(name, dtype)
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    function = getattr(ops, name)
    actual = function(*args, **keywords, backend=backend)
    assert actual.dtype == dtype
    eager = getattr(torch.ops.sdfast, name)(*args, **keywords)
    assert_within_budget(actual, eager, function(*wide, **keywords, backend="reference"))


@pytest.mark.parametrize("name", SAMPLE_ARGUMENTS)
def test_compiles_whole(name):
    args, keywords = arguments(name, torch.float32)
    function = getattr(ops, name)
    compiled = torch.compile(lambda *a: function(*a, **keywords), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), function(*args, **keywords))


@pytest.mark.parametrize("name", SAMPLE_ARGUMENTS)
def test_named_backend_that_cannot_run_says_why(name):
    args, keywords = arguments(name)
    with pytest.raises(ValueError, match=f"{name}: backend 'cuda' cannot run: "):
        getattr(ops, name)(*args, **keywords, backend="cuda")
    with pytest.raises(ValueError, match="backend: got 'fast', expected one of reference"):
        getattr(ops, name)(*args, **keywords, backend="fast")


def test_use_backend_nests_and_restores():
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    weight = torch.randn(3, 8, dtype=torch.bfloat16)
    with dispatch.use_backend("torch"):
        with dispatch.use_backend("reference"):
            assert dispatch.choose("linear", "cpu", {}, None) == "reference"
            ops.linear(x, weight)
        assert dispatch.choose("linear", "cpu", {}, None) == "torch"
        with dispatch.use_backend(None):
            assert dispatch.choose("linear", "cpu", {}, None) == "cpu"
    assert dispatch.choose("linear", "cpu", {}, None) == "cpu"
    with pytest.raises(ValueError, match="backend: got 'gpu'"):
        dispatch.use_backend("gpu")


def test_a_switch_holds_without_a_block():
    before = dispatch.switches()
    others = [
        dispatch.use_backend("torch"), dispatch.use_numerics("exact"), dispatch.use_memory("low"),
        dispatch.use_tuning("off"),
    ]  # fmt: skip
    assert dispatch.switches() == ("torch", "exact", "low", "off")
    for switched in reversed(others):
        with switched:
            pass
    assert dispatch.switches() == before


def test_a_switch_decorates_and_is_used_again():
    exact = dispatch.use_numerics("exact")
    for _ in range(2):
        with exact:
            assert dispatch.numerics() == "exact"
        assert dispatch.numerics() == "fast"

    @dispatch.use_memory("low")
    def memory():
        return dispatch.memory()

    assert dispatch.memory() == "default" and memory() == "low" and dispatch.memory() == "default"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2), st.integers(1, 5), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from([1, 3]), st.sampled_from([1, 2]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_conv2d_equals_its_definition(n, c_in, c_out, height, width, kernel, stride, upsample, channels_last):
    """The fused call against the formula written out step by step."""
    torch.manual_seed(0)
    x = torch.randn(n, c_in, height, width, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(c_out, c_in, kernel, kernel).double(), torch.randn(c_out).double()
    norm = ops.NormPrologue(1, torch.randn(c_in).double(), torch.randn(c_in).double(), 1e-3)
    embedding = torch.randn(n, c_out).double()
    a = torch.nn.functional.silu(torch.group_norm(x, 1, norm.weight, norm.bias, norm.eps))
    a = a.repeat_interleave(2, 2).repeat_interleave(2, 3) if upsample else a
    padding = (kernel // 2, kernel // 2 + 1, kernel // 2, kernel // 2)
    padded = torch.nn.functional.pad(a, padding)
    expected = torch.nn.functional.conv2d(padded, weight, bias, stride) + embedding[:, :, None, None]
    residual = torch.randn_like(expected)
    actual, mean, rstd = ops.conv2d(
        x, weight, bias, stride, padding, norm=norm, upsample=upsample, time_embedding=embedding,
        residual=residual, stats_groups=1, stats_eps=1e-3,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected + residual)
    assert mean.shape == rstd.shape == (n, 1)
    if n:
        torch.testing.assert_close(mean[:, 0], actual.mean((1, 2, 3)))
        torch.testing.assert_close(rstd[:, 0], (actual.var((1, 2, 3), correction=0) + 1e-3).rsqrt())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 80), st.integers(1, 40))
def test_attention_equals_softmax(batch, heads, queries, keys, head_dim):
    torch.manual_seed(0)
    q = torch.randn(batch, queries, heads, head_dim, dtype=torch.float64).transpose(1, 2)
    k, v = torch.randn(2, batch, keys, heads, head_dim, dtype=torch.float64).transpose(2, 3)
    expected = torch.softmax(q @ k.transpose(-1, -2) * 0.3, dim=-1) @ v
    torch.testing.assert_close(ops.attention(q, k, v, scale=0.3), expected)
    hidden = torch.zeros(keys, dtype=torch.bool)
    hidden[0] = True  # with one key left the answer is that key's value
    torch.testing.assert_close(
        ops.attention(q, k, v, mask=hidden.expand(queries, keys)), v[:, :, :1].expand_as(q)
    )


@pytest.mark.parametrize("activation", [None, "silu", "gelu", "quick_gelu", "geglu"])
def test_linear_activations(activation):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 8).double(), torch.randn(6, 8).double(), torch.randn(6).double()
    residual = torch.randn(2, 3, 6).double()
    h = x @ weight.T + bias + residual
    phi = 0.5 * (1 + torch.erf(h / 2**0.5))
    expected = {
        None: h,
        "silu": h / (1 + torch.exp(-h)),
        "gelu": h * phi,
        "quick_gelu": h / (1 + torch.exp(-1.702 * h)),
        "geglu": h[..., :3] * (h * phi)[..., 3:],
    }[activation]
    torch.testing.assert_close(
        ops.linear(x, weight, bias, activation=activation, residual=residual), expected
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.linear([1], torch.ones(2, 2)), TypeError, "x: got list, expected a torch.Tensor"),
        (
            lambda: ops.linear(torch.ones(3, dtype=torch.int32), torch.ones(2, 3)),
            TypeError,
            "x: got dtype torch.int32",
        ),
        (
            lambda: ops.linear(torch.ones(3), torch.ones(2, 4)),
            ValueError,
            r"x: got shape \(3,\), expected \(..., 4\)",
        ),
        (
            lambda: ops.linear(torch.ones(3), torch.ones(2, 3).half()),
            TypeError,
            "weight: got dtype torch.float16",
        ),
        (
            lambda: ops.linear(torch.ones(3), torch.ones(2, 3, device="meta")),
            ValueError,
            "weight: is on meta",
        ),
        (
            lambda: ops.linear(torch.ones(3), torch.ones(3, 3), activation="geglu"),
            ValueError,
            "weight: got 3 rows",
        ),
        (
            lambda: ops.linear(torch.ones(3), torch.ones(3, 3), activation="relu"),
            ValueError,
            "activation: got 'relu'",
        ),
        (
            lambda: ops.conv2d(torch.ones(3, 3), torch.ones(1, 1, 1, 1)),
            ValueError,
            "x: got shape .* 4 dimensions",
        ),
        (lambda: ops.conv2d(torch.ones(1, 2, 3, 3), torch.ones(1, 1, 1, 1)), ValueError, "x: got 2 channels"),
        (
            lambda: ops.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3)),
            ValueError,
            "smaller than the 3x3 kernel",
        ),
        (
            lambda: ops.conv2d(torch.ones(1, 4, 2, 2), torch.ones(3, 4, 1, 1), stats_groups=2),
            ValueError,
            "stats_groups: got 2, expected a divisor of the 3 channels",
        ),
        (
            lambda: ops.attention(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3)),
            ValueError,
            r"k: got shape .*, expected \(1, 1, S, 4\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
