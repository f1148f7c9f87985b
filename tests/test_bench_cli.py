"""`sdfast bench`: what it writes, what it refuses, and how two records compare."""

import contextlib
import json
import subprocess
import sys

import bench_records
import pytest

from sdfast import cli
from sdfast.bench import operations, record, suite, tables
from sdfast.bench.plan import Planned
from sdfast.bench.request import DTYPES, ENGINES, OPS, PARTS, Request


@pytest.fixture
def bench(capsys):
    """Runs the command; returns its status and what it said."""

    def run(*arguments):
        status = cli.main(["bench", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    "arguments, got, allowed",
    [
        (["kernels"], "'kernels'", PARTS),
        (["--dtype", "float32,int8"], "'int8'", DTYPES),
        (["--dtype", ","], "nothing", DTYPES),
        (["--against", "tensorrt"], "'tensorrt'", ENGINES),
        (["--only", "conv3d"], "'conv3d'", OPS),
    ],
)
def test_bad_names_list_what_is_allowed(bench, arguments, got, allowed):
    status, out, err = bench(*arguments)
    assert status == 2 and out == ""
    assert f"got {got}, expected one of {', '.join(allowed)}" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seconds", "0"], "--seconds: got 0.0"),
        (["--rounds", "0"], "--rounds"),
        (["--device", "abacus"], "--device: 'abacus' cannot be used"),
        (["--fail-over", "10%"], "--fail-over: needs compare"),
        (["compare", "a.json"], "bench compare: got 1 files, expected two"),
        (["compare", "/nowhere/a.json", "/nowhere/b.json"], "/nowhere/a.json"),
        (["--output", __file__], "is no folder"),
        (["models", "--only", "conv2d"], "--only: names operations of the part ops, which models is without"),
        (["--threads", "100000"], "--threads: got 100000, expected 1 to 1024"),
    ],
)
def test_bad_arguments_are_one_line(bench, arguments, message):
    status, out, err = bench(*arguments)
    assert status == 2 and message in err and err.count("\n") == 1 and out == ""


def test_mistakes_are_answered_without_torch():
    code = "import sys; from sdfast import cli; assert cli.main(['bench', 'x']) == 2; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_run_writes_json_markdown_and_a_page(bench, tmp_path):
    status, out, err = bench(
        "ops", "--quick", "--only", "layer_norm,add_noise", "--dtype", "float32,bfloat16", "--seconds", "0.01", "--threads", 1,
        "-o", tmp_path / "{machine}",
    )  # fmt: skip
    assert status == 0, err
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"bench.json", "bench.md", "bench.html"}
    result = record.read(folder / "bench.json")
    expected = {(f"{spec.op} {spec.name}", dtype) for dtype in DTYPES[:2]
                for spec in operations.specs(("layer_norm", "add_noise"), quick=True)}  # fmt: skip
    assert {(row["name"], row["dtype"]) for row in result["rows"]} == expected
    for row in result["rows"]:
        assert set(row["sides"]) == {"eager", "sdfast"}
        for side in row["sides"].values():
            assert (
                0 < side["p20_ms"] <= side["ms"] <= side["p80_ms"]
                and side["first_ms"] > 0
                and side["error"] > 0
            )
        beside = row["ratios"]["eager"]
        assert beside["low"] <= beside["ratio"] <= beside["high"]
        assert row["of_copy"] > 0 and row["of_peak"] > 0
        assert row["name"] in out and row["name"] in (folder / "bench.md").read_text()
    assert result["environment"]["threads"] == 1 and result["limits"]["copy_gb_per_s"] > 0
    assert result["limits"]["peak_gflop_per_s"].keys() == set(DTYPES[:2])


def test_a_wrong_kernel_is_named_and_the_status_says_so(bench, tmp_path, monkeypatch):
    def wrong(spec, dtype, request):
        raise AssertionError("error 1.0e+00 exceeds 1.0e-07")

    monkeypatch.setattr(operations, "measured", wrong)
    status, out, _ = bench("ops", "--quick", "--only", "layer_norm", "-o", tmp_path)
    assert status == 1 and "FAILED: AssertionError: error 1.0e+00 exceeds" in out
    assert "FAILED: layer_norm 2x4096x320, float32" in (tmp_path / "bench.md").read_text()
    assert "FAILED" in (tmp_path / "bench.html").read_text()


