"""Size of the code by room: tokens of code and public names.

Tokens are Python's own, without comments, docstrings (of attributes too), line ends and
indentation, so that a count does not change with how the code is laid out.

    python -m benchmarks.code_size [FOLDER] [--depth N]     # moepp_megatron by default
"""

import argparse
import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def tokens(source: str) -> int:
    """Return the number of tokens of code in a Python source."""
    docstrings = {
        (node.lineno, node.col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(token.type not in _LAYOUT and token.start not in docstrings for token in found)


def tokens_of(paths: Iterable[Path]) -> int:
    """Return the tokens of code of Python files, together."""
    return sum(tokens(path.read_text(encoding="utf-8")) for path in paths)


def public_names(source: str) -> list[str]:
    """Return the functions and classes of a module whose names do not begin with an underscore."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    body = ast.parse(source).body
    return [node.name for node in body if isinstance(node, kinds) and node.name[0] != "_"]


def class_names(source: str) -> list[str]:
    """Return the names of a module's classes, private ones included."""
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]


def main() -> None:
    """Print a table of the rooms of a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", default="moepp_megatron", type=Path)
    parser.add_argument("--depth", type=int, default=1)
    args = parser.parse_args()
    sizes: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for path in sorted(args.folder.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        room = "/".join(path.relative_to(args.folder).parts[: args.depth])
        sizes[room] += tokens(source)
        names[room] += len(public_names(source))
    print(f"{'tokens':>9} {'public':>7}  room")
    for room, size in sizes.most_common():
        print(f"{size:9,} {names[room]:7,}  {room}")
    print(f"{sizes.total():9,} {names.total():7,}  {args.folder}")


if __name__ == "__main__":
    main()
