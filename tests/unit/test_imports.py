"""Every name that a script imports from this repository is there, without importing anything."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("moepp_megatron", "benchmarks", "tests", "launch")
FILES = sorted(
    path for top in OURS for path in (ROOT / top).rglob("*.py") if "golden" not in path.parts
)


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else None


@cache
def _names(file: Path) -> frozenset[str] | None:
    """What a file defines or imports anywhere; None where it makes names as it runs."""
    if not file.exists():
        return frozenset()
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
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


def _missing(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
def test_every_imported_name_exists(top: str) -> None:
    files = [path for path in FILES if path.is_relative_to(ROOT / top)]
    assert files
    assert [name for path in files for name in _missing(path)] == []


# Tests of these folders are tests of these rooms of the package; all other tests are of none.
_ROOMS_OF_TESTS = {
    "tests/interop": ("interop",),
    "tests/unit/config": ("config", "layer_settings"),
    "tests/unit/fp8": ("moe", "model"),
    "tests/unit/moe": ("moe", "model"),
    "tests/unit/resilience": ("training",),
    **{f"tests/unit/{room}": (room,) for room in ("cli", "data", "observe", "runtime", "training")},
    **{
        f"tests/unit/tools/{path.name}": (f"tools.{path.name}",)
        for path in (ROOT / "tests/unit/tools").iterdir()
    },
}


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _private_names(path: Path) -> Iterator[str]:
    """`module.name` of the package's private names that a file imports, reads or replaces."""
    modules: dict[str, str] = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OURS[0]):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                modules[alias.asname or alias.name] = name
                if _is_private(alias.name):
                    yield name
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in modules:
                pass
            case ast.Call(args=[ast.Name(id=owner), ast.Constant(value=str(name)), *_]) if (
                owner in modules
            ):
                pass
            case ast.Constant(value=str(text)) if re.fullmatch(rf"{OURS[0]}(\.\w+)+", text):
                owner, _, name = text.rpartition(".")
            case _:
                continue
        if _is_private(name):
            yield f"{modules.get(owner, owner)}.{name}"


def test_private_names_are_used_only_by_tests_of_their_room() -> None:
    strangers = []
    for path in FILES:
        place = path.relative_to(ROOT)
        if place.is_relative_to(OURS[0]):
            continue
        folders = [folder.as_posix() for folder in place.parents]
        rooms = next((_ROOMS_OF_TESTS[each] for each in folders if each in _ROOMS_OF_TESTS), ())
        allowed = tuple(f"{OURS[0]}.{room}." for room in rooms)
        names = set(_private_names(path))
        strangers += [(str(place), name) for name in names if not name.startswith(allowed)]
    assert strangers == []
