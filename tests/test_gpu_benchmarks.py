"""The benchmarks of a GPU, tried out without one; their times are nobody's business here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

OutOfResources = pytest.importorskip("triton.runtime.errors").OutOfResources

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_gpu  # noqa: E402
from _gpu_process import OutOfTime, Worker, WorkerError  # noqa: E402
from _gpu_profile import Span, summary  # noqa: E402
from _report_gpu import gpu_models_lines, operations_lines  # noqa: E402
from bench_gpu_models import Benchmark, described, parse  # noqa: E402
from test_gpu_report import CARD  # noqa: E402

PYTHON = [sys.executable]


def run(*command):
    variables = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*PYTHON, *command], capture_output=True, text=True, timeout=600, env=variables, cwd=ROOT
    )


def models(output, *arguments):
    return run(
        "benchmarks/bench_gpu_models.py", "--tiny", "--dtype", "float16", "--rounds", "1", "--output", output, *arguments
    )  # fmt: skip


def test_models_are_measured_and_reported(tmp_path):
    done = models(tmp_path, "--work", "decode512", "train", "--side", "eager channels_last", "sdfast")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    record = json.loads((tmp_path / "gpu_models.json").read_text())
    for row in record["rows"]:
        assert row["failed"] == {} and set(row["sides"]) == {"eager channels_last", "sdfast"}
        ours = row["sides"]["sdfast"]
        assert ours["beside"] == "eager channels_last" and 0 < ours["error"] < 1e-2 and ours["ratio"] > 0
    text = "\n".join(gpu_models_lines(record))
    assert "| tiny VAE, decode | float16 | sdfast |" in text and "tiny U-Net, training step" in text


def test_a_side_out_of_time_hides_no_other(tmp_path):
    """The one that compiles has a hundredth of a second; what was there before is kept."""
    done = models(
        tmp_path, "--work", "decode512", "--side", "eager channels_last", "sdfast triton", "compiled",
        "--compile-minutes", "0.0002",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    first, second = json.loads((tmp_path / "gpu_models.json").read_text())["rows"]
    assert set(first["sides"]) == {"eager channels_last", "sdfast triton"} and first["failed"] == {}
    assert first["sides"]["sdfast triton"]["first_again_seconds"] > 0
    assert second["failed"] == {"compiled": "load: not done within 0 s"} and set(second["sides"]) == {
        "sdfast triton"
    }


def test_a_run_out_of_time_says_so(tmp_path):
    models(tmp_path, "--work", "decode512", "--side", "eager", "--minutes", "0")
    (row,) = json.loads((tmp_path / "gpu_models.json").read_text())["rows"]
    assert row["failed"] == {"eager": "reference, the time of the run was over"}


@pytest.fixture
def run_of_two_rounds(tmp_path):
    options = parse(["--tiny", "--rounds", "2", "--side", "eager", "sdfast", "sdfast triton"])
    (tmp_path / "sd15.pt").touch()  # the reference is there
    return Benchmark(options, tmp_path)


def test_a_fault_is_recorded_and_named(run_of_two_rounds, monkeypatch):
    """One side is too far from the reference, one dies while it is timed; the others' times are kept."""
    run, times = run_of_two_rounds, iter((9.0, 9.0, 4.0, 2.0, 3.0))

    def ask(name, request):
        if request == "load":
            return loaded(2e-3 if name == "sdfast triton" else 1e-3)
        if request == "time" and name == "sdfast" and run.asked.count((name, request)) > 2:
            raise WorkerError("time: its process ended with exit code -9")
        return next(times) if request == "time" else {}

    answer(run, ask, monkeypatch)
    run.measure("sd15", ("eager", "sdfast", "sdfast triton"))
    (row,) = run.rows
    assert set(row["sides"]) == {"eager"} and row["sides"]["eager"]["ms"] == 3.5
    assert row["failed"] == {
        "sdfast triton": "error 2.0e-03 exceeds 1.5 times eager's, 1.0e-03",
        "sdfast": "time: its process ended with exit code -9",
    }
    assert len(run.faults) == 2