def test_a_quick_run_leaves_out_what_its_time_does_not_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "QUICK_SECONDS", 0.0)
    request = Request(parts=("ops", "images"), quick=True, against=("openvino",), output=tmp_path)
    said = []
    result = suite.run(request, "sdfast bench", said.append)
    assert result["left_out"] == [
        "openvino: takes part in models alone", "ops: the time of a quick run was over", "images: the time of a quick run was over"
    ]  # fmt: skip
    assert "left out: ops: the time of a quick run was over" in said
    assert "images: the time of a quick run was over" in (tmp_path / "bench.md").read_text()


def test_what_breaks_off_leaves_the_rows_before_it(tmp_path, monkeypatch):
    def plan(part, request):
        yield planned("linear 2x1280 to 1280")
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "plan_of", plan)
    with pytest.raises(KeyboardInterrupt):
        suite.run(Request(parts=("ops",), output=tmp_path), "sdfast bench", lambda line: None)
    assert [row["name"] for row in record.read(tmp_path / "bench.json")["rows"]] == ["linear 2x1280 to 1280"]


def planned(name, measure=lambda: {}):
    row = bench_records.operation(name)
    return Planned({key: row.pop(key) for key in ("part", "name", "dtype")}, lambda: {**row, **measure()})


def failing():
    raise RuntimeError("no memory")


@pytest.fixture
def at_commit(monkeypatch):
    """Lets a record be of this commit."""
    described = suite.machine.description

    def at(commit):
        monkeypatch.setattr(
            suite.machine, "description", lambda *a, **k: {**described(*a, **k), "commit": commit}
        )

    at("abc1234")
    return at


@pytest.fixture
def resumed(tmp_path, monkeypatch, at_commit):
    """Runs a plan, given as {name: measure}; returns the names measured and the record."""

    def run(plan, **settings):
        measured = []

        def noting(name, measure):
            def note():
                measured.append(name)
                return measure()

            return planned(name, note)

        monkeypatch.setattr(suite, "plan_of", lambda part, request: (noting(*each) for each in plan.items()))
        request = Request(parts=("ops",), output=tmp_path, resume=settings.pop("resume", True))
        with contextlib.suppress(KeyboardInterrupt):
            suite.run(request, settings.pop("command", "sdfast bench"), lambda line: None)
        return measured, record.read(tmp_path / "bench.json")

    return run


def test_resuming_measures_what_is_missing_or_failed(resumed):
    assert resumed({"linear a": dict, "linear b": failing, "linear c": dict}, resume=False)[0] == [
        "linear a",
        "linear b",
        "linear c",
    ]
    measured, result = resumed({"linear a": dict, "linear b": dict, "linear c": dict, "linear d": dict})
    assert measured == ["linear b", "linear d"]
    assert [row["name"] for row in result["rows"]] == ["linear a", "linear b", "linear c", "linear d"]
    assert not any("failed" in row for row in result["rows"])
    assert resumed({"linear a": dict}, resume=False)[0] == ["linear a"]


def test_resuming_loses_nothing_where_it_breaks_off_again(resumed):
    def interrupted():
        raise KeyboardInterrupt

    resumed({"linear a": failing, "linear b": dict}, resume=False)
    _, result = resumed({"linear a": dict, "linear between": interrupted, "linear b": dict})
    assert [row["name"] for row in result["rows"]] == ["linear a", "linear b"]
    measured, result = resumed({"linear a": dict, "linear between": dict, "linear b": dict})
    assert measured == ["linear between"] and [row["name"] for row in result["rows"]] == [
        "linear a",
        "linear between",
        "linear b",
    ]


def test_resuming_another_run_is_refused(resumed, at_commit):
    resumed({"linear a": dict}, resume=False)
    with pytest.raises(ValueError, match=r"--resume: .*bench.json was made with command 'sdfast bench', and"):
        resumed({"linear a": dict}, command="sdfast bench --rounds 7")
    at_commit("def5678")
    with pytest.raises(ValueError, match="made with commit 'abc1234', and this is 'def5678'; leave --resume"):
        resumed({"linear a": dict})
    at_commit("abc1234+changes")
    with pytest.raises(ValueError, match="the source tree has changes"):
        resumed({"linear a": dict})


