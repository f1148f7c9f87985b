"""Tuning: the choice follows the times, and `sdfast.tune` measures what a model meets."""

from __future__ import annotations

import pathlib
import warnings

import pytest
import torch
from processes import run_python
from torch import Tensor
from tuned import convolutions, machine

import sdfast
from sdfast import _library, _tuning_file, dispatch, doctor, ops, packing, tuning
from sdfast.models import UNet2D
from sdfast.models.config import config_from_dict
from sdfast.ops import _conv2d_tuning, _tiles
from sdfast.ops._conv2d_choice import Shape, candidates, shape_of

needs_kernel = pytest.mark.skipif(
    not _library.has_kernel("conv2d_kernel", "cpu"), reason=_library.load_cpu_library().detail
)
pytestmark = [needs_kernel, pytest.mark.usefixtures("tuning_file")]

PADDING = [1, 1, 1, 1]
SPLIT = ("split",) if _tiles.are_there() else ()
TIMES = {"direct": 2.0, "torch": 3.0}
TINY_UNET = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
}


def plant(x: Tensor, weight: Tensor, times: dict[str, float], *, upsample: bool = False) -> None:
    _tuning_file.save(machine(), {shape_of(x, weight, 1, PADDING, upsample, 0): _tuning_file.sort(times)})
    tuning.reload()


def call(size: int = 46, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One that the built-in rule serves by Winograd."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((1, 32, size, size), (32, 32, 3, 3)))
    return tuple(t.contiguous(memory_format=torch.channels_last) for t in (x, weight))


def by(algorithm: str, x: Tensor, weight: Tensor, *, upsample: bool = False) -> Tensor:
    return torch.ops.sdfast.conv2d_forward(x, weight, None, 1, PADDING, upsample, None, None, algorithm)


@pytest.mark.parametrize("upsample", [False, True])
def test_the_choice_follows_the_times(upsample: bool) -> None:
    x, weight = call(23 if upsample else 46)
    known = candidates(shape_of(x, weight, 1, PADDING, upsample, 0))
    assert known == ["direct", "winograd4x4", "winograd2x2", "winograd4x4_unpacked", *SPLIT, "torch"]
    for fastest in known:
        plant(x, weight, {"direct": 2.0, "winograd4x4": 3.0} | {fastest: 1.0}, upsample=upsample)
        y = ops.conv2d(x, weight, padding=1, upsample=upsample)
        assert torch.equal(y, by(fastest, x, weight, upsample=upsample)), fastest
        assert y.is_contiguous(memory_format=torch.channels_last)
    results = [by(algorithm, x, weight, upsample=upsample) for algorithm in known]
    assert not any(torch.equal(results[0], other) for other in results[1:])


def test_few_channels_are_left_to_torch_unless_timed(measured: list[Shape]) -> None:
    x, weight = torch.randn(1, 4, 12, 12), torch.randn(32, 4, 3, 3)
    by_torch, direct = (ops.conv2d(x, weight, padding=1, backend=name) for name in ("torch", "cpu"))
    assert not torch.equal(by_torch, direct)
    assert torch.equal(ops.conv2d(x, weight, padding=1), by_torch)
    plant(x, weight, {"direct": 1.5, "torch": 2.0} | {(*SPLIT, "direct")[0]: 1.0})
    assert torch.equal(ops.conv2d(x, weight, padding=1), direct)
    plant(x, weight, {"direct": 2.0, "torch": 1.0})
    assert torch.equal(ops.conv2d(x, weight, padding=1), by_torch)
    tuning.reload()
    report = sdfast.tune(lambda: ops.conv2d(x[:, :, 1:], weight, padding=1))
    assert [shape.shape for shape in report] == measured and len(measured) == 1


def test_a_compiled_model_follows_the_times() -> None:
    x, weight = call()
    compiled = torch.compile(lambda x: ops.conv2d(x, weight, padding=1), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), by("winograd4x4", x, weight))
        plant(x, weight, {"direct": 1.0, "winograd4x4": 2.0})
        assert torch.equal(compiled(x), by("direct", x, weight))


