"""What the Triton kernels move, counted, stays near the least there is; see triton_traffic.py."""

import pytest
import torch

pytest.importorskip("triton")

from triton_code import all_ops
from triton_traffic import OUTSIDE, count, line, nbytes, rows

from sdfast import _library
from sdfast.ops._triton import Config, launch

# Times the least that calls of an operation may move on sm_90: those of one launch, those of several.
LIMITS = {
    "attention_forward": (1.0, 3.1),  # the VAE's at 64x64: its one head is split over the keys
    "attention_with_lse": (1.0, 3.1),
    "attention_backward": (1.0, 2.4),  # one pass for the queries' gradient, one for the keys'
    # Of stride 2 four launches, for odd and even rows and columns: each writes a quarter, which counts whole.
    "conv2d_input_gradient": (1.1, 4.1),
    "layer_norm_backward": (1.6, 2.1),  # of few rows, beside the parameters' partial sums
    "linear_weight_gradient": (1.0, 1.8),  # a small weight's partials beside short factors
    "linear_rows": (1.0, 1.7),
    "linear_input_gradient": (1.0, 1.7),
    "group_norm": (1.1, 1.6),  # one pass where an image's group fits into a program, else two reads of x
    "group_norm_pair": (1.1, 1.6),
    "group_norm_forward": (1.1, 1.6),
}
OTHERS = (1.1, 2.0)
# What Stable Diffusion calls with a MiB and more; of less, and of odd sizes, a launch is the cost.
REAL = ("sd15", "sdxl", "vae", "diffusion_step", "add_noise", "reparameterize")
LEAST = 1 << 20


@pytest.mark.parametrize("op", all_ops())
def test_near_the_least(op):
    found = rows([op])
    assert found
    for row in found:
        if row["op"] == OUTSIDE:
            continue
        assert row["ratio"] > 0.999, line(row)  # the least is what its name says
        if row["least_bytes"] < LEAST or not any(name in row["case"] for name in REAL):
            continue
        one, several = LIMITS.get(row["op"], OTHERS)
        assert row["ratio"] <= (one if row["launches"] == 1 else several) + 1e-3, line(row)


@pytest.mark.parametrize("op", ["group_norm", "layer_norm"])
def test_norms_leave_nothing_to_torch(op):
    """No copy of a model's tensors, no statistics filled with what the kernels overwrite."""
    assert [line(row) for row in rows([op]) if row["copies"]] == []


def test_the_operations_of_a_step_are_counted_once_a_byte():
    found = {row["case"]: row for row in rows(["linear"])}
    row = found["linear sd15 to_q 64x64 fp16"]
    assert row["moved_bytes"] == row["least_bytes"] == 2 * (2 * 8192 * 320 + 320 * 320 + 320)
    assert row["flop"] == 2 * 8192 * 320 * 320


def test_launches_beside_operations_and_views():
    def case():
        x = torch.empty(64, 8, device="cuda")
        y = torch.ops.sdfast.linear_rows_triton(x, torch.empty(16, 8, device="cuda"), None, None, 0)
        launch(None, (1,), x, y, x.view(-1), config=Config({}))

    call, beside = count(case)
    assert call.op == "linear_rows" and call.copies == [] and len(call.launches) == 1
    assert beside.op == OUTSIDE and beside.least_bytes is None
    assert beside.moved_bytes == 4 * (64 * 8 + 64 * 16)
    assert nbytes([torch.zeros(4), torch.zeros(1).expand(8)]) == 20


def test_copies_show(monkeypatch):
    """Those of torch's within a launcher; what is filled reads nothing."""

    def launcher(h, activation):
        return h.to(torch.float16) if activation else h.new_zeros(3)

    monkeypatch.setitem(_library.launchers, "linear_activate", launcher)

    def call_of(activation):
        return count(
            lambda: torch.ops.sdfast.linear_activate_triton(torch.empty(64, device="cuda"), activation)
        )[0]

    for activation, moved, least in ((1, 64 * 6, 64 * 6), (0, 12, 64 * 4 + 12)):
        call = call_of(activation)
        assert (len(call.copies), call.moved_bytes, call.least_bytes) == (1, moved, least)
