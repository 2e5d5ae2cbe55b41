"""Changes of single places of the package's source, for `benchmarks.mutants`.

A mutant is a comparison, an operation, a constant or a condition turned, or a call or a returned
value left out.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOMS = ("moe", "training", "config", "workbench/planning", "interop")
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATIONS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        path: The file, below the package.
        kind: What is done: compare, operate, constant, negate, call or return.
        index: Which of the places of that kind in the file.
        line: Of the place.
    """

    path: str
    kind: str
    index: int
    line: int


class _Places(ast.NodeTransformer):
    """Counts the places of a kind; changes one of them."""

    def __init__(self, kind: str, index: int = -1) -> None:
        self.kind, self.index = kind, index
        self.lines: list[int] = []

    def _is_it(self, kind: str, node: ast.AST) -> bool:
        if kind != self.kind:
            return False
        self.lines.append(getattr(node, "lineno", 0))
        return len(self.lines) - 1 == self.index

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if self._is_it("compare", node):
            node.ops[0] = _COMPARISONS[type(node.ops[0])]()
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        text = any(
            isinstance(each, (ast.JoinedStr, ast.Constant)) and not _is_number(each)
            for each in (node.left, node.right)
        )
        if type(node.op) in _OPERATIONS and not text and self._is_it("operate", node):
            node.op = _OPERATIONS[type(node.op)]()
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            if self._is_it("constant", node):
                return ast.copy_location(ast.Constant(not node.value), node)
        elif isinstance(node.value, (int, float)) and self._is_it("constant", node):
            return ast.copy_location(ast.Constant(node.value + 1), node)
        return node

    def _negated(self, node: ast.If | ast.IfExp | ast.While) -> ast.AST:
        self.generic_visit(node)
        if self._is_it("negate", node):
            node.test = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
        return node

    visit_If = visit_IfExp = visit_While = _negated

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Call) and self._is_it("call", node):
            return ast.copy_location(ast.Pass(), node)
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if node.value is not None and not _is_none(node.value) and self._is_it("return", node):
            node.value = ast.copy_location(ast.Constant(None), node.value)
        return node

    def _without_types(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        # Annotations compute nothing.
        node.body = [self.visit(each) for each in node.body]
        node.args.defaults = [self.visit(each) for each in node.args.defaults]
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _without_types

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float))


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


KINDS = ("compare", "operate", "constant", "negate", "call", "return")


def mutants(package: Path, other: Path | None = None) -> Iterator[Mutant]:
    """All of them, in the rooms of `ROOMS`, of files that `other` has with the same content."""
    for room in ROOMS:
        for path in sorted((package / room).rglob("*.py")):
            source = path.read_bytes()
            twin = None if other is None else other / path.relative_to(package)
            if twin is not None and not (twin.is_file() and twin.read_bytes() == source):
                continue
            tree = ast.parse(source)
            for kind in KINDS:
                places = _Places(kind)
                places.visit(copy.deepcopy(tree))
                for index, line in enumerate(places.lines):
                    yield Mutant(str(path.relative_to(package)), kind, index, line)


def sample(package: Path, count: int, seed: int, other: Path | None = None) -> list[Mutant]:
    """As many of each room, drawn by `seed`."""
    chance = random.Random(seed)
    everything = list(mutants(package, other))
    drawn = []
    for room in ROOMS:
        of_room = [each for each in everything if each.path.startswith(room + "/")]
        drawn += chance.sample(of_room, count // len(ROOMS))
    return drawn


def changed(source: str, together: Sequence[Mutant]) -> str:
    """The file's text with several changes of it."""
    # What takes parts of the tree away comes last, from the end on: no other place is renumbered.
    order = sorted(together, key=lambda each: (each.kind in ("call", "return"), -each.index))
    tree: ast.AST = ast.parse(source)
    for mutant in order:
        tree = _Places(mutant.kind, mutant.index).visit(tree)
    return ast.unparse(ast.fix_missing_locations(tree))


@contextlib.contextmanager
def applied(tree: Path, together: Sequence[Mutant]) -> Iterator[None]:
    """Have the files of `tree` changed."""
    sources = {}
    try:
        for name in sorted({mutant.path for mutant in together}):
            path = tree / "moepp_megatron" / name
            sources[path] = path.read_text(encoding="utf-8")
            of_file = [mutant for mutant in together if mutant.path == name]
            path.write_text(changed(sources[path], of_file), encoding="utf-8")
        yield
    finally:
        for path, source in sources.items():
            path.write_text(source, encoding="utf-8")