def test_resuming_keeps_what_failed_until_it_is_measured(resumed):
    def interrupted():
        raise KeyboardInterrupt

    resumed({"linear a": dict, "linear b": failing}, resume=False)
    _, result = resumed({"linear a": dict, "linear b": interrupted})
    assert [row.get("failed") for row in result["rows"]] == [None, "RuntimeError: no memory"]
    _, result = resumed({"linear a": dict, "linear b": lambda: {"ended": ["openvino"]}})
    assert [row.get("ended") for row in result["rows"]] == [None, ["openvino"]]
    assert resumed({"linear a": dict, "linear b": dict})[0] == ["linear b"]


def test_an_interruption_says_how_to_go_on(bench, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sdfast.bench.suite.run", interrupted)
    status, _, err = bench("ops", "-o", tmp_path)
    assert status == 130 and err == f"\nsdfast: interrupted; --resume goes on with {tmp_path}\n"


def test_resume_is_told_and_not_recorded(bench, tmp_path, monkeypatch, at_commit):
    arguments = ("ops", "--quick", "--only", "add_noise", "--dtype", "float32", "-o", tmp_path)
    records = []
    for told in (arguments, (*arguments, "--resume")):
        monkeypatch.setattr(sys, "argv", ["sdfast", "bench", *map(str, told)])
        bench(*told)
        records.append(record.read(tmp_path / "bench.json"))
    first, second = records
    assert first["command"] == "sdfast bench ops --quick --only add_noise --dtype float32"
    assert first["rows"] and second["rows"] == first["rows"] and second["command"] == first["command"]
    assert second["seconds"] > first["seconds"]


@pytest.fixture
def files(tmp_path):
    """Writes records; returns their paths."""

    def write(*records):
        paths = [tmp_path / f"{index}.json" for index in range(len(records))]
        for path, one in zip(paths, records, strict=True):
            record.write(path, one)
        return paths

    return write


SLOWER = bench_records.operation(ours=(1.5e-3,) * 5)


def test_compare_names_what_got_slower(bench, files):
    before, after = bench_records.record(bench_records.operation()), bench_records.record(SLOWER)
    status, out, _ = bench("compare", *files(before, after))
    assert status == 0
    assert (
        "slower: linear 2x1280 to 1280, float32: 1 to 1.5 ms, 1.50x the time; beside eager 2.00x to 1.33x"
        in out
    )
    assert "1 rows: 1 slower, 0 faster" in out


@pytest.mark.parametrize("threshold, status", [("10%", 1), ("49", 1), ("60%", 0)])
def test_compare_fails_over_a_threshold(bench, files, threshold, status):
    paths = files(bench_records.record(bench_records.operation()), bench_records.record(SLOWER))
    assert bench("compare", *paths, "--fail-over", threshold)[0] == status


def test_compare_does_not_blame_a_busy_machine(bench, files):
    """Everything takes twice as long, eager too."""
    busy = bench_records.operation(ours=(2e-3,) * 5, eager=(4e-3,) * 5)
    status, out, _ = bench(
        "compare",
        *files(bench_records.record(bench_records.operation()), bench_records.record(busy)),
        "--fail-over",
        "10%",
    )
    assert status == 0 and "0 slower, 0 faster, 1 within" in out


def test_compare_tells_other_machines_and_rows_that_are_gone(bench, files):
    gone = bench_records.operation("linear 7x7 to 7")
    before = bench_records.record(bench_records.operation(), gone)
    out = bench("compare", *files(before, bench_records.record(bench_records.operation(), threads=4)))[1]
    assert "not the same machine: threads 2 and 4" in out and "gone: linear 7x7 to 7, float32" in out


def test_compare_refuses_what_it_cannot_compare(bench, files, tmp_path):
    one = bench_records.record(bench_records.operation())
    assert "have no measured row in common" in bench("compare", *files(one, bench_records.record()))[2]
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"rows": []}))
    assert "not a record of `sdfast bench`" in bench("compare", other, other)[2]
    other.write_text("{")
    assert "not JSON" in bench("compare", other, other)[2]


@pytest.mark.parametrize("text", ["ten", "-1%", "inf"])
def test_thresholds_are_percentages(bench, files, text):
    paths = files(*[bench_records.record(bench_records.operation())] * 2)
    assert "--fail-over: got" in bench("compare", *paths, f"--fail-over={text}")[2]


def test_lines_say_who_was_skipped_and_why():
    line = tables.line(bench_records.model())
    assert "sdfast 1e+03 ms" not in line and "sdfast 1000 ms; eager 2100 ms, 2.10x" in line
    assert line.endswith("; ONNX Runtime skipped: not installed; pip install x")
