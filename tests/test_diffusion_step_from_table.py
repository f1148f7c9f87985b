"""diffusion_step_from_table: the bits of diffusion_step, the counter, the next input, and its errors."""

import pytest
import torch
from elementwise import ARRANGEMENTS, arranged
from on_device import OnTheDevice

from sdfast import _library
from sdfast.dispatch import use_backend
from sdfast.ops import diffusion_step, diffusion_step_from_table
from sdfast.ops._native import empty_by_sample

STEPS = 5
SEEDS = torch.tensor([3, -(2**63)])
needs_kernel = pytest.mark.skipif(
    not _library.has_kernel("diffusion_step", "cpu"), reason=_library.load_cpu_library().detail
)
BACKENDS = ["torch", "reference", pytest.param("cpu", marks=needs_kernel)]


def tables(steps=STEPS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    coefficients = torch.randn(steps, 7, generator=generator, dtype=dtype)
    return coefficients, torch.rand(steps, generator=generator, dtype=dtype), torch.linspace(1, 9, steps)


def tensors(dtype=torch.float32, shape=(2, 4, 9, 7), *, guided=True):
    generator = torch.Generator().manual_seed(2)
    batches = (shape[0], shape[0] * (1 + guided), shape[0])
    return [torch.randn(n, *shape[1:], generator=generator).to(dtype) for n in batches]


def check_step(
    counter, dtype, backend, *, guided, takes_x0, seeds, clip, arrangement="contiguous", device="cpu",
    shape=(2, 4, 9, 7), noise=None,
):  # fmt: skip
    """One call against `diffusion_step` with the row, by the same backend; the results, and the next input."""
    k, scale, g = (t.to(device) for t in tables())
    x, m, previous = (arranged(t.to(device), arrangement) for t in tensors(dtype, shape, guided=guided))
    seeds = None if seeds is None else seeds.to(device)
    row = min(max(counter, 0), STEPS - 1)
    table = None
    if noise is not None:  # "dense", or in rows that lie as the sample does
        table = torch.randn(STEPS, *x.shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)
        if noise == "placed":
            table = empty_by_sample(x, STEPS).copy_(table.flatten(0, 1)).unflatten(0, (STEPS, len(x)))
    common = {"previous_x0": previous if takes_x0 else None, "clip": clip, "seeds": seeds, "backend": backend}
    results = diffusion_step_from_table(
        x, m, k, scale, torch.tensor(counter, device=device), guidance_scale=g if guided else None, noise=table,
        **common,
    )  # fmt: skip
    expected = diffusion_step(
        x, m, k[row], guidance_scale=float(g[row]) if guided else None, step=row,
        noise=None if table is None else table[row], **common,
    )  # fmt: skip
    for result, wanted in zip(results[:2], expected, strict=True):
        assert torch.equal(result, wanted) and result.stride() == wanted.stride()
    assert results[3].dtype == torch.int64 and results[3].shape == () and results[3] == counter + 1
    fed = expected[0] * float(scale[min(row + 1, STEPS - 1)])
    return results, torch.cat([fed, fed]) if guided else fed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"takes_x0": True}, {"seeds": SEEDS}, {"noise": "dense"}, {"takes_x0": True, "clip": 0.5}]
)
def test_is_diffusion_step_with_the_row(backend, dtype, guided, options):
    if backend == "cpu" and dtype == torch.float64:
        backend = None
    options = {"takes_x0": False, "seeds": None, "clip": None, **options}
    for counter in (0, 2, STEPS - 1, STEPS, STEPS + 3, -1):
        results, fed = check_step(counter, dtype, backend, guided=guided, **options)
        assert results[2].dtype == dtype and torch.equal(results[2], fed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_layouts(backend, arrangement):
    options = {"takes_x0": True, "clip": 1.0, "arrangement": arrangement}
    for guided, drawn in (
        (False, {"seeds": SEEDS}), (True, {"seeds": SEEDS}), (True, {"seeds": None, "noise": "placed"}),
    ):  # fmt: skip
        results, fed = check_step(1, torch.float32, backend, guided=guided, **drawn, **options)
        assert torch.equal(results[2], fed)
        if backend == "cpu":
            assert results[2].stride()[1:] == results[0].stride()[1:]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 4), (2,), (1, 1, 1, 1), (1, 4, 2, 2, 2)])
