"""Importing is cheap, asks for nothing that may be absent, and goes one way."""

import ast
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import sdfast

PACKAGE = Path(sdfast.__file__).parent


def run_python(code, *options, **environment):
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [("import sdfast", set()), ("from sdfast import StableDiffusion", {"PIL", "numpy", "safetensors"})],
)
def test_import_loads_little_beyond_torch(statement: str, allowed: set[str]) -> None:
    """Nothing that takes long to import, as diffusers, transformers and Triton do."""
    code = f"import sys, torch; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    loaded = {name.split(".")[0] for name in run_python(code).stdout.split()} - set(sys.stdlib_module_names)
    assert "sdfast" in loaded and loaded <= {"sdfast", *allowed}


def test_import_loads_no_torch_and_public_names_load_on_use():
    run_python(
        "import sys, sdfast; assert 'torch' not in sys.modules, 'torch was imported';"
        "assert set(sdfast.__all__) <= set(dir(sdfast));"
        "[getattr(sdfast, name) for name in sdfast.__all__];"
        "[getattr(sdfast.training, name) for name in sdfast.training.__all__]"
    )


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'sdfast' has no attribute 'unet'"):
        sdfast.unet  # noqa: B018


def test_no_name_hides_a_module():
    """`import sdfast.diffusion.bound as m` has to give the module; of operations one stem is meant to be both."""
    for package in ("sdfast", "sdfast.diffusion", "sdfast.models"):
        home = importlib.import_module(package)
        modules = {module.name for module in pkgutil.iter_modules(home.__path__)} & set(home.__all__)
        assert all(isinstance(getattr(home, name), types.ModuleType) for name in modules), package


USE = """
import torch, sdfast
from sdfast import ops, _library
x = torch.randn(2, 8, 4, 4)
y = ops.group_norm(x, 4)
assert (y - torch.nn.functional.group_norm(x, 4)).abs().max() < 1e-5
"""


def test_works_without_triton_and_optional_packages():
    blocked = ["triton", "diffusers", "transformers", "sklearn", "pytest", "psutil"]
    run_python(
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n{USE}"
        "from sdfast import StableDiffusion, diffusion, models\n"
        "assert not [s for s in _library.status() if s.name == 'triton' and s.loaded]\n"
        "from sdfast.doctor import report; report()\n"
    )


def test_works_without_the_native_library(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "sdfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.modules['triton'] = None\n{USE}"
        f"assert sdfast.__file__.startswith({str(tmp_path)!r})\n"
        "from sdfast import StableDiffusion\n"
        "cpu = _library.load_cpu_library(); assert not cpu.loaded and 'was not built' in cpu.detail, cpu\n"
    )
    run_python(code)


# Who may import whom: DESIGN.md's arrows. A prefix allows the module and what is below it.

