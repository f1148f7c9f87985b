"""Records of `sdfast bench` that nobody measured, for the tests of what reads them."""

from sdfast.bench.record import FORMAT
from sdfast.bench.timing import ratio, times

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)


def sides(**seconds):
    """Sides and ratios of a row, from each side's seconds."""
    return {
        "sides": {
            name: {**times(samples), "first_ms": 2e3 * samples[0], "error": 0.0 if name == "eager" else 1e-6}
            for name, samples in seconds.items()
        },
        "ratios": {
            name: ratio(samples, seconds["sdfast"]) for name, samples in seconds.items() if name != "sdfast"
        },
    }


def operation(name="linear 2x1280 to 1280", dtype="float32", ours=(1e-3,) * 5, eager=(2e-3,) * 5):
    return {
        "part": "ops", "op": name.split()[0], "model": "U-Net", "name": name, "shape": "2x1280", "dtype": dtype,
        "training": False, "activation": "", "residual": False, "rounds": len(ours),
        **sides(eager=eager, sdfast=ours),
        "flops": 6553600, "bytes": 6578176, "gflop_per_s": 6.55, "gb_per_s": 6.58, "peak_gflop_per_s": 400.0,
        "of_peak": 0.0164,
    }  # fmt: skip


def model(dtype="float32", **engines):
    engines = {"eager": (2.0, 2.2), "openvino": (1.5, 1.5), "sdfast": (1.0, 1.0), **engines}
    row = {"part": "models", "name": "VAE decode to 512x512", "work": "vae", "dtype": dtype, "rounds": 2}
    found = {
        **row,
        "weight_bytes": 2**28,
        "skipped": {"onnxruntime": "not installed; pip install x"},
        **sides(**engines),
    }
    for side in found["sides"].values():
        side |= {"peak_bytes": 2**30, "packed_bytes": 2**20, "export_seconds": 3.0}
    return found


def pictures():
    row = {"part": "images", "name": "ten digits, 10 steps", "dtype": "float32", "rounds": 1}
    found = {**row, **sides(eager=(2.0,), sdfast=(1.0,)), "largest_difference": 1, "mean_difference": 0.001}
    for side in found["sides"].values():
        side["first_image_ms"] = 3000.0
    urls = {"eager": PIXEL, "sdfast": PIXEL, "difference": PIXEL}
    return {**found, "difference_gain": 128, "pictures": urls}


def breakdown():
    operations = [
        {"operation": "sdfast::conv2d_kernel", "kind": "convolution", "calls": 3, "ms": 8.0, "share": 0.8, "of_peak": 0.9,
         "gflop": 3.0, "gflop_per_s": 400.0},
        {"operation": "outside", "kind": "outside", "calls": 0, "ms": 2.0, "share": 0.2},
    ]  # fmt: skip
    return {
        "name": "VAE decode to 512x512", "dtype": "float32", "step_ms": 10.0, "operations": operations,
        "eager": {"step_ms": 20.0, "operations": operations}, "gflop": 3.0, "gflop_per_s": 300.0,
        "peak_gflop_per_s": 450.0,
    }  # fmt: skip


def record(*rows, **changes):
    environment = {
        "cpu": "A CPU", "cpu_capability": "AVX512", "threads": 2, "gpu": None, "torch": "2.13.0", "python": "3.11",
        "commit": "abc", "date": "2026-11-25T00:00:00+00:00", "sdfast": "0.1.0", "device": "cpu", "system": "Linux",
        "cores": 2, "memory_bytes": 2**34, "kernels": "avx512", "allocator": "glibc", "variables": {},
        "versions": {"torch": "2.13.0"}, "load_average": 0.1, **changes,
    }  # fmt: skip
    return {
        "format": FORMAT, "command": "sdfast bench", "environment": environment,
        "limits": {"copy_gb_per_s": 40.0, "peak_gflop_per_s": {"float32": 400.0}}, "quick": False,
        "rows": list(rows), "breakdown": [], "left_out": [],
    }  # fmt: skip