@pytest.mark.parametrize("samples", [0, 1, 2, 3, 4])
def test_time_that_runs_out_takes_nothing_away(run_of_two_rounds, monkeypatch, samples):
    """It is over after so many times were taken: all sides that were loaded are in the record."""
    run, times = run_of_two_rounds, iter((9.0, 6.0, 4.0, 2.0))

    def ask(name, request):
        if request == "load":
            return loaded(1e-3)
        if request == "time" and sum(asked[1] == "time" for asked in run.asked) <= samples:
            return next(times)
        raise OutOfTime("the time of the run was over")

    answer(run, ask, monkeypatch)
    run.measure("sd15", ("eager", "sdfast"))
    eager, ours = (run.rows[0]["sides"][name] for name in ("eager", "sdfast"))
    assert run.faults == [] and eager["error"] == ours["error"] == 1e-3
    assert eager.get("ms") == (None, 9.0, 9.0, 4.0, 4.0)[samples]
    assert ours.get("ratio") == (None, None, 1.5, 1.5, 2.0)[samples]
    assert described(run.rows[0]).count("not timed") == max(0, 2 - samples)
    assert "\n".join(gpu_models_lines({**CARD, "eager_model": "", "triton_kernels": {}, "rows": run.rows}))


def test_compiled_is_measured_after_the_first_work_and_last(run_of_two_rounds, monkeypatch):
    """Beside ours, which are not loaded anew; after the others for what matters less."""
    run = run_of_two_rounds
    run.options.side = ["eager", "sdfast", "compiled"]
    run.sides = {name: Silent(name, run.folder) for name in ("reference", *run.options.side)}
    run.works = {f"work{i}": run.works["sd15"] for i in range(4)}
    run.options.work = list(run.works)
    for work in run.works:
        (run.folder / f"{work}.pt").touch()
    answer(run, lambda name, request: loaded(1e-3) if request == "load" else 1.0, monkeypatch)
    monkeypatch.setattr(run, "attempt", lambda row, what, do: "profile" in what or (do(), True)[1])
    run.run()
    measured = [(row["name"][-1], "compiled" in row["sides"]) for row in run.rows]
    assert measured == [("0", False), ("0", True), *((str(i), c) for c in (False, True) for i in range(1, 4))]
    loads = [asked for asked in run.asked if asked[1] == "load"]
    assert loads[:4] == [(name, "load") for name in ("eager", "sdfast", "compiled", "eager")]


def loaded(error):
    return {"first_seconds": 1.0, "error": error, "peak_bytes": None}


class Silent:
    """In the place of a side's process."""

    def __init__(self, name, folder):
        self.name, self.caches = name, folder / name

    def start(self):
        pass

    end = start


def answer(run, ask, monkeypatch):
    """Let `ask` answer for every side's process; `run.asked` keeps who was asked for what."""
    run.asked = []

    def asked(name, request, *arguments):
        run.asked.append((name, request))
        return ask(name, request)

    monkeypatch.setattr(run, "ask", asked)


class Faulty:
    """A server whose device may fail, at once or later, and then fails for good, as CUDA's does."""

    def __init__(self):
        self.broken = False

    def fail(self, *, later=False):
        self.broken = True
        if not later:
            raise RuntimeError("an illegal memory access")
        return "seems right"

    def fail_later(self):
        return self.fail(later=True)

    def refuse(self):
        raise ValueError("not this one")

    def process(self):
        return os.getpid()

    def settle(self):
        if self.broken:
            raise RuntimeError("an illegal memory access")

    def unload(self):
        pass


def test_a_device_error_ends_its_process_and_is_not_blamed_on_what_comes_next():
    worker = Worker(Faulty, ())
    try:
        first = worker.ask(60, "process")
        with pytest.raises(WorkerError, match="refuse: ValueError: not this one"):
            worker.ask(60, "refuse")
        assert worker.ask(60, "process") == first
        for request in ("fail", "fail_later"):
            with pytest.raises(WorkerError, match=f"{request}: .*illegal memory.*process was ended"):
                worker.ask(60, request)
            assert worker.ask(60, "process") != first
    finally:
        worker.end()


