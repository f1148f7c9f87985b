"""fp32 products follow torch's switches, the old ones and the new, convolutions those of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sdfast import ops
from sdfast.ops import _triton

pytest.importorskip("triton")
MATMUL, CONV = torch.backends.cuda.matmul, torch.backends.cudnn


def _settings() -> tuple[str, ...]:
    return torch.backends.fp32_precision, MATMUL.fp32_precision, CONV.conv.fp32_precision


def old(switch: object) -> Callable[[bool], None]:
    return lambda allowed: setattr(switch, "allow_tf32", allowed)


def new(switch: object) -> Callable[[bool], None]:
    return lambda allowed: setattr(switch, "fp32_precision", "tf32" if allowed else "ieee")


SWITCHES = {
    "old": {"matmul": old(MATMUL), "conv": old(CONV)},
    "new": {"matmul": new(MATMUL), "conv": new(CONV.conv)},
}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    everything, matmul, conv = _settings()
    allowed = MATMUL.allow_tf32, CONV.allow_tf32
    yield
    torch.backends.fp32_precision = everything
    MATMUL.allow_tf32, CONV.allow_tf32 = allowed  # these set the new ones too, but not the other way round
    MATMUL.fp32_precision, CONV.conv.fp32_precision = matmul, conv
    assert _settings() == (everything, matmul, conv)
    assert (MATMUL.allow_tf32, CONV.allow_tf32) == allowed


def precisions(call: Callable[[], object]) -> set[str]:
    """PRECISION of a call's products; nothing is computed."""
    with _triton.recording() as launches:
        call()
    return {launch.keywords["PRECISION"] for launch in launches if "PRECISION" in launch.keywords}


def calls(dtype: torch.dtype) -> dict[str, list[Callable[[], object]]]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    x, q, image = empty(16, 32), empty(1, 2, 16, 32), empty(1, 16, 4, 4)
    sdfast, attended = torch.ops.sdfast, (q, q, q)
    lse = torch.empty(1, 2, 16)
    return {
        "matmul": [
            lambda: sdfast.linear_rows_triton(x, x, None, None, 0),
            lambda: sdfast.attention_forward_triton(*attended, False, 1.0),
            lambda: sdfast.attention_backward_triton(q, *attended, q, lse, False, 1.0),
        ],
        "conv": [
            *(
                lambda size=size: ops.conv2d(
                    image, empty(16, 16, size, size), padding=size // 2, backend="triton"
                )
                for size in (1, 3)
            ),
            lambda: sdfast.conv2d_weight_gradient_triton(image, image, 3, 3, 1, [1] * 4, False),
        ],
    }


@pytest.mark.parametrize("api", SWITCHES)
def test_fp32_follows_the_switch(api: str) -> None:
    for kind, other in (("matmul", "conv"), ("conv", "matmul")):
        for allowed in (True, False):
            SWITCHES[api][kind](allowed)
            SWITCHES[api][other](not allowed)
            expected = {"tf32" if allowed else "ieee"}
            assert _triton.product_precision(torch.float32, kind) in expected
            assert all(precisions(call) == expected for call in calls(torch.float32)[kind])


def test_the_switch_of_everything() -> None:
    torch.backends.fp32_precision = "ieee"
    MATMUL.fp32_precision = CONV.conv.fp32_precision = "none"
    for expected in ("tf32", "ieee"):
        torch.backends.fp32_precision = expected
        assert {_triton.product_precision(torch.float32, kind) for kind in ("matmul", "conv")} == {expected}


@pytest.mark.parametrize("allowed", [True, False])
def test_halves_have_one_kernel(allowed: bool) -> None:
    for kind, switch in SWITCHES["new"].items():
        switch(allowed)
        for dtype in (torch.float16, torch.bfloat16):
            assert _triton.product_precision(dtype, kind) == "tf32"
            assert all(precisions(call) == {"tf32"} for call in calls(dtype)[kind])
