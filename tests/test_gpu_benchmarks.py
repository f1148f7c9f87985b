"""The benchmarks of a GPU and `make gpu`, tried out without one; their times are nobody's business here."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

OutOfResources = pytest.importorskip("triton.runtime.errors").OutOfResources

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_gpu  # noqa: E402
import gpu_check  # noqa: E402
import report  # noqa: E402
import tune_launches  # noqa: E402
from _gpu_process import OutOfTime, Worker, WorkerError  # noqa: E402
from _gpu_profile import Span, summary  # noqa: E402
from _gpu_works import WORKS  # noqa: E402
from _report_gpu import GOALS, goals_lines, gpu_models_lines, operations_lines, traffic_lines  # noqa: E402
from bench_gpu_models import Benchmark, described, parse  # noqa: E402

from sdfast import testing  # noqa: E402
from sdfast.ops import _launch_table  # noqa: E402

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


def test_compiled_is_measured_after_each_of_the_first_works(run_of_two_rounds, monkeypatch):
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
    assert measured == [*((str(i), c) for i in range(3) for c in (False, True)), ("3", False), ("3", True)]
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


def test_parts_of_make_gpu(tmp_path, monkeypatch):
    """A red part, one without end, and one whose program is absent stop no other."""
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 1.0)
    python = [sys.executable, "-c"]
    parts = {
        "tests": gpu_check.Part([*python, "print('seen'); raise SystemExit(3)"], 0.5),
        "kernels": gpu_check.Part([*python, "import time; time.sleep(60)"], 0.05),
        "models": gpu_check.Part([*python, "import sys; print(sys.argv[1])"], None),
        "memcheck": gpu_check.Part([*python, ""], 0.5, "no-such-program"),
        "racecheck": gpu_check.Part([*python, ""], 0.2),
    }
    results = gpu_check.run_all(parts, 0.5, tmp_path)
    assert [result.status for result in results.values()] == [
        "failed", "took too long", "passed", "no-such-program is not installed", "passed"
    ]  # fmt: skip
    assert gpu_check.last_lines(tmp_path / "tests.log", 9) == "  seen"
    assert gpu_check.last_lines(tmp_path / "models.log", 9) == "  --minutes"
    assert list(gpu_check.parts(tmp_path, tiny=False)) == [
        "kernels", "tests", "operations", "models", "memcheck", "racecheck",
    ]  # fmt: skip


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_part_over_its_time_says_what_it_has(tmp_path, monkeypatch, stubborn):
    """It is interrupted first; what does not heed that, it or a process that it started, is killed."""
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 4.0)
    code = f"""
        import os, signal, subprocess, sys, time
        ignored = "import signal, time; signal.signal(2, signal.SIG_IGN); print('child', flush=True); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", ignored], stdout=subprocess.PIPE)
        child.stdout.readline()
        print(child.pid, flush=True)
        # Who started the tests may ignore interrupts, as a shell does for what it runs in the background.
        signal.signal(signal.SIGINT, signal.SIG_IGN if {stubborn} else signal.default_int_handler)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            print("two failures", flush=True)
    """
    part = gpu_check.Part([sys.executable, "-c", textwrap.dedent(code)], 1.0)
    result = gpu_check.run(part, 9.0, tmp_path / "log")
    assert result.status == "took too long" and result.seconds < 20
    child, *said = (tmp_path / "log").read_text().splitlines()
    assert said == ([] if stubborn else ["two failures"])
    for _ in range(50):
        if not running(int(child)):
            return
        time.sleep(0.1)
    raise AssertionError("the part's child is still there")


def running(pid):
    """Whether there is such a process, one that nobody has waited for apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def test_whole_models_have_what_later_parts_leave(tmp_path, monkeypatch):
    bounds = {}

    def run(part, seconds, log):
        bounds[log.stem] = round(seconds)
        return gpu_check.Result("passed", 0.0, log)

    monkeypatch.setattr(gpu_check, "run", run)
    parts = {"tests": gpu_check.Part([], 0.3), "models": gpu_check.Part([], None)}
    sanitized = {name: gpu_check.Part([], 0.1, "sanitizer") for name in ("memcheck", "racecheck")}
    monkeypatch.setattr(gpu_check, "find", lambda program: program)
    gpu_check.run_all({**parts, **sanitized}, 10, tmp_path)
    assert gpu_check.own_time("operations", 83) == ["--minutes", "1.00"]
    assert bounds == {"tests": 180, "models": 480, "memcheck": 60, "racecheck": 600}
    monkeypatch.setattr(gpu_check, "find", lambda program: None)
    gpu_check.run_all({**parts, **sanitized}, 10, tmp_path)
    assert bounds["models"] == 600


