"""Each feature can be deleted: its folder, and its lines in the list."""

import ast
import os
import shutil

import pytest
import yaml

from moepp_megatron.config.sections import section_models
from tests import ROOT
from tests.commands import program, succeeded
from tests.parallel.checkpoint_runs import trainer_settings
from tests.unit.data.letters import prepare_letters

PACKAGE = ROOT / "moepp_megatron"
FEATURES = sorted(path.parent.name for path in PACKAGE.glob("features/*/__init__.py"))
# Another one in every run, the same in all workers of it.
DRAWN = FEATURES[int(os.environ.get("PYTEST_XDIST_TESTRUNUID", "0"), 16) % len(FEATURES)]


class WithoutFeature(ast.NodeTransformer):
    """Removes what the list of features has of one."""

    def __init__(self, name):
        self.module = f"features.{name}."
        self.names = set()
        self.removed = 0

    def visit_ImportFrom(self, node):
        if not str(node.module).startswith(f"moepp_megatron.{self.module}"):
            return node
        self.names |= {alias.name for alias in node.names}
        return None

    def visit_ClassDef(self, node):
        node.bases = [base for base in node.bases if ast.unparse(base) not in self.names]
        kept = []
        is_text_of_removed = False
        for each in node.body:
            is_removed = isinstance(each, ast.AnnAssign) and (
                ast.unparse(each.annotation) in self.names
            )
            if not is_removed and not (is_text_of_removed and isinstance(each, ast.Expr)):
                kept.append(each)
            is_text_of_removed = is_removed
        node.body = kept
        return node

    def visit_Tuple(self, node):
        rows = [row for row in node.elts if self.module not in ast.unparse(row)]
        self.removed += len(node.elts) - len(rows)
        node.elts = rows
        return node


def delete(name, root):
    """Remove a feature from a copy of the package."""
    shutil.rmtree(root / "features" / name)
    registry = root / "features/registry.py"
    edit = WithoutFeature(name)
    tree = edit.visit(ast.parse(registry.read_text()))
    assert edit.removed, f"{name} has no part in the list"
    registry.write_text(ast.unparse(ast.fix_missing_locations(tree)))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == DRAWN else pytest.mark.slow) for n in FEATURES],
)
def test_a_run_trains_without(name, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    delete(name, tmp_path / PACKAGE.name)
    corpus = prepare_letters(tmp_path, "corpus", all="a")
    raw = trainer_settings(corpus, tmp_path / "run")
    raw["training"]["train_iters"] = 2
    if name == "validation":
        del raw["training"]["eval_iters"]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    script = ROOT / "tests/deleted.py"
    for arguments in (["--help"], ["train", str(config)]):
        succeeded(program(script, tmp_path, *arguments))
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert set(section_models()) >= set(raw)
