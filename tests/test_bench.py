"""What `sdfast bench` measures: cases are verified, wrong ones refused, engines run and are named when absent."""

import base64
import io
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sdfast
from sdfast import _library
from sdfast.bench import breakdown, engines, images, machine, models, operations, process, training
from sdfast.bench.case import measure
from sdfast.bench.engines import Task
from sdfast.bench.request import ENGINES, OPS, Request, missing
from sdfast.bench.timing import ratio
from sdfast.bench.works import TINY_WORKS
from sdfast.testing import relative_error

PACKAGE = Path(sdfast.__file__).parent

# The cheapest of each operation.
CHEAP = {
    "conv2d": "2x1280x8x8 to 1280 3x3", "linear": "2x1280 to 1280", "attention": "1x12x77x77x64 causal gradients",
    "group_norm": "2x1280x16x16 SiLU gradients", "layer_norm": "2x64x1280 gradients",
    "diffusion_step": "1x4x64x64 guided step, noise drawn", "add_noise": "1x4x64x64 velocity",
    "reparameterize": "1x4x64x64 gradients",
}  # fmt: skip


def cheap(op):
    return next(spec for spec in operations.specs([op]) if spec.name == CHEAP[op])


def test_the_interval_holds_the_ratio_and_repeats():
    generator = np.random.default_rng(3)
    ours = generator.uniform(1, 1.2, 101)
    theirs = 2 * ours * np.exp(generator.normal(0, 0.05, 101))
    found = ratio(theirs, ours)
    assert found["low"] < found["ratio"] < found["high"] and found["low"] < 2 < found["high"]
    assert found["high"] - found["low"] < 0.1 and found["p20"] < found["low"]
    assert ratio(theirs, ours) == found
    assert ratio([3.0], [1.5]) == {"ratio": 2, "low": 2, "high": 2, "p20": 2, "p80": 2}


