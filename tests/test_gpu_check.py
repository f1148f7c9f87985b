"""`make gpu`: parts that fail, that do not end, that cannot be there."""

import sys
import textwrap
import time
from pathlib import Path

import gpu_check
import pytest

from sdfast import testing


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
        "kernels", "tests", "compiled", "operations", "models", "memcheck", "racecheck", "compiled-memcheck",
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
