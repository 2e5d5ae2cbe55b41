"""The prose: docstrings and docs can be read cold, without the code in the eye."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "moepp_megatron"
# The log records what was said at the time.
DOCS = sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "LOG.md"})

_PREPOSITIONS = (
    "Above|After|Against|Among|Around|As|At|Before|Behind|Below|Beside|Between|Beyond|By|During|For|"
    "From|In|Inside|Into|Of|On|Outside|Over|Per|Since|Through|To|Towards|Under|Until|With|Within|Without"
)
# "For each layer, whether ..." and "At most 8 bytes" say by themselves what they describe.
_OPENING = re.compile(
    rf"(?!For (each|every)\b|At (least|most)\b)({_PREPOSITIONS})\b", re.IGNORECASE
)
_ENTRY = re.compile(r"\s*\*{0,2}\w+(, \w+)*: (?P<text>.*)")
_WORDS = {
    "rival: say baseline": re.compile(r"\brivals?\b", re.IGNORECASE),
    "card: say GPU": re.compile(r"(?<!model )(?<!Model )\bcards?\b(?!\.py)", re.IGNORECASE),
    "a token: say per token": re.compile(
        r"(bytes?|energy|experts?|FLOPs?|joules?|\d) a token\b(?!'s| \w+s\b)",
        re.IGNORECASE,
    ),
    "told from: say distinguished from": re.compile(r"\b(not to be told|told (apart|from))\b"),
    "stands: say is": re.compile(r"\bstands?\b(?! (for|in for)\b)(?!-in)", re.IGNORECASE),
}


def _flagged_words(line: str) -> Iterator[str]:
    # Names of commands, files and settings are not prose.
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)|^ *moepp .*", "", line)
    yield from (rule for rule, pattern in _WORDS.items() if pattern.search(prose))


def _flagged_docstring(text: str) -> Iterator[tuple[str, str]]:
    """Rule and line of each finding in a docstring."""
    for number, line in enumerate(text.split("\n")):
        entry = _ENTRY.fullmatch(line) if number else None
        start = entry["text"] if entry else line
        if (entry or not number) and _OPENING.match(start):
            yield "begins with a preposition: say what it is", line.strip()
        yield from ((rule, line.strip()) for rule in _flagged_words(start))


def _docstrings(source: str) -> Iterator[tuple[int, str]]:
    """First line and text of each docstring of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def _strings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each string of a module that is neither a docstring nor one word."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts = [part.value if isinstance(part, ast.Constant) else "0" for part in node.values]
            text = "".join(map(str, texts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = "" if id(node) in docstrings | parts else node.value
        else:
            continue
        if " " in text:
            yield node.lineno, text


def _findings(path: Path) -> list[str]:
    name = path.relative_to(ROOT).as_posix()
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [
            f"{name}:{start}: {rule}: {line}"
            for start, text in _docstrings(source)
            for rule, line in _flagged_docstring(text)
        ] + [
            f"{name}:{start}: {rule}: {text}"
            for start, text in _strings(source)
            for rule in _flagged_words(text)
        ]
    without_code = re.sub(
        r"```.*?```", lambda code: "\n" * code[0].count("\n"), source, flags=re.DOTALL
    )
    return [
        f"{name}:{number}: {rule}: {line.strip()}"
        for number, line in enumerate(without_code.split("\n"), start=1)
        for rule in _flagged_words(line)
    ]


def test_prose_can_be_read_cold() -> None:
    files = [*DOCS, *sorted(PACKAGE.rglob("*.py"))]
    findings = [finding for path in files for finding in _findings(path)]
    assert not findings, "\n" + "\n".join(findings)


@pytest.mark.parametrize(
    "text",
    [
        "Of its files.",
        "Rates.\n\nArgs:\n    cores: of the machine.",
        "Rates.\n\nRaises:\n    ValueError: For another dtype.",
        "The rival's speed.",
        "The memory of a card.",
        "FFN experts a token.",
        "Noise is not to be told from it.",
        "It stands in the file.",
    ],
)
def test_a_riddle_is_flagged(text: str) -> None:
    assert list(_flagged_docstring(text))


@pytest.mark.parametrize(
    "text",
    [
        "For each layer, whether it is dense.",
        "Rates.\n\nArgs:\n    cores: Number of cores.\n        As many as there are.",
        "A model card, `moepp bench card`, a stand-in; K stands for top-k.",
        "Rates.\n\nExamples:\n    moepp bench card --json card.json",
        "How many FFN experts a token takes; the experts a token's logits select.",
    ],
)
def test_plain_prose_is_not_flagged(text: str) -> None:
    assert not list(_flagged_docstring(text))
