"""No file that a user may give runs code: the sources hold no call that unpickles, evaluates or builds objects by name.

Looks at this repository's own calls only; what a library does inside a call made here is not seen.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKES_BOMBS = ROOT / "tools" / "fuzz" / "seeds.py"  # it pickles what readers must not unpickle
SOURCES = sorted(
    path
    for name in ("hyquant", "search", "metrics", "spaces", "tools")
    for path in (ROOT / name).rglob("*.py")
    if path != MAKES_BOMBS
)
LOADERS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
HARMLESS = {"pickle.UnpicklingError", "pickle.PickleError"}
EVALUATORS = {"eval", "exec", "compile", "builtins.eval", "builtins.exec", "builtins.compile"}
YAML = {"yaml." + name for name in ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")}
UNPICKLING = {  # of Optuna: both unpickle what they find in the storage
    "optuna.samplers.CmaEsSampler",
    "optuna.storages.JournalStorage",
}
OBJECTS_BETWEEN_RANKS = {  # they travel as pickles
    "torch.distributed." + name
    for name in (
        *("all_gather_object", "gather_object", "broadcast_object_list"),
        *("scatter_object_list", "send_object_list", "recv_object_list"),
    )
}
MODELS = {  # of MLflow and torch.hub: both unpickle what they fetch
    *("mlflow.pyfunc.load_model", "mlflow.pytorch.load_model", "mlflow.sklearn.load_model"),
    *("torch.hub.load", "torch.hub.load_state_dict_from_url"),
    *("torch.jit.load", "torch.package.PackageImporter", "pandas.read_pickle"),
}
FORBIDDEN = EVALUATORS | YAML | UNPICKLING | OBJECTS_BETWEEN_RANKS | MODELS


def names_of(tree: ast.AST) -> dict[str, str]:
    """Return what each imported name of a module stands for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """Return the full dotted name of an expression, "" if it is not one."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value, names)):
        return f"{owner}.{node.attr}"
    return ""


def constant(call: ast.Call, name: str) -> object:
    """Return the literal value of a keyword, None if it is absent or computed."""
    values = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def executing(source: str) -> list[str]:
    """Return "line: name" of every use in a source that could run code held by a file."""
    tree = ast.parse(source)
    names = names_of(tree)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = dotted(node, names)
            if "." in name and name.partition(".")[0] in LOADERS and name not in HARMLESS:
                found.add(f"{node.lineno}: {name}")
        if isinstance(node, ast.Call):
            name = dotted(node.func, names)
            unsafe_torch = (
                name in {"torch.load", "torch.serialization.load"} and constant(node, "weights_only") is not True
            )
            unsafe_numpy = any(keyword.arg == "allow_pickle" for keyword in node.keywords) and (
                constant(node, "allow_pickle") is not False
            )
            shell = constant(node, "shell") is True or name in {"os.system", "os.popen"}
            if name in FORBIDDEN or unsafe_torch or unsafe_numpy or shell:
                found.add(f"{node.lineno}: {name}")
    return sorted(found)


def test_there_are_sources_to_look_at():
    assert len(SOURCES) > 100


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_can_run_what_a_file_holds(path):
    assert executing(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "import pickle as p\np.loads(data)",
        "from pickle import Unpickler as U\nU(file)",
        "import torch\ntorch.load(file)",
        "from torch import load\nload(file, weights_only=False)",
        "import torch as t\nt.load(file, weights_only=flag)",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "import numpy as np\nnp.load(file, allow_pickle=flag)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "import marshal\nmarshal.loads(data)",
        "import joblib\njoblib.load(file)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import optuna\noptuna.samplers.CmaEsSampler()",
        "import torch.distributed as dist\ndist.all_gather_object(found, value)",
        "import torch\ntorch.hub.load_state_dict_from_url(url)",
        "import mlflow\nmlflow.pyfunc.load_model(uri)",
        "from optuna.storages import JournalStorage\nJournalStorage(backend)",
    ],
)
def test_a_call_that_runs_what_a_file_holds_is_found(source):
    assert len(executing(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(file, weights_only=True)",
        "import numpy as np\nnp.load(file)",
        "import yaml\nyaml.safe_load(text)",
        "import pickle\ntry:\n    read()\nexcept pickle.UnpicklingError:\n    raise",
        "model.eval()",
        "import re\nre.compile(text)",
    ],
)
def test_a_call_that_only_reads_is_not_found(source):
    assert executing(source) == []
