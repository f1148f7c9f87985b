"""Gradients of conv2d on CPU against fp64: kernels, strides, paddings, the upsample, both algorithms."""

from __future__ import annotations

import types

import pytest
import torch
from conv2d_checks import make
from gradients import check_gradients, gradients
from processes import run_with_library
from test_conv2d import CASES, DTYPES, needs_kernel
from torch import Tensor

from sdfast import dispatch, ops, packing
from sdfast.ops import _conv2d_choice
from sdfast.ops.conv2d import NormPrologue, conv2d_torch
from sdfast.testing import relative_error

pytestmark = needs_kernel
MORE_CASES = (
    (2, 4, 5, 5, 3, 2, 3, 0),  # a stride beyond the kernel: pixels that nothing meets
    (1, 17, 7, 9, 6, 3, 2, (0, 1, 0, 1)),
    (1, 9, 7, 9, 16, 3, 2, (2, 0, 1, 3)),
    (1, 8, 3, 4, 8, 1, 1, (2, 3, 1, 2)),  # pixels of y beyond the image
    (3, 1, 5, 13, 2, 3, 1, 1),
    (1, 24, 5, 8, 1024, 1, 1, 0),  # rows of dy are a way of the L1 cache apart
    (2, 150, 4, 4, 80, 3, 1, 1),  # few pixels: panels that are packed together, in parts of K
)
# Many tiles and few, in several blocks; sizes that four does not divide; channels that no vector does, in parts.
WINOGRAD_CASES = (
    (2, 33, 16, 15, 34, 3, 1, 1),
    (1, 40, 1, 1, 52, 3, 1, 1),
    (3, 32, 30, 27, 100, 3, 1, 1),
    (2, 64, 9, 6, 48, 3, 1, (0, 2, 1, 0)),
    (2, 130, 22, 20, 70, 3, 1, 1),
    (1, 40, 8, 7, 400, 3, 1, 1),  # more than a strip of out_channels
    (3, 33, 38, 37, 70, 3, 1, 1),  # more tiles than those of which no weight is packed
    (2, 1400, 28, 28, 33, 3, 1, 1),  # more tiles than one round holds
)
WINOGRAD_ERROR = 1e-5  # relative, a layer


class Call:
    """conv2d of a case as a function of its tensors: x, weight, bias, time_embedding and residual."""

    def __init__(
        self,
        case: tuple,
        dtype: torch.dtype,
        upsample: bool = False,
        backend: str = "cpu",
        device: str = "cpu",
    ) -> None:
        (x, weight, bias, self.stride, self.padding), keywords = make(case, dtype, upsample)
        self.upsample, self.backend = upsample, backend
        tensors = (x, weight, bias, keywords["time_embedding"], keywords["residual"])
        self.tensors = [t.to(device) for t in tensors]
        self.dy = torch.randn_like(keywords["residual"]).to(device)

    def _arguments(self, tensors: tuple) -> tuple[tuple, dict[str, object]]:
        keywords = {"upsample": self.upsample, "time_embedding": tensors[3], "residual": tensors[4]}
        return (*tensors[:3], self.stride, self.padding), keywords

    def ours(self, *tensors: Tensor | None) -> Tensor:
        args, keywords = self._arguments(tensors)
        return ops.conv2d(*args, **keywords, backend=self.backend)

    def eager(self, *tensors: Tensor | None) -> Tensor:
        args, keywords = self._arguments(tensors)
        return conv2d_torch(*args, **keywords)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_direct(dtype: torch.dtype, upsample: bool) -> None:
    with dispatch.use_numerics("exact"):
        for case in (*CASES, *MORE_CASES):
            call = Call(case, dtype, upsample)
            check_gradients(call.ours, call.eager, call.tensors, call.dy, str(case))
        bare = [*call.tensors[:2], None, None, None]
        check_gradients(call.ours, call.eager, bare, call.dy, "alone")