def test_shapes(backend, shape):
    x, m, _ = tensors(shape=shape)
    k, scale, g = tables()
    results = diffusion_step_from_table(
        x, m, k, scale, torch.tensor(3), guidance_scale=g, seeds=torch.arange(len(x)), backend=backend
    )
    assert [r.shape for r in results] == [x.shape, x.shape, m.shape, ()] and results[3] == 4


def test_tables_of_any_stride_and_either_dtype():
    x, m, previous = tensors()
    k, scale, g = tables()
    expected = diffusion_step_from_table(
        x, m, k, scale, torch.tensor(1), guidance_scale=g, previous_x0=previous
    )
    wide = torch.stack([k.flatten()] * 2, 1)[:, 0].view(STEPS, 7)
    columns = torch.stack([scale, g.double()], 1)
    assert not columns[:, 0].is_contiguous()
    actual = diffusion_step_from_table(
        x, m, wide, columns[:, 0], torch.tensor(1), guidance_scale=columns[:, 1], previous_x0=previous
    )
    narrow = diffusion_step_from_table(
        x, m, k.float(), scale.float(), torch.tensor(1), guidance_scale=g, previous_x0=previous
    )
    for results in (actual, narrow):
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_inputs_are_not_written():
    x, m, previous = tensors()
    k, scale, g = tables()
    counter, given = torch.tensor(2), [x, m, k, scale, g, previous]
    kept = [t.clone() for t in given]
    for backend in (None, "torch"):
        diffusion_step_from_table(
            x, m, k, scale, counter, guidance_scale=g, previous_x0=previous, seeds=SEEDS, backend=backend
        )
    assert counter == 2 and all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


def test_the_composite_reads_nothing_on_the_host():
    x, m, previous = tensors()
    k, scale, g = tables()
    with OnTheDevice():
        diffusion_step_from_table(
            x, m, k, scale, torch.zeros((), dtype=torch.int64), guidance_scale=g, previous_x0=previous,
            seeds=SEEDS, clip=1.0, backend="torch",
        )  # fmt: skip


@needs_kernel
def test_opcheck():
    k, scale, g = tables()
    op, counter = torch.ops.sdfast.diffusion_step_from_table.default, torch.tensor(2)
    for arrangement in ("contiguous", "channels_last", "channel_slice"):
        x, m, previous = (arranged(t, arrangement) for t in tensors(shape=(2, 3, 4, 5)))
        options = {"guidance_scale": g, "previous_x0": previous, "clip": 1.0, "seeds": SEEDS}
        torch.library.opcheck(op, (x, m, k, scale, counter), options)
        torch.library.opcheck(op, (x, x, k, scale, counter), {})
        torch.library.opcheck(op, (x[:1], m[:2], k, scale, counter), {"guidance_scale": g})


def test_gradients_are_those_of_torch():
    x, m, _ = (t.double().requires_grad_() for t in tensors(shape=(2, 3, 4)))
    k, scale, g = tables()

    def step(x, m, backend=None):
        return diffusion_step_from_table(
            x, m, k, scale, torch.tensor(1), guidance_scale=g.double(), backend=backend
        )[:3]

    assert torch.autograd.gradcheck(step, (x, m))
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: "):
        step(x.float(), m.float(), "cpu")


def test_compiles_without_a_break():
    x, m, previous = tensors()
    k, scale, g = tables()
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    def run(x, m, counter):
        return diffusion_step_from_table(
            x, m, k, scale, counter, guidance_scale=g, previous_x0=previous, seeds=SEEDS, clip=1.0
        )

    for backend in ("cpu", "torch"):
        with use_backend(backend):
            compiled = torch.compile(run, fullgraph=True, backend=count)
            for counter in range(3):
                results = compiled(x, m, torch.tensor(counter)), run(x, m, torch.tensor(counter))
                assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(compilations) <= 2