def test_every_operation_has_cases_of_its_own_and_quick_ones():
    assert tuple(dict.fromkeys(spec.op for spec in operations.specs())) == OPS
    names = [(spec.op, spec.name) for spec in operations.specs()]
    assert len(set(names)) == len(names)
    assert {spec.op for spec in operations.specs(quick=True)} == set(OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_case_is_verified_and_timed(op, dtype):
    case = cheap(op).make(dtype, "cpu")
    row = measure(case, "cpu", 0.01, 100.0)
    assert 0 < row["sides"]["sdfast"]["error"] < (1e-4 if dtype == torch.float32 else 1e-2)
    assert row["rounds"] >= 5 and row["gflop_per_s"] > 0 and row["bytes"] > 0
    assert row["of_peak"] == pytest.approx(row["gflop_per_s"] / 100)
    assert ("of_copy" in row) == (op not in ("conv2d", "linear", "attention"))
    assert row["shape"] and (case.training == ("gradients" in CHEAP[op]))


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_result_is_refused(op):
    case = cheap(op).make(torch.float32, "cpu")
    right = case.ways["sdfast"]
    case.ways["sdfast"] = lambda: [1.001 * result for result in right()]
    with pytest.raises(AssertionError, match=r"error \S+ exceeds"):
        measure(case, "cpu", 0.01, 100.0)


def test_a_failed_case_hides_no_other(monkeypatch):
    specs = [cheap("layer_norm"), cheap("linear")]
    monkeypatch.setattr(operations, "specs", lambda only, quick: specs)
    real = operations.measured

    def measured(spec, dtype, request):
        if spec.op == "layer_norm":
            raise RuntimeError("broken\nmore")
        return real(spec, dtype, request)

    monkeypatch.setattr(operations, "measured", measured)
    first, second = (row.measured() for row in operations.planned(Request(seconds=0.01)))
    assert first["failed"] == "RuntimeError: broken" and "sides" in second


def test_a_named_backend_serves_ours():
    request = Request(seconds=0.01, backend="torch")
    row = operations.measured(cheap("linear"), torch.float32, request)
    assert row["sides"]["sdfast"]["error"] == row["sides"]["eager"]["error"]


def test_compile_takes_no_part_in_gradients_and_says_so():
    row = operations.measured(cheap("layer_norm"), torch.float32, Request(seconds=0.01, against=("compile",)))
    assert "gradients" in row["skipped"]["compile"] and set(row["sides"]) == {"eager", "sdfast"}


def task(work, tmp_path, dtype="float32"):
    return Task("tiny", work, dtype, "cpu", tmp_path, 1)


@pytest.mark.parametrize("name", ["eager-contiguous", "sdfast", "sdfast-low", "sdfast-optimize"])
@pytest.mark.parametrize("work", TINY_WORKS)
def test_engines_give_what_eager_gives(name, work, tmp_path):
    assert engines.ENGINES.keys() - {"sdfast"} == ENGINES.keys()
    expected = engines.load_eager(task(work, tmp_path), lambda: None)()
    result = engines.ENGINES[name](task(work, tmp_path), lambda: None)()
    assert relative_error(result, expected) < 1e-4


def test_tiles_of_diffusers_give_another_picture(tmp_path):
    """As large as the whole, and off by more than rounding: each tile has statistics of its own."""
    expected = engines.load_eager(task("vae", tmp_path), lambda: None)()
    result = engines.load_tiling(task("vae", tmp_path), lambda: None)()
    assert result.shape == expected.shape
    assert 1e-3 < relative_error(result, expected) < math.inf


@pytest.mark.parametrize(
    "name, work, dtype, reason",
    [
        ("diffusers-tiling", "unet", "float32", "tiles a VAE"),
        ("onnxruntime", "vae", "bfloat16", "has no bfloat16 on the CPU|pip install .*onnxruntime"),
        ("openvino", "vae", "float16", "has no float16 on the CPU|pip install .*openvino"),
    ],
)
def test_who_cannot_take_part_says_why(name, work, dtype, reason, tmp_path):
    assert re.search(reason, engines.why_not(name, task(work, tmp_path, dtype)))


def test_absent_packages_come_with_the_command():
    assert missing(("torch", "skimage_of_nobody", "numpy")) == "not installed; pip install skimage_of_nobody"
    assert missing(("torch",)) is None


def test_models_run_in_processes_and_skip_by_name():
    """Ours, eager and one that cannot take part."""
    row = next(models.planned(Request(against=("diffusers-tiling",), rounds=2), "tiny")).measured()
    assert row["work"] == "unet" and "failed" not in row, row
    assert set(row["sides"]) == {"eager", "sdfast"} and set(row["ratios"]) == {"eager"}
    assert row["skipped"] == {"diffusers-tiling": "tiles a VAE, and nothing else"}
    assert row["sides"]["eager"]["error"] == 0 < row["sides"]["sdfast"]["error"] < 1e-4
    for side in row["sides"].values():
        assert side["ms"] > 0 and side["first_ms"] > 0 and side["peak_bytes"] > 2**20


def test_a_model_that_is_wrong_fails(tmp_path):
    class Wrong(models.Comparison):
        def reference(self):
            return torch.ones(1, 3, 32, 32)

    with pytest.raises(AssertionError, match="exceeds 1.0e-04"):
        Wrong(task("vae", tmp_path), 1, {}).run(Request())


def test_an_engine_that_dies_says_how(tmp_path):
    """As where memory runs out."""
    with process.Engine("eager", task("vae", tmp_path)) as engine:
        assert engine() > 0
        engine.process.kill()
        with pytest.raises(process.EngineError, match=r"exit code -9 \(out of memory\?\)"):
            engine()


def test_training_compares_gradients_and_refuses_wrong_ones(monkeypatch):
    request = Request(rounds=2, against=("eager-contiguous",))
    row = next(training.planned(request, "tiny")).measured()
    assert set(row["sides"]) == {"eager", "eager-contiguous", "sdfast"}
    assert 0 < row["sides"]["sdfast"]["error"] < 1e-4 and row["ratios"]["eager"]["ratio"] > 0
    real = training.Training.gradients

    def doubled(self, name):
        return [g * 2 if name == "sdfast" else g for g in real(self, name)]

    monkeypatch.setattr(training.Training, "gradients", doubled)
    wrong = next(training.planned(request, "tiny")).measured()
    assert "a gradient's error 1.0e+00 exceeds" in wrong["failed"]


def test_images_of_both_sides_agree():
    digits, photograph = (row.measured() for row in images.planned(Request(quick=True, rounds=1)))
    assert set(digits["sides"]) == set(images.SIDES) and digits["mean_difference"] < 0.5
    eager, ours = (
        np.asarray(
            Image.open(io.BytesIO(base64.b64decode(digits["pictures"][name].split(",")[1]))), dtype=int
        )
        for name in ("eager", "sdfast")
    )
    assert eager.shape == ours.shape and eager.std() > 50  # there is something to see
    assert np.abs(eager - ours).max() == digits["largest_difference"]
    assert all(side["first_image_ms"] > side["first_ms"] for side in digits["sides"].values())
    if images.astronaut(8) is None:
        assert photograph["skipped"]["eager"].endswith("pip install scikit-image")
    else:
        assert photograph["mean_difference"] < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_breakdown_adds_up_on_both_sides(dtype):
    row = breakdown.measure(TINY_WORKS["vae"], dtype)
    for side in (row, row["eager"]):
        assert sum(op["ms"] for op in side["operations"]) == pytest.approx(side["step_ms"])
        assert "convolution" in {op["kind"] for op in side["operations"]}
    assert row["gflop"] > 0 and any("of_peak" in op for op in row["operations"])


def test_the_environment_says_what_numbers_depend_on(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = machine.description("cpu", keeps_freed_memory=True)
    assert found["variables"]["OMP_NUM_THREADS"] == "3" and found["versions"]["torch"] == torch.__version__
    assert {"cpu", "threads", "commit", "date", "allocator", "memory_bytes", "load_average"} <= found.keys()
    assert "/" not in machine.slug()


def test_generations_of_a_cpu_are_machines_of_their_own(monkeypatch):
    def named(**facts):
        monkeypatch.setattr(_library, "cpu_facts", lambda: {k.replace("_", " "): v for k, v in facts.items()})
        return machine.slug(), _library.cpu_name()

    zen4, zen5 = (named(model_name="EPYC", cpu_family=family, model="17") for family in ("25", "26"))
    assert zen4[0] == zen5[0]  # of a vendor that nothing is known of
    assert zen4[1] == "EPYC (family 25, model 17)" != zen5[1]
    monkeypatch.setattr(
        _library, "cpu_facts", lambda: {"vendor_id": "AuthenticAMD", "cpu family": "26", "model": "2"}
    )
    assert machine.slug().endswith("-amd26")
    monkeypatch.setattr(
        _library, "cpu_facts", lambda: {"vendor_id": "GenuineIntel", "cpu family": "6", "model": "143"}
    )
    assert machine.slug().endswith("-intel143")
    monkeypatch.setattr(_library, "cpu_facts", dict)
    assert machine.slug() == f"cpu-{os.cpu_count()}core-{_library.cpu_isa()}" and _library.cpu_name()


def test_a_wheel_has_all_of_the_package():
    path = PACKAGE.parent / "pyproject.toml"
    if not path.exists():
        pytest.skip("not a source tree")
    tomllib = pytest.importorskip("tomllib")  # Python 3.10 has none
    settings = tomllib.loads(path.read_text())["tool"]["setuptools"]
    folders = {str(p.parent.relative_to(PACKAGE.parent)).replace("/", ".") for p in PACKAGE.rglob("*.py")}
    assert folders == set(settings["packages"])
    data = settings["package-data"]["sdfast"]
    assert all((PACKAGE / pattern).exists() for pattern in data if "*" not in pattern)
    assert "bench/page.css" in data