def check_winograd(case: tuple, upsample: bool) -> None:
    call = Call(case, torch.float32, upsample)
    actual = gradients(call.ours, call.tensors, call.dy)
    exact = gradients(call.eager, [t.double() for t in call.tensors], call.dy)
    with dispatch.use_numerics("exact"):
        direct = gradients(call.ours, call.tensors, call.dy)
    for i, (value, expected) in enumerate(zip(actual, exact, strict=True)):
        assert relative_error(value, expected) <= WINOGRAD_ERROR, (case, i)
    assert not torch.equal(actual[2], direct[2])  # it was Winograd


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Winograd from one pixel on, on AMX too."""
    monkeypatch.setattr(_conv2d_choice, "_tiles", types.SimpleNamespace(are_there=lambda: False))
    for name in ("_WINOGRAD_PIXELS", "_WINOGRAD_PIXELS_OF_PAIRS"):
        monkeypatch.setattr(_conv2d_choice, name, (1, 0))


@pytest.mark.parametrize("upsample", [False, True])
def test_winograd(upsample: bool, every_size: None) -> None:
    for case in WINOGRAD_CASES[: 3 if upsample else 5]:
        check_winograd(case, upsample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_winograd_in_half_precision(dtype: torch.dtype, every_size: None) -> None:
    """Within the budget of the direct kernel; a weight's gradient is summed over rounds before it is rounded."""
    for case in WINOGRAD_CASES:
        call = Call(case, dtype)
        check_gradients(call.ours, call.eager, call.tensors, call.dy, str(case))
    actual = gradients(call.ours, call.tensors, call.dy)
    with dispatch.use_numerics("exact"):
        direct = gradients(call.ours, call.tensors, call.dy)
    assert not any(map(torch.equal, actual[:3], direct[:3]))  # it was Winograd


def test_sizes_of_a_model() -> None:
    check_winograd((1, 32, 23, 24, 32, 3, 1, 1), False)
    check_winograd((1, 32, 23, 24, 32, 3, 1, 1), True)


def test_large_weight_gradients() -> None:
    """As many numbers as are stored past the caches, of Winograd and of the direct kernel."""
    case = (1, 176, 7, 10, 178, 3, 1, 1)
    check_winograd(case, False)
    call = Call(case, torch.float32)
    with dispatch.use_numerics("exact"):
        check_gradients(call.ours, call.eager, call.tensors, call.dy)


