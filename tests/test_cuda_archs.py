"""Which GPUs a CUDA library is built for and serves, and what is said where it serves none of those here."""

import pytest
import torch

from sdfast import _cuda_archs, _library, doctor, ops
from sdfast._cuda_archs import Contents, for_capability, local_version, parse, read_contents, why_not


@pytest.mark.parametrize(
    "text, spelled, version",
    [
        ("8.0;9.0a;12.0", ["8.0", "9.0a", "12.0"], "cu130.sm80.sm90a.sm120"),
        ("9.0a", ["9.0a"], "cu130.sm90a"),
        (" 8.6, 8.9\t12.1; ", ["8.6", "8.9", "12.1"], "cu130.sm86.sm89.sm121"),
        ("9.0+PTX 8.0 9.0", ["9.0", "8.0"], "cu130.sm90.sm80"),
    ],
)
def test_what_is_asked_for(text, spelled, version):
    archs = parse(text)
    assert [str(arch) for arch in archs] == spelled
    assert local_version(archs, "13.0") == version
    assert [arch.ptx for arch in archs] == ["+PTX" in text and str(arch) == "9.0" for arch in archs]


@pytest.mark.parametrize("text", ["9.x", "90", "Hopper", "9.0b", "7.5", "7.0;9.0", "8.0a", "", "sm_90"])
def test_what_is_none(text):
    with pytest.raises(ValueError, match="no architecture|too old|does not exist"):
        parse(text)


@pytest.mark.parametrize(
    "code, ptx, capability, served",
    [
        (("90a",), (), (9, 0), True),
        (("90a",), (), (10, 0), False),  # of this GPU alone
        (("90a",), (), (8, 9), False),
        (("80",), (), (8, 0), True),
        (("80",), (), (8, 9), True),  # the same major version
        (("86",), (), (8, 0), False),  # not an older minor one
        (("120",), (), (12, 1), True),
        (("100",), (), (12, 0), False),
        (("120",), ("120",), (13, 0), True),  # compiled by the driver
        (("120",), ("120",), (10, 0), False),
        (("86",), ("86",), (8, 7), True),
        (("90", "90a"), ("90",), (10, 3), True),
        (("80",), ("80",), (9, 0), False),  # launchers would ask Hopper's clusters of it
        (("80",), ("80",), (7, 5), False),
    ],
)
def test_who_is_served(code, ptx, capability, served):
    reason = why_not(Contents(code, ptx, "13.0"), capability)
    assert (reason is None) == served, reason


def test_the_driver_has_to_know_the_toolkit():
    contents = Contents(("90a",), ("120",), "13.1")
    assert why_not(contents, (9, 0), "13.0") is None  # minor versions run each other's code
    assert "driver knows CUDA 12.8 at most" in why_not(contents, (9, 0), "12.8")
    assert why_not(contents, (12, 0), "13.1") is None
    assert "PTX of CUDA 13.1" in why_not(contents, (12, 0), "13.0")  # but do not compile each other's PTX


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)])
def test_what_is_advised_serves(capability):
    (arch,) = parse(for_capability(capability))
    assert why_not(Contents((arch.code,), (), "13.0"), capability) is None


def test_contents_are_read_or_unknown(tmp_path):
    library, beside = tmp_path / "_C_cuda.so", tmp_path / "_C_cuda.json"
    assert read_contents(library) is None
    beside.write_text('{"code": ["80", "90a"], "ptx": ["80"], "cuda": "13.0"}')
    contents = read_contents(library)
    assert contents == Contents(("80", "90a"), ("80",), "13.0")
    assert str(contents) == "code for sm_80, sm_90a, PTX of compute_80, by CUDA 13.0"
    for broken in ("", "[]", '{"code": ["80"]}', '{"code": 1, "ptx": [], "cuda": "13.0"}'):
        beside.write_text(broken)
        assert read_contents(library) is None


@pytest.fixture
def machine(monkeypatch):
    """A machine whose GPUs and library the test says; what `_library` decides is undone."""
    monkeypatch.setattr(_library, "_cuda_status", _library.LibraryStatus("_C_cuda", True, "loaded"))
    monkeypatch.setattr(_library, "_kernels", {*_library._kernels, ("add_noise", "cuda")})
    monkeypatch.setattr(_library, "cuda_of_driver", lambda: "13.0")

    def set_to(contents, *capabilities):
        monkeypatch.setattr(_library, "cuda_contents", lambda: contents)
        monkeypatch.setattr(_library, "cuda_devices", lambda: list(capabilities))

    return set_to


def test_an_unserved_gpu_takes_the_kernels_out_of_service_with_a_warning(machine):
    machine(Contents(("90a",), (), "13.0"), (9, 0), (8, 6))
    with pytest.warns(
        UserWarning, match=r"cuda:1.*8\.6.*sm_90a.*SDFAST_CUDA_ARCHS=8\.6 pip install"
    ) as caught:
        _library._check_cuda_devices()
    assert len(caught) == 1
    assert not _library.has_kernel("add_noise", "cuda") and not _library.load_cuda_library().loaded
    x = torch.randn(2, 128)
    with pytest.raises(ValueError, match=r"cannot run: not for cuda:1, of compute capability 8\.6"):
        ops.add_noise(x, x, torch.ones(2), torch.ones(2), backend="cuda")


@pytest.mark.parametrize("contents", [Contents(("80", "90a"), (), "13.0"), None])
def test_served_gpus_keep_them(machine, contents, recwarn):
    machine(contents, (9, 0), (8, 6))
    _library._check_cuda_devices()
    assert not recwarn.list
    assert _library.has_kernel("add_noise", "cuda") and _library.load_cuda_library().loaded


def test_the_library_is_checked_when_cuda_begins(monkeypatch):
    """And not at the import, which must leave CUDA alone."""
    queued = []
    monkeypatch.setattr(_library, "_cuda_status", None)
    monkeypatch.setattr(_library, "_kernels", _library._kernels.copy())
    monkeypatch.setattr(_library, "_load_cuda_library", lambda: _library.LibraryStatus("_C_cuda", True, ""))
    monkeypatch.setattr(torch.cuda, "_lazy_call", queued.append)
    assert _library.load_cuda_library().loaded
    assert queued == [_library._check_cuda_devices]


def test_doctor_says_who_is_served_and_what_to_build():
    contents = Contents(("90a",), (), "13.0")
    lines = list(doctor._gpus_served(contents, [(9, 0), (8, 6), (9, 0), (7, 5)], "13.0"))
    assert lines == [
        "no   _C_cuda does not serve compute capability 7.5: the kernels need compute capability 8.0 or later",
        "no   _C_cuda does not serve compute capability 8.6: it holds code for sm_90a, PTX of nothing, by CUDA"
        f" 13.0; build it in a checkout, with nvcc: {_cuda_archs.build_command('8.6')}",
        "yes  _C_cuda serves compute capability 9.0",
    ]
    (line,) = doctor._gpus_served(None, [(9, 0)], None)
    assert "it was not built" in line and _cuda_archs.build_command("9.0a") in line


def test_doctor_asks_the_driver_where_torch_sees_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        doctor, "_output_of", lambda *command: "9.0\n8.6" if "compute_cap" in command[1] else None
    )
    assert doctor._capabilities() == [(9, 0), (8, 6)]
    monkeypatch.setattr(doctor, "_output_of", lambda *command: None)
    assert doctor._capabilities() == []
