"""Launch plans are timed on a GPU; here it is pretended which of them can be launched."""

import sys
from pathlib import Path

import pytest
import torch

OutOfResources = pytest.importorskip("triton.runtime.errors").OutOfResources

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tune_launches  # noqa: E402

from sdfast.ops import _launch_table  # noqa: E402

RULE, FAST, SMALL = "BLOCK=64 warps=4", "BLOCK=128 warps=8", "BLOCK=32 warps=4"
CHOICE = ("matmul", "float16 64")


@pytest.mark.parametrize("unlaunchable", [RULE, SMALL])
def test_a_plan_that_cannot_be_launched_is_left_out(tmp_path, unlaunchable):
    """Of three, one has no room: the others are timed, the reason is kept, and it is not tried again."""
    tried = []

    def call():
        plan = _launch_table._preferred[CHOICE]
        tried.append(plan)
        if plan == unlaunchable:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return torch.ones(3)

    def timer(call):
        call()
        return {RULE: 3.0, FAST: 1.0, SMALL: 2.0}[tried[-1]]

    record = tune_launches.Record(tmp_path, 90)
    for _ in range(2):
        ms = tune_launches.measure(call, CHOICE, [RULE, FAST, SMALL], timer, record.reasons(CHOICE))
        assert ms == {p: t for p, t in ((RULE, 3.0), (FAST, 1.0), (SMALL, 2.0)) if p != unlaunchable}
        assert tried.count(unlaunchable) == 1
        record.add(CHOICE, ms, RULE)
        record.save()
        assert ("is left out" in tune_launches.described("case", CHOICE, ms, RULE)) == (unlaunchable == RULE)
        record = tune_launches.Record(tmp_path, 90)
        assert record.plans == {"matmul": {CHOICE[1]: FAST}} and CHOICE in record
        assert "shared memory" in record.reasons(CHOICE)[unlaunchable]
    assert record.reasons(CHOICE, again=True) == {}


def test_a_choice_without_a_plan_that_can_be_launched_changes_nothing(tmp_path):
    def call():
        raise OutOfResources(300_000, 232_448, "shared memory")

    record = tune_launches.Record(tmp_path, 90)
    ms = tune_launches.measure(call, CHOICE, [RULE, FAST], None, record.reasons(CHOICE))
    record.add(CHOICE, ms, RULE)
    assert ms == {} and record.plans == {"matmul": {}} and set(record.reasons(CHOICE)) == {RULE, FAST}
    assert "no plan can be launched" in tune_launches.described("case", CHOICE, ms, RULE)