@pytest.mark.parametrize("other", ["CPU", "threads", "instruction set", "version"])
def test_times_of_another_machine_are_not_used(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = call()
    plant(x, weight, {"direct": 1.0, "winograd4x4": 2.0})
    assert tuning.tuned_shapes() == 1
    name = machine()
    tuning._machine.cache_clear()
    if other == "CPU":
        monkeypatch.setattr(_library, "cpu_name", lambda: "another CPU")
    elif other == "threads":
        torch.set_num_threads(torch.get_num_threads() + 1)
    elif other == "instruction set":
        monkeypatch.setattr(
            _library, "load_cpu_library", lambda: _library.LibraryStatus("_C_cpu_amx", True, "")
        )
    else:
        monkeypatch.setattr(tuning, "__version__", "99.0")
    try:
        assert machine() != name and tuning.tuned_shapes() == 0
        assert torch.equal(ops.conv2d(x, weight, padding=1), by("winograd4x4", x, weight))
    finally:
        tuning._machine.cache_clear()
        torch.set_num_threads(1)


def test_exact_numerics_and_named_backends_are_respected() -> None:
    x, weight = call()
    plant(x, weight, {"winograd4x4": 1.0, "torch": 2.0, "winograd2x2": 3.0, "direct": 4.0})
    assert torch.equal(ops.conv2d(x, weight, padding=1), by("winograd4x4", x, weight))
    with dispatch.use_numerics("exact"):
        assert torch.equal(ops.conv2d(x, weight, padding=1), by("torch", x, weight))
        assert torch.equal(ops.conv2d(x, weight, padding=1, backend="cpu"), by("direct", x, weight))
        with dispatch.use_backend("cpu"):
            assert torch.equal(ops.conv2d(x, weight, padding=1), by("direct", x, weight))
    with dispatch.use_tuning("off"), dispatch.use_numerics("exact"):
        assert torch.equal(ops.conv2d(x, weight, padding=1), by("direct", x, weight))


@pytest.mark.parametrize("upsample", [False, True])
def test_low_memory_takes_what_needs_no_copy(upsample: bool) -> None:
    x, weight = call(23 if upsample else 46)
    times = {"winograd4x4": 1.0, "winograd2x2": 2.0, "direct": 3.0, "torch": 4.0}
    for fastest in ("direct", "winograd4x4_unpacked"):
        packing.clear()
        plant(x, weight, times | {fastest: 2.5}, upsample=upsample)
        with dispatch.use_memory("low"):
            y = ops.conv2d(x, weight, padding=1, upsample=upsample)
        assert packing.packed_bytes() == 0
        assert torch.equal(y, by(fastest, x, weight, upsample=upsample))
    y = ops.conv2d(x, weight, padding=1, upsample=upsample)
    assert packing.packed_bytes() > 0
    assert torch.equal(y, by("winograd4x4", x, weight, upsample=upsample))


def test_the_budget_goes_where_it_saves_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "FREE_BYTES", 0)
    monkeypatch.setattr(packing, "_read", type(packing._read)())
    (x, one), (y, other) = call(48, 1), call(40, 2)
    room = torch.empty(5 * one.numel())  # together room for one copy by F(4x4), not for two
    packing.note(room)
    plant(x, one, {"winograd4x4": 9.0, "direct": 10.0})
    plant(y, other, {"winograd4x4": 1.0, "direct": 10.0})  # more saved, though by fewer pixels
    assert torch.equal(ops.conv2d(x, one, padding=1), by("winograd4x4", x, one))
    ops.conv2d(y, other, padding=1)
    assert "winograd4x4" in packing._copies[other].by_kind
    assert "winograd4x4" not in packing._copies[one].by_kind
    assert torch.equal(ops.conv2d(x, one, padding=1), by("direct", x, one))


def test_a_gain_within_noise_is_worth_no_memory() -> None:
    x, weight = call()
    plant(x, weight, {"winograd4x4": 0.99, "direct": 1.0})
    assert torch.equal(ops.conv2d(x, weight, padding=1), by("direct", x, weight))
    assert packing.packed_bytes() == 0


@pytest.mark.parametrize("times", [{}, {"unheard-of": 0.7}, {"winograd4x4": 1.0}])
def test_times_without_the_direct_kernel_decide_nothing(times: dict[str, float]) -> None:
    x, weight = call()
    plant(x, weight, times)
    assert torch.equal(ops.conv2d(x, weight, padding=1), by("winograd4x4", x, weight))
    plant(x, weight, times | {"direct": 5.0})  # what cannot compute this call is passed over
    expected = "winograd4x4" if "winograd4x4" in times else "direct"
    assert torch.equal(ops.conv2d(x, weight, padding=1), by(expected, x, weight))


def test_nothing_is_measured_unasked(measured: list[Shape], tuning_file: pathlib.Path) -> None:
    model = convolutions(8, 9, 8)
    model()
    assert not measured and not tuning_file.exists()
    with dispatch.use_tuning("first-use"):
        model()
        model()
    assert [shape[2][2] for shape in measured] == [8, 9] and tuning.tuned_shapes() == 2
    with pytest.raises(ValueError, match="tuning: got 'always', expected one of off, saved, first-use"):
        dispatch.use_tuning("always")
    assert dispatch.tuning() == "saved"


