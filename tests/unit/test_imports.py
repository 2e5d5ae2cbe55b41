"""Every name that a script imports from this repository is there, without importing anything."""

import ast
from functools import cache

import pytest

from tests import ROOT

OURS = ("moepp_megatron", "benchmarks", "tests", "launch")
FILES = sorted(
    path for top in OURS for path in (ROOT / top).rglob("*.py") if "golden" not in path.parts
)


def _file(module):
    path = ROOT.joinpath(*module.split("."))
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else None


@cache
def _names(file):
    """Return the names that a file defines or imports; None where it makes names as it runs."""
    if not file.exists():
        return frozenset()
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
            if node.name == "__getattr__":
                return None
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.TypeAlias):
            found.add(node.name.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return frozenset(found)


def _missing(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level or node.module is None:
            continue
        if node.module.partition(".")[0] not in OURS:
            continue
        file = _file(node.module)
        names = frozenset() if file is None else _names(file)
        for alias in node.names:
            is_module = _file(f"{node.module}.{alias.name}") is not None
            if names is not None and alias.name not in names and not is_module:
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.module}.{alias.name}"


@pytest.mark.parametrize("top", OURS)
def test_every_imported_name_exists(top):
    files = [path for path in FILES if path.is_relative_to(ROOT / top)]
    assert files
    assert [name for path in files for name in _missing(path)] == []
