"""A package that a message tells the user to install can be installed as it says."""

import ast
import re
import shlex
import sys
import tomllib

from moepp_megatron.runtime.optional import OF_ALL, TRANSFORMER_ENGINE, how_to_install
from tests import ROOT

PACKAGE = ROOT / "moepp_megatron"


def test_the_command_is_for_the_python_that_runs():
    command = shlex.split(how_to_install("transformers>=5", "wandb"))
    assert command == [sys.executable, "-m", "pip", "install", "transformers>=5", "wandb"]


def test_an_extra_of_a_clone_that_is_not_installed(monkeypatch):
    """A registry might have another package of this name."""
    assert "moepp_megatron[all]" in how_to_install("moepp_megatron[all]")
    monkeypatch.setattr(sys, "path", [])
    assert shlex.split(how_to_install("moepp_megatron[all]", "wandb"))[-2:] == [
        f"{ROOT}[all]",
        "wandb",
    ]


def named_in_messages():
    """The requirements in calls of `how_to_install`, a value in braces left out."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="ascii"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "how_to_install":
                for argument in node.args:
                    text = re.sub(
                        r"\{.*?\}", "", ast.unparse(argument).removeprefix("f").strip("'\"")
                    )
                    found.add(text.rstrip("="))
    return found


def test_every_requirement_is_one_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    # megatron-core is asked for in the tested version, which lies in the project's range.
    known = {*wanted, "megatron-core", "moepp_megatron[all]"}
    named = named_in_messages()
    assert {"wandb", "pyarrow", "megatron-core"} <= named
    assert named <= known


def test_each_package_of_the_extra_has_a_use():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = [package.partition(">")[0] for package in project["optional-dependencies"]["all"]]
    assert sorted(named.partition(" (")[0] for named in OF_ALL.values()) == extra
    base = [re.split("[<>=]", package)[0] for package in project["dependencies"]]
    assert base == ["torch", "megatron-core"]


def test_no_message_has_a_command_of_its_own():
    """A registry does not have this package, and `pip` may be another environment's."""
    own = {"runtime/optional.py", "interop/hf_files/configuration_moepp.py"}
    for path in PACKAGE.rglob("*.py"):
        name = str(path.relative_to(PACKAGE))
        text = path.read_text(encoding="ascii")
        assert "moepp-megatron[" not in text, name
        # An installation of a clone has no name that could be wrong.
        plain = re.findall(r"pip install (?!-e 'CLONE)", text)
        assert name in own or not plain, name


def test_transformer_engine_is_installed_by_an_option_that_exists():
    script, option = TRANSFORMER_ENGINE.split()[:2]
    assert f"{option})" in (ROOT / script).read_text()