def test_tune_reports_and_resumes(measured: list[Shape], tuning_file: pathlib.Path) -> None:
    model = convolutions(8, 9, 8)
    report = sdfast.tune(model)
    assert [shape.shape[2] for shape in report] == [(1, 32, 8, 8), (1, 32, 9, 9)]
    assert [(shape.best, shape.ms) for shape in report] == [("direct", TIMES)] * 2
    expected = "conv2d float32 1x32x8x8 32x32x3x3 1 1x1x1x1 False 0: direct 2.000 ms, torch 3.000 ms"
    assert str(report[0]) == expected
    tuning.reload()
    assert sdfast.tune(convolutions(10, 9, 8))[1:] == report[::-1] and len(measured) == 3
    assert len(sdfast.tune(model, again=True)) == 2 and len(measured) == 5
    with dispatch.use_backend("torch"):
        assert sdfast.tune(model) == []


def test_an_interrupted_run_goes_on_where_it_ended(
    measured: list[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = tuning._measures["conv2d"]

    def interrupted(shape: Shape, seconds: float) -> dict[str, float]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(shape, seconds)

    model = convolutions(8, 9, 10, 11)
    monkeypatch.setitem(tuning._measures, "conv2d", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sdfast.tune(model)
    assert len(_tuning_file._read(tuning.path())[machine()]) == 2
    monkeypatch.setitem(tuning._measures, "conv2d", measure)
    tuning.reload()
    assert len(sdfast.tune(model)) == 4 and len(measured) == 4


def test_tune_passes_arguments_and_stops_listening(measured: list[Shape]) -> None:
    x, weight = call(8)
    layer = torch.nn.Conv2d(32, 32, 3, padding=1)  # its weight asks for a gradient

    def model(x: Tensor, *, weight: Tensor) -> None:
        ops.conv2d(ops.conv2d(x, weight), layer.weight)
        if x.shape[2] == 9:
            raise RuntimeError("a model that fails")

    assert (
        len(sdfast.tune(model, x, {"weight": weight}))
        == len(sdfast.tune(model, (x,), {"weight": weight}))
        == 2
    )
    with pytest.raises(RuntimeError, match="a model that fails"):
        sdfast.tune(model, call(9)[0], {"weight": weight})
    assert tuning._asked_for is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tune_a_unet(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate of every shape is right, and the tuned model computes the same."""
    monkeypatch.setattr(_conv2d_tuning, "_ROUNDS", 1)
    unet = UNet2D(config_from_dict(UNet2D, TINY_UNET)).to(dtype).eval()
    x, t = torch.randn(1, 3, 16, 16, dtype=dtype), torch.tensor([3])
    with torch.no_grad():
        before = unet(x, t)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = sdfast.tune(unet, (x, t))
    assert torch.equal(state, torch.get_rng_state())
    assert len(report) == tuning.tuned_shapes() > 10
    for shape in report:
        assert set(shape.ms) == set(candidates(Shape(*shape.shape)))
        assert list(shape.ms.values()) == sorted(shape.ms.values())
    with torch.no_grad():
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(unet(x, t), before, rtol=tolerance, atol=tolerance)


def test_a_candidate_that_is_off_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_conv2d_tuning, "_ROUNDS", 1)
    forward = _conv2d_tuning.forward

    def off(*arguments: object) -> Tensor:
        return forward(*arguments) * (1.001 if arguments[-1] == "winograd4x4" else 1)

    monkeypatch.setattr(_conv2d_tuning, "forward", off)
    with pytest.warns(UserWarning, match="winograd4x4 is not used for .*off by 1.0e-03, allowed 5.0e-05"):
        (shape,) = sdfast.tune(convolutions(8))
    assert set(shape.ms) == {"direct", "torch", "winograd2x2", "winograd4x4_unpacked", *SPLIT}


def test_doctor_says_where_the_file_is_and_what_it_holds(
    measured: list[Shape], tuning_file: pathlib.Path
) -> None:
    line = f"0 shapes tuned for this CPU with 1 threads in {tuning_file}; sdfast.tune(model, inputs)"
    assert line in doctor.report()
    sdfast.tune(convolutions(8, 9))
    assert f"2 shapes tuned for this CPU with 1 threads in {tuning_file}\n" in doctor.report()


def test_importing_reads_no_file(tuning_file: pathlib.Path) -> None:
    tuning_file.parent.mkdir()
    tuning_file.write_text("damaged")
    code = "import warnings; warnings.simplefilter('error'); import sdfast.ops, sdfast.pipelines"
    run_python(code, SDFAST_CACHE_DIR=str(tuning_file.parent))
