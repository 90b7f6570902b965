"""Who may import what, which names are public, and that names which are common words cannot shadow each other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hyquant

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hyquant", "metrics", "search", "spaces")
MODULES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))

IMPORTERS = {
    "av": ("hyquant/video/mp4.py", "search/doctor.py"),
    "cv2": ("metrics/warping_error.py",),
    "diffusers": ("hyquant/models/",),
    "huggingface_hub": ("metrics/published.py",),
    "matplotlib": ("search/plots.py", "search/sensitivity_plots.py", "search/latent_plots.py"),
    "mlflow": ("search/mlflow_client.py",),
    "open_clip": ("metrics/embedders.py",),
    "optuna": ("search/", "spaces/suggest.py"),
    "plotly": ("search/plots.py", "search/sensitivity_plots.py"),
    "timm": ("metrics/dino_distance.py",),
    "torch_npu": ("hyquant/devices/npu.py",),
    "torchmetrics": ("metrics/",),
    "transformers": ("hyquant/models/",),
    "triton": ("hyquant/kernels/cuda_rows.py",),
    "typer": ("search/cli.py", "search/commands/"),
}
"""Heavy libraries and the files, as prefixes, that may import them."""


def imported_names(path: Path) -> Iterator[str]:
    """Yield every module that a file names in an import statement, or as a literal to importlib."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]):
                yield module


@pytest.mark.parametrize("library", IMPORTERS)
def test_a_heavy_library_has_few_importers(library):
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        if any(name.partition(".")[0] == library for name in imported_names(path))
    }

    assert importers, f"nothing imports {library}; delete it from this table and from pyproject.toml"
    assert {path for path in importers if not path.startswith(IMPORTERS[library])} == set()


def test_no_module_of_ours_imports_a_sibling_relatively():
    relative = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    }

    assert relative == set()


def test_the_quantization_library_needs_torch_safetensors_and_pydantic_only():
    """All public functions of hyquant are touched, so that what they import counts too."""
    script = (
        "import sys, hyquant\n"
        "light = set(sys.modules)\n"
        "for name in hyquant._HOMES: getattr(hyquant, name)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
        "print('torch' in light)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded, is_torch_loaded_at_once = done.stdout.splitlines()

    brought_by_torch = {"triton"}
    others = {*IMPORTERS, "PIL", "rich", "sqlalchemy", "torchvision", "yaml", "metrics", "search", "spaces"}
    assert {"torch", "safetensors", "pydantic"} <= set(loaded.split())
    assert set(loaded.split()) & (others - brought_by_torch) == set()
    assert is_torch_loaded_at_once == "False"


def test_public_names_of_hyquant_are_these():
    assert sorted(hyquant._HOMES) == [
        "DumperManager",
        "FA3ProcessorConfig",
        "M3ProcessorConfig",
        "M4ProcessorConfig",
        "M6Config",
        "M6ProcessorConfig",
        "QuantConfig",
        "SaveProcessorConfig",
        "SessionConfig",
        "TimestepManager",
        "W8A8DynamicProcessorConfig",
        "W8A8DynamicQuantConfig",
        "W8A8ProcessorConfig",
        "W8A8QuantConfig",
        "W8A8TimeStepProcessorConfig",
        "W8A8TimeStepQuantConfig",
        "build_plan",
        "calibrate",
        "capture_calls",
        "get_disable_layer_names",
        "get_rank",
        "get_rank_suffix_file",
        "load_model",
        "load_quantized",
        "observe",
        "quant_model",
        "quantize_",
        "quantize_calibrated_",
        "restore_",
        "safe_torch_load",
        "save_quantized",
        "verify_export",
    ]


@pytest.mark.parametrize("name", sorted(hyquant._HOMES))
def test_a_public_name_is_the_one_that_type_checkers_see(name):
    tree = ast.parse((ROOT / "hyquant" / "__init__.py").read_text(encoding="utf-8"))
    declared = {
        alias.asname: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }

    assert declared[name] == hyquant._HOMES[name]
    assert getattr(hyquant, name).__name__ == name


def test_an_unknown_public_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'quantise_'; it offers DumperManager, FA3ProcessorConfig"):
        _ = hyquant.quantise_


def test_no_folder_of_tests_or_tools_bears_the_name_of_a_package():
    """Such a folder would shadow the package for whoever runs Python there, without a word."""
    folders = [path for top in ("tests", "tools") for path in (ROOT / top).rglob("*") if path.is_dir()]

    assert [path for path in folders if path.name in PACKAGES] == []


def test_test_files_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]

    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_module_says_what_it_is_for(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""

    assert docstring.splitlines()[:1] != []
