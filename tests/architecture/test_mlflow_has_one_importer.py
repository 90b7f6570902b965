import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def imports_of(path: Path) -> set[str]:
    """Return the top-level packages a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_mlflow_is_imported_in_one_module_only():
    importers = {
        str(path.relative_to(ROOT))
        for package in ("hyquant", "metrics", "spaces", "search")
        for path in (ROOT / package).rglob("*.py")
        if "mlflow" in imports_of(path)
    }

    assert importers == {"search/mlflow_client.py"}
