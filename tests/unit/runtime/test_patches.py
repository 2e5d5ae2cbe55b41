"""Changes to other libraries: undone as they were, and all of them in the table."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import moepp_megatron
from moepp_megatron.runtime import patches
from moepp_megatron.runtime.patches import Replacements, replaced

ROOT = Path(moepp_megatron.__file__).parent
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
    for path in ROOT.rglob("*.py")
    if path.parent.name != "hf_files"  # the exported model, which sets its own modules
}
HOOKS = {"threading.excepthook", "sys.unraisablehook"}
# A mark that megatron-core reads, on a parameter of ours; a setting of our provider of models for
# Megatron-Bridge, on the copies of it that stages hold.
MARKS = {
    "setattr(parameter, 'sequence_parallel', config.sequence_parallel)",
    "setattr(stage, name, value)",
}


class Owner:
    kind = "class"

    def method(self):
        return "own"


def test_an_object_is_as_before():
    owner = Owner()
    owner.kind = "object"
    with replaced(owner, method=lambda: "other", kind="replaced"):
        assert (owner.method(), owner.kind) == ("other", "replaced")
    assert vars(owner) == {"kind": "object"}
    assert owner.method() == "own"


def test_what_is_replaced_twice_is_undone_in_reverse():
    owner, module = Owner(), SimpleNamespace(value=1)
    replacements = Replacements()
    for value in (2, 3):
        replacements.put(module, "value", value)
        replacements.put(owner, "kind", value)
    replacements.undo()
    assert module.value == 1
    assert vars(owner) == {}


def test_a_failure_undoes_it_too():
    owner = Owner()
    with pytest.raises(RuntimeError), replaced(owner, kind="replaced"):
        raise RuntimeError
    assert owner.kind == "class"


def test_every_module_that_patches_is_in_the_table():
    listed = re.findall(r"^([a-z_.]+) \(.*\): ", patches.__doc__, re.M)
    assert set(listed) == {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "moepp_megatron.runtime.patches"
    }


def _foreign_assignments(tree):
    """Attributes of imported things that are set, and functions that are set in any object."""
    nodes = list(ast.walk(tree))
    imported = {
        (alias.asname or alias.name).partition(".")[0]
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "setattr",
            "delattr",
            "patch",
            "patch.object",
        ):
            if node.args and ast.unparse(node.args[0]) == "self":
                continue
            yield ast.unparse(node)
        if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            continue
        is_function = isinstance(node.value, ast.Lambda) or (
            isinstance(node.value, ast.Name) and node.value.id in functions
        )
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in (part for each in targets for part in getattr(each, "elts", [each])):
            if not isinstance(target, ast.Attribute):
                continue
            root = target
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            name = root.id if isinstance(root, ast.Name) else ""
            is_own = isinstance(target.value, ast.Name) and name in ("self", "cls")
            if name in imported or (is_function and not is_own):
                yield ast.unparse(target)


def test_the_scan_sees_every_way():
    source = """
import torch.distributed as dist
from torch import cuda
dist.all_reduce, other = 1, 2
cuda.nvtx.range_push = print
def f(optimizer):
    def g(): ...
    optimizer.step = g
    self.writer.meta = lambda: 0
    self.mine = g
    setattr(optimizer, "step", g)
"""
    assert set(_foreign_assignments(ast.parse(source))) == {
        "dist.all_reduce",
        "cuda.nvtx.range_push",
        "optimizer.step",
        "self.writer.meta",
        "setattr(optimizer, 'step', g)",
    }


def test_nothing_is_patched_in_another_way():
    assert not [
        (name, what)
        for name, tree in TREES.items()
        if name != "runtime.patches"
        for what in _foreign_assignments(tree)
        if what not in HOOKS | MARKS
    ]
