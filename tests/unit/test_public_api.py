"""Other programs import the names on the pages of docs/api, and no others."""

import ast
import importlib
import re
import sys

import pytest

import moepp_megatron
from moepp_megatron import config
from tests import ROOT
from tests.commands import captured


def _documented():
    """Full names that the pages of docs/api document."""
    found = set()
    for page in (ROOT / "docs/api").glob("*.md"):
        module = ""
        for directive, name in re.findall(
            r"^\.\. (currentmodule|auto\w+):: (\S+)", page.read_text(), re.MULTILINE
        ):
            if directive in ("currentmodule", "automodule"):
                module = name
            else:
                found.add(name if name.startswith("moepp_megatron.") else f"{module}.{name}")
    return found


def _internal(source):
    """Names of the package that a program imports and no page of docs/api documents."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moepp_megatron"):
            used |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            used |= {name.name for name in node.names if name.name.startswith("moepp_megatron.")}
    documented = _documented() | {f"moepp_megatron.{name}" for name in moepp_megatron.__all__}
    modules = {name.rpartition(".")[0] for name in documented}
    return used - documented - modules


def test_documented_names_exist():
    names = _documented()
    assert len(names) > 30
    for name in names:
        module, _, own_name = name.rpartition(".")
        assert hasattr(importlib.import_module(module), own_name), name


def test_every_export_is_documented():
    exported = {f"moepp_megatron.{name}" for name in moepp_megatron.__all__}
    exported |= {f"moepp_megatron.config.{name}" for name in config.__all__}
    short = {name.rpartition(".")[2] for name in _documented()} | {"__version__"}
    assert not {name for name in exported if name.rpartition(".")[2] not in short}


@pytest.mark.parametrize("program", ["examples/own_megatron_loop.py"])
def test_an_example_uses_documented_names(program):
    assert not _internal((ROOT / program).read_text())


@pytest.mark.parametrize(
    "code",
    [
        "import moepp_megatron.cli.main",
        "import moepp_megatron.config",
        "import moepp_megatron.layer_settings",
        "import moepp_megatron.training.checkpoint.find",
        "from moepp_megatron.config.plugins import Plugin; Plugin('sinks').installed()",
    ],
)
def test_what_answers_fast_imports_nothing_heavy(code):
    code += "; import sys; print({'torch', 'megatron', 'numpy', 'matplotlib'} & set(sys.modules))"
    done = captured([sys.executable, "-c", code], check=True)
    assert done.stdout == "set()\n"