def test_a_program_is_found_in_the_folders_of_cuda(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check.find("sanitizer-of-a-test") is None
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "sanitizer-of-a-test"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert gpu_check.find("sanitizer-of-a-test") == str(program)


def test_the_commit_of_a_copy_is_what_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setattr(testing, "__file__", str(tmp_path / "testing.py"))
    assert testing.environment()["commit"] == "unknown"
    monkeypatch.setenv("SDFAST_COMMIT", "abc1234")
    assert testing.environment()["commit"] == "abc1234"


CARD = {
    "card": {"driver_version": "580", "clocks.max.sm": "1980"},
    "ceilings": {"copy_gb_per_s": 4300.0, "matrix_tflop_per_s": 790.0},
    "versions": {"torch": "2", "triton": "3", "diffusers": None},
}  # fmt: skip


def test_report_of_operations():
    row = {"op": "linear", "shape": "8x8", "dtype": "bfloat16"}
    times = {"eager_ms": 2.0, "compiled_ms": 1.5, "triton_ms": 1.0, "ratio": 1.5, "of_ceiling": 0.5}
    text = "\n".join(
        operations_lines({**CARD, "rows": [{**row, **times}, {**row, "not_measured": "no kernel"}]})
    )
    assert "| linear | 8x8 | bfloat16 | 2.0000 | 1.5000 | 1.0000 | 1.50x | 50% |" in text
    assert "- Not measured: linear, 8x8: no kernel." in text
    assert (
        "a copy moved 4300 GB/s, a matrix product 790 TFLOP/s; at most 1980 MHz, driver 580. torch 2, triton 3."
        in text
    )


def test_report_of_goals():
    assert set(GOALS) <= {work.title for work in WORKS.values()}
    assert sum("| not measured | not measured |" in line for line in goals_lines([])) == len(GOALS)
    row = {"work": "VAE decode to 512x512", "sides": {"compiled": {"ms": 7.0}, "sdfast triton": {"ms": 4.5}}}
    record = {
        "environment": {"gpu": "H200"},
        "rows": [row, {**row, "sides": {"sdfast": {"first_seconds": 1}}}],
    }
    text = "\n".join(goals_lines([record]))
    assert "| VAE decode to 512x512 | H200 | 7.00 ms | 4.50 ms | 5 ms | 4 ms |" in text
    assert "| VAE decode to 512x512 | H200 | not measured | not measured | 5 ms | 4 ms |" in text


def test_report_of_models():
    profile = {
        "launches": 300, "span_ms": 4.0, "idle_share": 0.1, "waits_for": None,
        "kernels": [{"kernel": "conv", "calls": 9, "ms": 3.0, "share": 0.75}],
    }  # fmt: skip
    side = {
        "ms": 4.0, "p20_ms": 3.9, "p80_ms": 4.1, "error": 1e-3, "peak_bytes": 2**31, "first_seconds": 30.0,
        "compiled_before": False,
    }  # fmt: skip
    row = {
        "work": "U-Net", "dtype": "bfloat16", "failed": {"compiled": "load: not done within 600 s"},
        "sides": {
            "eager": side,
            "sdfast": {**side, "ratio": 2.0, "beside": "eager", "first_again_seconds": 3.0, "profile": profile},
        },
    }  # fmt: skip
    kernels = {"linear": True, "conv2d": False}
    text = "\n".join(
        gpu_models_lines({**CARD, "eager_model": "diffusers", "triton_kernels": kernels, "rows": [row]})
    )
    assert (
        "| U-Net | bfloat16 | sdfast | 4.00 | 3.90–4.10 | **2.00x** of eager | 1.0e-03 | 2.0 GiB | 300 | 10% |"
        in text
    )
    assert "| U-Net | sdfast | 30.0 | 3.0 |" in text and "- No Triton kernel: conv2d." in text
    assert "- U-Net, compiled: load: not done within 600 s." in text
    assert (
        "U-Net, sdfast: 300 launches in 4.00 ms, of which 10.0% idle; nothing waits for the device." in text
    )
    assert "| `conv` | 9 | 3.000 | 75.0% |" in text


def test_report_names_the_last_run_on_each_gpu():
    def record(gpu, date):
        return {"card": {}, "environment": {"gpu": gpu, "date": f"{date}T10:00:00"}}

    dates = (("H100", "2026-02-03"), ("H100", "2026-01-02"), ("H200", "2026-01-05"))
    line = report._gpu_line({str(i): record(*run) for i, run in enumerate(dates)})
    assert line == "Last run on a GPU: H100, 2026-02-03, H200, 2026-01-05."


def test_the_readme_says_what_the_records_say_of_gpus():
    text = (ROOT / "README.md").read_text()
    paths = (ROOT / "benchmarks/results").glob("*/*.json")
    records = {f"{path.parent.name}/{path.name}": json.loads(path.read_text()) for path in paths}
    said = text.split(report._GPU_BEGIN)[1].split(report._GPU_END)[0]
    assert said.strip() == f"**{report._gpu_line(records)}**"
    assert (
        report.between(report._GPU_BEGIN, report._GPU_END, ["new"], text).count("new\n" + report._GPU_END)
        == 1
    )


def test_report_of_compiled_code():
    """A line an operation, of the kernel that needs most."""

    def row(op, registers, shared, matrix=False, stack=0):
        names = ("op", "kernel", "registers", "shared_bytes", "stack_bytes", "matrix")
        return dict(zip(names, (op, "kernel", registers, shared, stack, matrix), strict=True))

    record = {
        "command": "python tests/cuda_code.py", "environment": {"nvcc": "13.0.88", "commit": "abc"},
        "architectures": ["80", "90a"],
        "rows": [row("conv2d", [40, 168], [0, 512], True), row("conv2d", [64, None], [128, None]),
                 row("linear", [20, 22], [0, 0], stack=8)],
    }  # fmt: skip
    lines = report.cuda_code_lines(record)
    assert "| op | kernels | matrix | sm_80 | sm_90a | shared bytes | stack bytes |" in lines
    assert lines[-2:] == [
        "| `conv2d` | 2 | 1 | 64 | 168 | 512 | 0 |",
        "| `linear` | 1 |  | 20 | 22 | 0 | 8 |",
    ]


def test_report_of_traffic():
    row = {
        "case": "linear bf16", "op": "linear_rows", "launches": 2, "copies": 0, "moved_bytes": 2**21,
        "least_bytes": 2**20, "ratio": 2.0, "flop": 2**21,
    }  # fmt: skip
    record = {
        "command": "c",
        "environment": {"triton": "3", "commit": "1"},
        "rows": [row, {**row, "case": "linear fp16"}],
    }
    text = "\n".join(traffic_lines(record))
    assert (
        "| linear bf16 | `linear_rows` | 2 | 2.00 | 1.00 | 2.00x | 0.00 | 2 |" in text and "fp16" not in text
    )
