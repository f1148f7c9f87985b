"""bench_gpu_calls: which calls a model makes, by whom they can be made, and the table of the fastest plans."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_gpu_calls as bench  # noqa: E402
from _gpu_works import TINY_WORKS  # noqa: E402
from tune_launches import Record  # noqa: E402


@pytest.fixture(scope="module")
def calls() -> list[bench.RecordedCall]:
    return bench.record(TINY_WORKS, torch.float16)


def test_calls_are_counted_by_work_and_no_two_are_alike(calls: list[bench.RecordedCall]) -> None:
    assert len({repr(call[:3]) for call in calls}) == len(calls)
    assert {call.op for call in calls} == set(bench.OPERATIONS)
    assert {work for call in calls for work in call.counts} == {"sd15", "decode512", "encode512"}
    residuals = [call for call in calls if call.op == "conv2d" and "residual=2x32x8x8" in call.name]
    assert [call.counts for call in residuals] == [{"sd15": 3}]


def test_images_lie_channels_last_and_heads_as_they_are_split(calls: list[bench.RecordedCall]) -> None:
    for call in calls:
        x = call.arguments[0]
        if call.op in ("conv2d", "group_norm"):
            assert x.stride[1] == 1
        elif call.op == "attention":
            assert x.stride[3] == 1 and x.stride[2] == x.shape[1] * x.shape[3]


def test_candidates_are_compared_with_fp64(
    calls: list[bench.RecordedCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = next(call for call in calls if call.op == "group_norm")
    call = bench._Call(recorded, "cpu", copies=2)
    ways = bench.candidates(call, plans=True)
    assert [way.name for way in ways] == ["torch", "cuda", "triton", "triton +statistics"]
    errors = bench.check(call, ways[:1])
    assert errors["torch"] < 2e-3
    monkeypatch.setattr(bench.ops, "group_norm", lambda x, *_, **__: 2 * x)
    assert bench.check(call, ways[:1])["torch"] == 0  # of itself
    monkeypatch.setattr(bench.ops, "group_norm", lambda x, *_, **__: x.dim() // 0)
    with pytest.raises(ZeroDivisionError):
        bench.check(call, ways[:1])


def test_weights_are_copied_and_kept_apart(calls: list[bench.RecordedCall]) -> None:
    recorded = next(call for call in calls if call.op == "conv2d" and "residual" in call.keywords)
    first, second = bench._Call(recorded, "cpu", copies=2).sets
    same = [a is b for a, b in zip(first, second, strict=True) if isinstance(a, torch.Tensor)]
    assert same.count(False) == 1 and not first[1]._is_view()


def test_table_of_the_fastest_plans(tmp_path: Path) -> None:
    key = ("conv2d", "plain bfloat16")
    choices = {f"triton [{plan}]": (key, plan) for plan in ("rule", "other", "wrong")}

    def row(*ms: float) -> dict[str, object]:
        return {"choices": choices, "ms": dict(zip(choices, ms, strict=False))}

    bench.write_table([row(2.0, 1.0), row(2.0, 1.5)], Record(tmp_path, 90))
    assert plans(tmp_path) == {key[1]: "other"}
    bench.write_table([row(1.0, 1.0), row(2.0, 2.0)], Record(tmp_path, 90))
    assert plans(tmp_path) == {}
    without_rule = {"choices": choices, "ms": {"triton [other]": 1.0}}
    bench.write_table([without_rule], Record(tmp_path, 90))
    assert plans(tmp_path) == {key[1]: "other"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--work", "decode512"], "there is no CUDA device; --tiny tries"),
        (
            ["--tiny", "--phase", "time", "--folder", str(tmp_path / "none")],
            "none holds no calls; run --phase",
        ),
    ):
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def plans(folder: Path) -> dict[str, str]:
    return json.loads((folder / "sm_90.json").read_text())["plans"]["conv2d"]