@pytest.mark.parametrize("winograd", (False, True), ids=("direct", "winograd"))
def test_large_weight_gradients_of_bf16(winograd: bool) -> None:
    """Stored past the caches too, where a line is two vectors."""
    dy, x = (
        torch.randn(1, channels, 7, 10).bfloat16().contiguous(memory_format=torch.channels_last)
        for channels in (178, 192)
    )
    dw = torch.ops.sdfast.conv2d_weight_gradient(dy, x, 3, 3, 1, [1, 1, 1, 1], winograd)
    exact = torch.nn.grad.conv2d_weight(x.double(), dw.shape, dy.double(), padding=1)
    assert relative_error(dw, exact) <= 2**-9


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    call = Call((2, 33, 9, 8, 34, 3, 1, 1), dtype)
    expected = gradients(call.ours, call.tensors, call.dy)
    x, weight, bias, time_embedding, residual = call.tensors

    def strided(x: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        wider = torch.nn.functional.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
        return call.ours(wider, weight.contiguous(memory_format=torch.channels_last), *others)

    for run, tensors in (
        (call.ours, (x.contiguous(), weight, bias, time_embedding, residual.contiguous())),
        (strided, (x, weight, bias, time_embedding.t().contiguous().t(), residual)),
    ):
        for actual, wanted in zip(gradients(run, tensors, call.dy), expected, strict=True):
            assert torch.equal(actual, wanted)
    weight = weight.to(memory_format=torch.channels_last).requires_grad_()
    y = call.ours(x.requires_grad_(), weight, bias, time_embedding, residual)
    y.backward(call.dy.contiguous())
    for t in (y, x.grad, weight.grad):
        assert t is not None and t.is_contiguous(memory_format=torch.channels_last)


def test_expanded_gradients() -> None:
    call = Call((1, 16, 9, 8, 18, 3, 1, 1), torch.float32)
    expected = gradients(call.ours, call.tensors, torch.ones(1, 18, 9, 8))
    actual = gradients(call.ours, call.tensors, torch.ones(()).expand(1, 18, 9, 8))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("chosen", range(5))
def test_only_what_is_asked_for(chosen: int) -> None:
    call = Call((2, 16, 9, 8, 18, 3, 1, 1), torch.float32)
    expected = gradients(call.ours, call.tensors, call.dy)[1 + chosen]
    for t in call.tensors:
        t.requires_grad_(t is call.tensors[chosen])
    call.ours(*call.tensors).backward(call.dy)
    torch.testing.assert_close(call.tensors[chosen].grad, expected)
    assert all(t.grad is None for t in call.tensors if t is not call.tensors[chosen])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_left_unwritten(dtype: torch.dtype, every_size: None, poisoned_memory: None) -> None:
    for case in (CASES[0], CASES[2], CASES[4], MORE_CASES[0], *WINOGRAD_CASES):
        call = Call(case, dtype)
        assert all(t.isfinite().all() for t in gradients(call.ours, call.tensors, call.dy))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("numerics", dispatch.NUMERICS)
def test_bits_do_not_depend_on_threads(numerics: str, dtype: torch.dtype, every_size: None) -> None:
    cases = ((2, 40, 20, 21, 72, 3, 1, 1), (1, 64, 7, 7, 40, 3, 1, 1), (2, 20, 40, 35, 18, 3, 2, 1))
    large = (1, 192, 7, 10, 178, 3, 1, 1)  # its weight's gradient is stored past the caches
    for case in (*cases, large, MORE_CASES[-1], WINOGRAD_CASES[-1]):
        call = Call(case, dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with dispatch.use_numerics(numerics):
                results.append(gradients(call.ours, call.tensors, call.dy))
        torch.set_num_threads(1)
        for one, two, three in zip(*results, strict=True):
            assert torch.equal(one, two) and torch.equal(one, three)


def test_norm_prologue() -> None:
    call = Call((2, 32, 9, 11, 48, 3, 1, 1), torch.float32)
    tensors = [*call.tensors[:3], torch.randn(32), torch.randn(32)]

    def ours(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
        return ops.conv2d(x, weight, bias, padding=1, norm=NormPrologue(4, *norm), backend="cpu")

    def eager(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
        more = {"norm_groups": 4, "norm_weight": norm[0], "norm_bias": norm[1], "norm_silu": True}
        return conv2d_torch(x, weight, bias, 1, (1, 1, 1, 1), **more)

    with dispatch.use_numerics("exact"):
        check_gradients(ours, eager, tensors, call.dy)


def test_training_keeps_no_copy_and_serves_by_itself() -> None:
    packing.clear()
    call = Call((2, 64, 16, 16, 64, 3, 1, 1), torch.float32)
    x, weight = (t.requires_grad_() for t in call.tensors[:2])
    y = ops.conv2d(x, weight, padding=1)
    assert "Conv2d" in type(y.grad_fn).__name__
    y.sum().backward()
    assert weight.grad is not None and packing.packed_bytes() == 0


def test_compiles_whole() -> None:
    call = Call((2, 64, 16, 16, 64, 3, 1, 1), torch.float32)
    compiled = torch.compile(call.ours, fullgraph=True, backend="aot_eager")
    actual = gradients(compiled, call.tensors, call.dy)
    for value, expected in zip(actual, gradients(call.ours, call.tensors, call.dy), strict=True):
        torch.testing.assert_close(value, expected)


def test_opcheck() -> None:
    call = Call((1, 32, 9, 8, 40, 3, 1, 1), torch.float32)
    x, weight, *_ = call.tensors
    weight = weight.contiguous(memory_format=torch.channels_last)
    for winograd in (False, True):
        more = (1, [1, 1, 1, 1], winograd)
        for op, args in (
            ("conv2d_input_gradient", (call.dy, weight, 9, 8, *more)),
            ("conv2d_weight_gradient", (call.dy, x, 3, 3, *more)),
        ):
            torch.library.opcheck(getattr(torch.ops.sdfast, op), args)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_lower_instruction_sets(isa: str) -> None:
    run_with_library(isa, """
        import test_conv2d_backward as t
        for upsample in (False, True):
            for dtype in t.DTYPES:
                t.test_direct(dtype, upsample)
        t.test_sizes_of_a_model()
        t.test_large_weight_gradients()
        for winograd in (False, True):
            t.test_large_weight_gradients_of_bf16(winograd)
        t._conv2d_choice._WINOGRAD_PIXELS = (1, 0)
        for case in t.WINOGRAD_CASES:
            t.check_winograd(case, False)
    """)  # fmt: skip
