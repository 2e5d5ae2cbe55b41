"""A quick run covers every room, and what it names is there."""

import ast
import sys

import pytest

from tests import quick
from tests.commands import captured
from tests.unit.test_rooms import ROOMS

FILES = {file: ast.parse((quick.ROOT / file).read_text()) for file in quick.short_files()}


def _imported(tree):
    """Modules of the package that a test file imports, functions included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("moepp_megatron.") for name in found if "moepp_megatron" in name}


# Nothing is computed in `version`.
@pytest.mark.parametrize("room", [room for room in ROOMS if room not in ("version", "__main__")])
def test_every_room_has_a_short_file(room):
    inside = [
        file
        for file, tree in FILES.items()
        if any(name == room or name.startswith(f"{room}.") for name in _imported(tree))
    ]
    assert inside


def test_every_case_is_there():
    # pytest refuses a name that it does not find, its parameters included.
    cases = [f"tests/{case}" for case in quick.CASES.values()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"]
    done = captured([*command, *cases], cwd=quick.ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