# What everybody may use: no layer of its own, and it imports nothing of ours but these.
LEAVES = (
    "sdfast.__version__", "sdfast.request", "sdfast.memory", "sdfast.images", "sdfast.figures", "sdfast.tokenizer",
    "sdfast._arguments", "sdfast._listed", "sdfast.files",
)  # fmt: skip
ALLOWED = {
    "sdfast.__init__": ("sdfast",),
    "sdfast.__main__": ("sdfast.cli",),
    "sdfast._arguments": ("sdfast.request",),
    "sdfast._listed": (),
    "sdfast.files": (),
    "sdfast._cuda_archs": (),
    "sdfast._library": ("sdfast._cuda_archs",),
    "sdfast.dispatch": (),
    "sdfast.testing": ("sdfast._library",),
    "sdfast.request": (),
    "sdfast.memory": (),
    "sdfast.images": LEAVES,
    "sdfast.figures": LEAVES,
    "sdfast.tokenizer": (),
    "sdfast.ops._conv2d_tuning": ("sdfast.dispatch", "sdfast.tuning", "sdfast.testing", "sdfast.ops"),
    "sdfast.ops": ("sdfast._library", "sdfast.dispatch", "sdfast.packing", "sdfast.tuning", "sdfast.ops"),
    "sdfast.flops": ("sdfast.ops",),
    "sdfast.graphs": ("sdfast._graph_keys", "sdfast.packing"),
    "sdfast._graph_keys": ("sdfast.dispatch",),
    "sdfast.packing": ("sdfast._library", "sdfast.dispatch"),
    "sdfast.tuning": (
        "sdfast.__version__", "sdfast._library", "sdfast._tuning_file", "sdfast.dispatch", "sdfast.packing",
    ),
    "sdfast._tuning_file": ("sdfast.files",),
    "sdfast.models.vae": ("sdfast.ops", "sdfast.models", "sdfast.tiled_vae"),
    "sdfast.models": ("sdfast._listed", "sdfast.files", "sdfast.ops", "sdfast.models"),
    "sdfast.tiled_vae": (
        *LEAVES, "sdfast.ops", "sdfast.packing", "sdfast._bands", "sdfast._tiled_resnet", "sdfast._tiled_stages",
    ),
    "sdfast._tiled_resnet": ("sdfast.ops", "sdfast._bands", "sdfast._tiled_stages"),
    "sdfast._tiled_stages": ("sdfast.ops", "sdfast._bands"),
    "sdfast._bands": ("sdfast.ops",),
    "sdfast.diffusion": ("sdfast.ops", "sdfast.diffusion"),
    "sdfast.conditioning": (*LEAVES, "sdfast.models"),
    "sdfast.loading": (*LEAVES, "sdfast.models"),
    "sdfast.lora": (*LEAVES, "sdfast.models", "sdfast.lora_files"),
    "sdfast.lora_files": (*LEAVES, "sdfast.models", "sdfast.lora_names"),
    "sdfast.lora_names": ("sdfast.models",),
    "sdfast.loaded_loras": ("sdfast.models", "sdfast.lora_files", "sdfast.lora_names"),
    "sdfast.generation": (
        *LEAVES, "sdfast.models", "sdfast.diffusion", "sdfast.conditioning", "sdfast.graphs",
    ),
    "sdfast.masks": LEAVES,
    "sdfast.sources": ("sdfast.models", "sdfast.generation"),
    "sdfast.inpainting": (
        *LEAVES, "sdfast.models", "sdfast.diffusion", "sdfast.generation", "sdfast.masks", "sdfast.sources",
    ),
    "sdfast.outpainting": (*LEAVES, "sdfast.inpainting"),
    "sdfast.pipeline_base": (
        *LEAVES, "sdfast.models", "sdfast.diffusion", "sdfast.conditioning", "sdfast.loading",
        "sdfast.generation", "sdfast.graphs", "sdfast.loaded_loras", "sdfast.lora_names",
    ),
    "sdfast.pipelines": (
        *LEAVES, "sdfast.diffusion", "sdfast.generation", "sdfast.inpainting", "sdfast.masks",
        "sdfast.outpainting", "sdfast.pipeline_base", "sdfast.sources",
    ),
    "sdfast.training.segmentation_data": (*LEAVES, "sdfast.segmentation"),
    "sdfast.training": (
        *LEAVES, "sdfast.models", "sdfast.diffusion", "sdfast.lora", "sdfast.training",
        "sdfast.conditioning", "sdfast.loading", "sdfast.pipelines",
    ),
    "sdfast.bound": (
        *LEAVES, "sdfast.models", "sdfast.diffusion", "sdfast.conditioning", "sdfast.loading", "sdfast.training.data",
        "sdfast.training.captions", "sdfast.training.images",
    ),
    "sdfast.bound_command": (*LEAVES, "sdfast.bound", "sdfast.command_line"),
    "sdfast.segmentation": (*LEAVES, "sdfast.models"),
    "sdfast.segmentation_file": (*LEAVES, "sdfast.models", "sdfast.segmentation"),
    "sdfast.segmentation_scores": (),
    "sdfast.segment_command": (
        *LEAVES, "sdfast.models", "sdfast.segmentation", "sdfast.segmentation_file", "sdfast.segmentation_scores",
        "sdfast.training",
    ),
    "sdfast.drop_in": (
        "sdfast._library", "sdfast.dispatch", "sdfast.ops", "sdfast.models", "sdfast.graphs",
        "sdfast._graph_keys", "sdfast.packing", "sdfast.flops", "sdfast.drop_in",
    ),
    "sdfast.doctor": (
        "sdfast.__version__", "sdfast._cuda_archs", "sdfast._library", "sdfast.dispatch", "sdfast.ops", "sdfast.tuning",
    ),
    "sdfast.bench": ("sdfast",),
    "sdfast.command_line": (*LEAVES, "sdfast._library", "sdfast.dispatch", "sdfast.pipelines"),
    "sdfast.inpaint_command": (*LEAVES, "sdfast.command_line", "sdfast.masks"),
    "sdfast.prompt_lines": (),
    "sdfast.prompt_list": (*LEAVES, "sdfast.diffusion", "sdfast.generation", "sdfast.pipelines", "sdfast.prompt_lines"),
    "sdfast.generate_command": (*LEAVES, "sdfast.command_line", "sdfast.prompt_lines", "sdfast.prompt_list"),
    "sdfast.cli": (
        *LEAVES, "sdfast.bench", "sdfast.command_line", "sdfast.doctor", "sdfast.generate_command",
        "sdfast.inpaint_command", "sdfast.bound_command", "sdfast.segment_command", "sdfast.training",
    ),
}  # fmt: skip

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def within(name, prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def imports(path):
    """Absolute names of everything a file imports, lazily too, but not for the type checker alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # "from sdfast import ops" imports sdfast.ops; names of deeper modules are attributes.
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from whole if node.module in ("sdfast", "sdfast.ops") else [node.module]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path):
    name = module_name(path)
    rule = next((ALLOWED[prefix] for prefix in ALLOWED if within(name, [prefix])), None)
    assert rule is not None, f"{name}: say in ALLOWED what it may import"
    ours = [imported for imported in imports(path) if within(imported, ["sdfast"])]
    assert not [imported for imported in ours if not within(imported, rule)]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_backends_stay_behind_their_operation(path):
    """Triton and torch.ops are for sdfast.ops; a Triton file knows its own operation and no other."""
    name = module_name(path)
    source = path.read_text(encoding="utf-8")
    if not within(name, ["sdfast.ops", "sdfast._library", "sdfast.graphs", "sdfast.doctor", "sdfast.flops"]):
        assert "triton" not in {imported.split(".")[0] for imported in imports(path)}
        assert "torch.ops" not in source
        assert not [imported for imported in imports(path) if imported.endswith(("_triton", "_cuda"))]
    if name.endswith("_triton"):
        ours = [imported for imported in imports(path) if within(imported, ["sdfast.ops"])]
        stem = name.removesuffix("_triton").removesuffix("_backward")
        assert not [imported for imported in ours if not imported.startswith((stem, "sdfast.ops._"))]
