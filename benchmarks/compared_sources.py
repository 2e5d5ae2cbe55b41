"""Checks what docs/compared.md and README.md say of other repositories against their sources.

`python -m benchmarks.compared_sources FOLDER`: FOLDER holds a checkout of each repository (or its
bare git directory) as OWNER+NAME. Each cell about a repository needs a line of
`compared_sources.txt`: `NAME | row | path | text` quotes a line of a file, and `!path` says that no
file below path has the pattern. Exit status 1 where a quote is gone, an absent thing is found, or a
cell has no line.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("docs/compared.md", "README.md")
REPOSITORIES = {
    "Megatron-LM": "NVIDIA+Megatron-LM",
    "Megatron-Bridge": "NVIDIA-NeMo+Megatron-Bridge",
    "Automodel": "NVIDIA-NeMo+Automodel",
    "torchtitan": "pytorch+torchtitan",
    "DeepSpeed": "deepspeedai+DeepSpeed",
    "ZEDA": "TsinghuaC3I+ZEDA",
}
# Rows of judgement, which no line of a file holds.
JUDGED = ("best for",)
Quote = tuple[str, str, str, str]


def quotes() -> list[Quote]:
    """Repository, row, path and text of each line of the table."""
    text = (ROOT / "benchmarks" / "compared_sources.txt").read_text(encoding="utf-8")
    rows = [line.split(" | ", 3) for line in text.splitlines()]
    return [(name, row, path, quoted) for name, row, path, quoted in rows]


def cells() -> Iterator[tuple[str, str, str]]:
    """Repository, row and text of each cell that is about another repository."""
    for page in PAGES:
        columns: list[str] = []
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
            row = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not row or not columns or len(row) != len(columns):
                names = [re.sub(r".*/([\w-]+)\)", r"\1", cell) for cell in row]
                columns = names if set(names) & REPOSITORIES.keys() else []
                continue
            for name, cell in zip(columns, row, strict=True):
                if name in REPOSITORIES and row[0] not in JUDGED and not cell.startswith("---"):
                    yield name, row[0], cell


def unquoted() -> list[str]:
    """Cells without a line of the table, and lines without a cell."""
    ours, quoted = {cell[:2] for cell in cells()}, {quote[:2] for quote in quotes()}
    absent = {quote[:2] for quote in quotes() if quote[2].startswith("!")}
    wrong = [
        cell[:2] for cell in cells() if (cell[2] in ("no", "not found")) != (cell[:2] in absent)
    ]
    return [
        *(f"{name}, {row}: no line in compared_sources.txt" for name, row in sorted(ours - quoted)),
        *(f"{name}, {row}: no such cell" for name, row in sorted(quoted - ours)),
        *(f"{name}, {row}: says one thing, quotes another" for name, row in wrong),
    ]


def git(folder: Path, *arguments: str) -> str:
    """Return the output of git; empty where it finds nothing."""
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def found(folder: Path, path: str, text: str) -> str:
    """The first place, as file:line, that has the text, or below `!path` the pattern."""
    if path.startswith("!"):
        places = git(folder, "grep", "-InEi", text, "HEAD", "--", path[1:])
    else:
        places = git(folder, "grep", "-InF", "-e", text, "HEAD", "--", path)
    return ":".join(places.split("\n")[0].split(":")[1:3])


def main(checkouts: Path) -> int:
    """Print the commit of each checkout and what is wrong; the exit status."""
    problems, checked = unquoted(), 0
    page = (ROOT / PAGES[0]).read_text(encoding="utf-8")
    for name, folder in REPOSITORIES.items():
        place = next(
            (p for p in (checkouts / folder / "repo", checkouts / folder) if p.is_dir()), None
        )
        if place is None:
            print(f"{name}: no checkout, not checked")
            continue
        commit, date = git(place, "log", "-1", "--format=%h %cs").split()
        ours = commit[:8] in page
        print(f"{name}: {commit} of {date}{'' if ours else ', which the page does not name'}")
        for _, row, path, text in (quote for quote in quotes() if quote[0] == name):
            at, checked = found(place, path, text), checked + 1
            if bool(at) == path.startswith("!"):
                problems.append(f"{name}, {row}: {f'found in {at}' if at else f'gone from {path}'}")
    print(*problems, f"{checked} quotes checked, {len(problems)} problems", sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
