"""Which plan serves a launch: the rule's, what a table names, what no longer exists; and how tables are made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from processes import PACKAGE

pytest.importorskip("triton")
from sdfast.ops import _conv2d_plan, _launch_table, conv2d_backward_triton, linear_triton
from sdfast.ops._launch_table import choose, exploring, name_of, near, preferring
from sdfast.ops._triton import Config, Machine, recording

DEVICE = torch.device("cpu")


class Plan(NamedTuple):
    config: Config
    kind: str
    cost: float


PLANS = [
    Plan(Config({"BLOCK": block}, num_warps=4), "", cost)
    for block, cost in ((64, 3.0), (128, 1.0), (256, 2.0))
]
KEY = ("matmul", "float16 64 320")


def chosen() -> int:
    plan = choose("matmul", (torch.float16, near(40), 320), PLANS, DEVICE)
    return plan.config.constants["BLOCK"]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of sm_90's table, which is not there yet."""
    monkeypatch.setattr(_launch_table, "FOLDER", tmp_path)
    _launch_table.table.cache_clear()
    yield tmp_path / "sm_90.json"
    _launch_table.table.cache_clear()


def write(table: Path, plan: str) -> None:
    table.write_text(json.dumps({"plans": {KEY[0]: {KEY[1]: plan}}}))
    _launch_table.table.cache_clear()


def test_near_is_the_power_of_two_above() -> None:
    assert [near(size) for size in (0, 1, 2, 3, 64, 65, 4096, 4097)] == [1, 1, 2, 4, 64, 128, 4096, 8192]


def test_the_rule_decides_where_nothing_was_measured(table: Path) -> None:
    assert chosen() == 128


def test_a_table_decides_on_its_architecture_alone(table: Path) -> None:
    write(table, name_of(PLANS[2]))
    assert chosen() == 256
    with recording(80):
        assert chosen() == 128


def test_a_plan_that_is_no_longer_listed_is_ignored(table: Path) -> None:
    write(table, "BLOCK=512 warps=4 stages=3")
    assert chosen() == 128


def test_exploring_and_preferring(table: Path) -> None:
    with exploring() as met:
        chosen()
    assert met == {KEY: [name_of(PLANS[i]) for i in (1, 2, 0)]}
    write(table, name_of(PLANS[2]))
    with preferring(KEY, name_of(PLANS[0])):
        assert chosen() == 64
    assert chosen() == 256


def test_convolutions_of_different_images_have_different_buckets() -> None:
    """As many pixels in all, but tiles that hold those of one image alone; and precisions."""

    def buckets(dtype: torch.dtype, *shapes: tuple[int, ...], tf32: bool = True) -> set[str]:
        with exploring() as met, recording(), torch.backends.cudnn.flags(allow_tf32=tf32):
            for shape in shapes:
                x = torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)
                weight = torch.empty(32, shape[1], 3, 3, dtype=dtype)
                torch.ops.sdfast.conv2d_kernel_triton(
                    x, weight, None, 1, [1] * 4, False, None, None, None, [], False
                )
        return {bucket for _, bucket in met}

    assert len(buckets(torch.float16, (16, 32, 8, 8), (1, 32, 32, 32))) == 2
    fp32 = (torch.float32, (1, 32, 8, 8))
    assert buckets(*fp32).isdisjoint(buckets(*fp32, tf32=False))


def test_a_bucket_has_the_same_plans_whatever_their_splits() -> None:
    """So that what was measured at one size is found at its neighbours."""
    machine = Machine(90, 132, 232448)

    def same(*sizes: Sequence[Plan]) -> bool:
        splits = {tuple(plan.splits for plan in plans) for plans in sizes}
        names = {tuple(name_of(plan) for plan in plans) for plans in sizes}
        return len(splits) == len(sizes) and len(names) == 1

    def linear(tokens: int) -> Sequence[Plan]:
        return linear_triton.plans_of(tokens, 640, 5120, torch.float16, "tf32", True, "plain", machine)

    def conv2d(pixels: int) -> Sequence[Plan]:
        size, strides = (640, 640, 3, 3), (5760, 1, 1920, 640)
        call = (size, strides, torch.float16, (640,), 1, pixels, 1, "tf32", False, False)
        return _conv2d_plan.plans_of(_conv2d_plan.Convolution(*call), machine)

    def weight_gradient(pixels: int) -> Sequence[Plan]:
        return conv2d_backward_triton.plans_of(128, 1152, pixels, "tf32", 2, True, machine)

    assert same(linear(300), linear(512))
    assert same(conv2d(300), conv2d(512))
    assert same(weight_gradient(40000), weight_gradient(65536))


def test_tables_are_made_and_serve(table: Path) -> None:
    """Measured in the interpreter, where times mean nothing, but which plans there are does."""
    script = PACKAGE / "benchmarks" / "tune_launches.py"
    command = [
        sys.executable,
        str(script),
        "linear",
        "--only",
        "linear sd15 time embedding fp32",
        "--folder",
        str(table.parent),
    ]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "TRITON_INTERPRET": "1"}

    def run() -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "linear sd15 time embedding fp32: linear plain float32 2 1280" in run()
    content = json.loads(table.read_text())
    measured = content["ms"]["linear"]
    assert all(len(ms) > 1 and min(ms.values()) > 0 for ms in measured.values())
    for bucket, plan in content["plans"].get("linear", {}).items():
        assert plan in measured[bucket]
    assert run() == ""  # nothing is measured twice
    assert json.loads(table.read_text()) == content
