"""What only a GPU can show: real sizes, the same bits again, streams, 2^31 elements, no waiting, real graphs.

Without one the bodies that have a tiny form run in Triton's interpreter, and the rest is skipped.
"""

import contextlib
import functools

import pytest
import torch
from gpu_calls import REAL, TINY
from tiny_models import UNET

from sdfast import _library, ops, use_backend
from sdfast.graphs import GraphCache, graphed
from sdfast.models import UNet2DCondition, UNet2DConditionConfig
from sdfast.models.config import config_from_dict
from sdfast.testing import assert_within_budget, relative_error

pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CALLS = REAL if GPU else TINY
# The interpreter's products of bf16 are wrong.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16)
REPEATS = 200 if GPU else 2
REPEATS_OF_FP32 = 20 if GPU else 2  # which no tensor core multiplies


@pytest.fixture(params=CALLS)
def call(request):
    if CALLS[request.param].missing():
        pytest.skip("no Triton kernel yet")
    return CALLS[request.param]


@pytest.fixture
def exact_fp32():
    """fp32 is multiplied as such, by torch too."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def gradients(call, tensors, backend):
    """The result and the gradients of a sum whose terms differ."""
    y = call.run(*tensors, backend=backend)
    terms = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, tensors, terms)]


@pytest.mark.usefixtures("exact_fp32", "unwritten_is_nan")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_fp64(call, dtype):
    tensors = call.tensors(dtype, DEVICE, gradients=True)
    eager = gradients(call, tensors, "torch")
    actual = gradients(call, tensors, "triton")
    exact = gradients(call, [t.detach().double().requires_grad_() for t in tensors], "torch")
    # Triton adds fp32's products one after the other, cuBLAS and cuDNN in parts, which rounds less.
    is_product = call.kernel in ("linear_rows", "conv2d_kernel", "attention_forward")
    factor = 4.0 if is_product and dtype is torch.float32 else 2.0
    for i, results in enumerate(zip(actual, eager, exact, strict=True)):
        assert_within_budget(*results, factor=factor, what=f"gradient {i - 1}" if i else "result")


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_again(call, dtype):
    tensors = call.tensors(dtype, DEVICE, gradients=True)
    expected = gradients(call, tensors, "triton")
    for _ in range(REPEATS_OF_FP32 if dtype is torch.float32 else REPEATS):
        for a, b in zip(gradients(call, tensors, "triton"), expected, strict=True):
            assert torch.equal(a, b)


def on_two_streams(run, inputs):
    """The results of run(*tensors), in turn on two streams: of each of two inputs a list.

    Both streams wait until the host has launched all there is, then run side by side: a launch costs the host
    longer than small kernels take, and one stream would be done before the other has work.
    """
    streams, gate = [torch.cuda.Stream() for _ in inputs], torch.cuda.Stream()
    for is_warm in (False, True):  # first each stream gets its memory, for which the driver may wait
        results = [[] for _ in inputs]
        torch.cuda.synchronize()
        with torch.cuda.stream(gate):
            torch.cuda._sleep(300_000_000)  # cycles, 0.15 s
            opened = gate.record_event()
        for stream in streams:
            stream.wait_event(opened)
        for _ in range(10):
            for stream, tensors, made in zip(streams, inputs, results, strict=True):
                with torch.cuda.stream(stream):
                    made.append(run(*tensors))
        assert not (is_warm and opened.query()), "the device began before the host was done"
    torch.cuda.synchronize()
    return results


def differing(results, expected):
    """How many of the results have other bits."""
    return sum(
        any(not torch.equal(a, b) for a, b in zip(made, right, strict=True))
        for all_made, right in zip(results, expected, strict=True)
        for made in all_made
    )


@pytest.mark.gpu
def test_two_streams(call):
    """Calls that overlap, gradients too, share no scratch memory: different inputs give the bits they give alone."""

    def run(*tensors):
        return gradients(call, tensors, "triton")

    inputs = [call.tensors(torch.float16, DEVICE, gradients=True) for _ in range(2)]
    expected = [run(*tensors) for tensors in inputs]
    assert differing(on_two_streams(run, inputs), expected) == 0


@pytest.mark.gpu
def test_two_streams_see_a_race():
    """Scratch memory that calls share is found out."""
    scratch = torch.empty(1 << 22, device=DEVICE)

    def run(x):
        scratch.copy_(x)
        torch.cuda._sleep(100_000)
        return [scratch.clone()]

    inputs = [[torch.full_like(scratch, value)] for value in (1.0, 2.0)]
    assert differing(on_two_streams(run, inputs), inputs) > 0


@pytest.mark.gpu
def test_another_current_device():
    """Kernels run where the tensors are."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for call in REAL.values():
        if not call.missing():
            tensors = call.tensors(torch.float16, "cuda:1")
            expected = call.run(*tensors, backend="torch")
            with torch.cuda.device(0):
                actual = call.run(*tensors, backend="triton")
            assert relative_error(actual, expected) < 2e-3