class Answers:
    """In the place of an operation's process: what it says to (case, compiled), in order; keeps what it was asked."""

    asked = []

    def __init__(self, **said):
        self.said = said

    def ask(self, seconds, request, index, compiled):
        type(self).asked.append((index, compiled))
        answer = self.said["compiled" if compiled else "eager"]
        if isinstance(answer, Exception):
            raise answer
        return answer


TIMES = {"eager_ms": 2.0, "triton_ms": 1.0, "ratio": 2.0, "gb_per_s": 1.0, "tflop_per_s": 1.0}


def operations(monkeypatch, first, second):
    """The last record of a run of two operations with these answers."""
    monkeypatch.setattr(Answers, "asked", [])
    kept = []
    cases = [bench_gpu.layer_norm(8, 64), bench_gpu.linear(8, 32, 64)]
    run = bench_gpu.Run(cases, {"layer_norm": first, "linear": second}, (2.0, 4.0), kept.append)
    run.measure((0, 1), "float16", time.monotonic() + 60)
    run.measure_compiled(time.monotonic() + 60)
    return kept[-1]


def test_torch_compile_comes_after_all_that_is_beside_eager(monkeypatch):
    good = Answers(eager=TIMES, compiled={**TIMES, "compiled_ms": 1.5, "ratio": 1.5})
    rows = operations(monkeypatch, good, good)
    assert Answers.asked == [(0, False), (1, False), (0, True), (1, True)]
    assert [(row["ratio"], row["of_ceiling"]) for row in rows] == [(1.5, 0.5)] * 2


def test_an_operation_that_fails_is_recorded_as_failed(monkeypatch):
    """Whatever its exception is called; time that is over is no fault, and takes no time away."""
    fault = WorkerError("measure: OutOfResources: out of resource: shared memory")
    late = OutOfTime("the time of the run was over")
    bad, good = operations(monkeypatch, Answers(eager=fault), Answers(eager=TIMES, compiled=late))
    assert bad["failed"] == str(fault) and "ratio" not in bad
    assert good["ratio"] == 2.0 and good["compiled_not_measured"] == str(late)
    assert not any("failed" in key for key in good)
    text = "\n".join(operations_lines({**CARD, "rows": [bad | {"shape": "8x64"}]}))
    assert f"- Failed: layer_norm, 8x64: {fault}." in text


def test_a_failed_operation_makes_the_exit_status(monkeypatch, tmp_path):
    fault = WorkerError("measure: OutOfResources: out of resource: shared memory")
    monkeypatch.setattr(bench_gpu.Worker, "ask", lambda self, *request: (_ for _ in ()).throw(fault))
    with pytest.raises(SystemExit) as error:
        bench_gpu.main(["--tiny", "--only", "linear", "--output", str(tmp_path)])
    assert error.value.code == 1
    (row,) = json.loads((tmp_path / "operations.json").read_text())["rows"]
    assert row["failed"] == str(fault)


def test_profile_of_kernels_that_overlap_and_wait():
    spans = [Span("a", 0, 10), Span("b", 5, 20), Span("a", 30, 40), Span("c", 32, 35)]
    found = summary(reversed(spans))
    assert found["launches"] == 4 and found["span_ms"] == 0.04 and found["idle_share"] == 0.25
    assert [(k["kernel"], k["calls"], k["ms"]) for k in found["kernels"]] == [
        ("a", 2, 0.02), ("b", 1, 0.015), ("c", 1, 0.003)
    ]  # fmt: skip
    rest = summary([Span(f"k{i}", i, i + 1) for i in range(40)])["kernels"][-1]
    assert (rest["kernel"], rest["calls"], round(rest["share"], 6)) == ("10 others", 10, 0.25)
    assert summary([])["launches"] == 0


def test_every_kernel_has_a_call():
    done = run("tests/each_kernel.py")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