def test_backends():
    x, m, _ = tensors()
    k, scale, g = tables()
    with pytest.raises(ValueError, match="diffusion_step_from_table: backend 'cuda' cannot run"):
        diffusion_step_from_table(x, m, k, scale, torch.tensor(0), guidance_scale=g, backend="cuda")
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        diffusion_step_from_table(x, m, k, scale, torch.tensor(0), guidance_scale=g, backend="fast")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sample": [1.0]}, TypeError, "sample: got list, expected a torch.Tensor"),
        ({"sample": torch.tensor(1.0)}, ValueError, r"sample: got a scalar, expected shape \(N, ...\)"),
        (
            {"model_output": torch.zeros(2, 3)},
            ValueError,
            r"model_output: got shape \(2, 3\), expected \(4, 3\)",
        ),
        ({"model_output": torch.zeros(4, 3).half()}, TypeError, "model_output: got dtype torch.float16"),
        (
            {"coefficients": torch.zeros(7)},
            ValueError,
            r"coefficients: got shape \(7,\), expected 2 dimensions",
        ),
        ({"coefficients": torch.zeros(0, 7)}, ValueError, r"coefficients: got no steps, expected \(n, 7\)"),
        (
            {"coefficients": torch.zeros(5, 6)},
            ValueError,
            r"coefficients: got shape \(5, 6\), expected \(5, 7\)",
        ),
        (
            {"coefficients": torch.zeros(5, 7).half()},
            TypeError,
            "coefficients: got dtype torch.float16, expected",
        ),
        (
            {"coefficients": torch.zeros(5, 7).to("meta")},
            ValueError,
            "coefficients: is on meta, expected cpu",
        ),
        ({"input_scale": torch.zeros(4)}, ValueError, r"input_scale: got shape \(4,\), expected \(5,\)"),
        ({"input_scale": None}, TypeError, "input_scale: got NoneType, expected a torch.Tensor"),
        (
            {"input_scale": torch.zeros(5).to("meta")},
            ValueError,
            "input_scale: is on meta, expected cpu as the",
        ),
        ({"guidance_scale": 7.5}, TypeError, "guidance_scale: got float, expected a torch.Tensor"),
        (
            {"guidance_scale": torch.zeros(4)},
            ValueError,
            r"guidance_scale: got shape \(4,\), expected \(5,\)",
        ),
        ({"counter": 3}, TypeError, "counter: got int, expected a torch.Tensor"),
        ({"counter": torch.tensor(3.0)}, TypeError, "counter: got dtype torch.float32, expected torch.int64"),
        ({"counter": torch.tensor([3])}, ValueError, r"counter: got shape \(1,\), expected \(\)"),
        (
            {"counter": torch.tensor(3).to("meta")},
            ValueError,
            "counter: is on meta, expected cpu as the sample",
        ),
        ({"previous_x0": torch.zeros(2, 3).double()}, TypeError, "previous_x0: got dtype torch.float64"),
        ({"clip": 0.0}, ValueError, "clip: got 0.0, expected a positive number or None"),
        ({"noise": torch.zeros(2, 3)}, ValueError, r"noise: got shape \(2, 3\), expected \(5, 2, 3\)"),
        ({"noise": torch.zeros(5, 2, 3).half()}, TypeError, "noise: got dtype torch.float16"),
        (
            {"noise": torch.zeros(5, 2, 3), "seeds": SEEDS},
            ValueError,
            "seeds: got them beside noise, expected one of the two",
        ),
        ({"seeds": [1, 2]}, TypeError, "seeds: got list, expected a torch.Tensor"),
        ({"seeds": SEEDS[:1]}, ValueError, r"seeds: got shape \(1,\), expected \(2,\)"),
        ({"seeds": SEEDS.to("meta")}, ValueError, "seeds: is on meta, expected cpu as the sample"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    k, scale, g = tables()
    arguments = {
        "sample": torch.zeros(2, 3), "model_output": torch.zeros(4, 3), "coefficients": k,
        "input_scale": scale, "counter": torch.tensor(0), "guidance_scale": g, **changes,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        diffusion_step_from_table(**arguments)