def large(name):
    """More than 2^31 elements; a call whose last part equals the same call of that part alone."""
    rows, tail = (1 << 31) // 64 + 5, 300

    def elementwise(x, backend="triton"):
        return ops.reparameterize(x, x, x, backend=backend)

    def normalised(x, backend="triton"):
        return ops.layer_norm(x, (64,), backend=backend)

    def grouped(x, backend="triton"):
        return ops.group_norm(x, 32, activation="silu", backend=backend)

    def multiplied(x, backend="triton"):
        return ops.linear(x, torch.eye(16, 64, device=x.device, dtype=x.dtype), backend=backend)

    if name == "group_norm":
        shape, part = ((1 << 31) // (64 * 64 * 64) + 3, 64, 64, 64), slice(-2, None)
        return shape, part, grouped, "group_norm_forward"
    run, kernel = {
        "reparameterize": (elementwise, "reparameterize"),
        "layer_norm": (normalised, "layer_norm_forward"),
        "linear": (multiplied, "linear_rows"),
    }[name]
    return (rows, 64), slice(-tail, None), run, kernel


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name", ["reparameterize", "layer_norm", "linear", "group_norm"])
def test_more_than_2_to_the_31_elements(name):
    shape, part, run, kernel = large(name)
    if not _library.has_kernel(kernel, "triton"):
        pytest.skip("no Triton kernel yet")
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of free device memory")
    x = torch.randn(shape, device="cuda", dtype=torch.float16)
    assert x.numel() > 1 << 31
    last = x[part].clone()
    actual = run(x)[part].clone()
    assert relative_error(actual, run(last, backend="torch")) < 2e-3


@functools.cache
def unet(real):
    torch.manual_seed(0)
    config = (
        UNet2DConditionConfig(cross_attention_dim=768) if real else config_from_dict(UNet2DCondition, UNET)
    )
    with torch.device(DEVICE):
        model = UNet2DCondition(config).eval()
    model = model.to(torch.float16 if real else torch.float32)
    return model.to(memory_format=torch.channels_last).requires_grad_(False)


def step_inputs(model, size):
    """Two latents and their texts."""
    weight, width = model.conv_in.weight, model.config.cross_attention_dim
    x, text = (
        torch.randn(2, *shape, device=DEVICE).to(weight.dtype) for shape in ((4, size, size), (77, width))
    )
    return x.to(memory_format=torch.channels_last), text


@torch.no_grad()
@pytest.mark.usefixtures("unwritten_is_nan")
def test_a_step_of_a_unet():
    """Against fp64 where the kernels are many: as close as torch's, within 1.5 times."""
    model = unet(real=GPU)
    x, text = step_inputs(model, 64 if GPU else 8)
    results = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            results.append(model(x, 500, text))
    wide = UNet2DCondition(model.config).eval().to(DEVICE, torch.float64)
    wide.load_state_dict(model.state_dict())
    with use_backend("torch"):
        exact = wide(x.double(), 500, text.double())
    actual, eager = (relative_error(y, exact) for y in results)
    assert actual <= 1.5 * eager + torch.finfo(x.dtype).eps


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("backend", ["triton", "default"])
def test_a_step_does_not_wait_for_the_device(backend):
    model = unet(real=True)
    with contextlib.nullcontext() if backend == "default" else use_backend(backend):
        x, text = step_inputs(model, 64)
        time, context = model.encode_time([500])[0], model.encode_context(text)
        model(x, time, context)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x, time, context)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_of_a_step():
    """Two resolutions, replayed in turn, give the bits of single launches."""
    cache, model = GraphCache(), unet(real=True)
    with use_backend("triton"):
        run = graphed(model, cache=cache)
        for size in (32, 64, 32, 64):
            x, text = step_inputs(model, size)
            time, context = model.encode_time([500])[0], model.encode_context(text)
            assert torch.equal(run(x, time, context), model(x, time, context))
    assert len(cache) == 2 and cache.pool_bytes() > 0
