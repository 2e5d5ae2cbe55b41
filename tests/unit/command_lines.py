"""Command lines in Markdown: where they are, and what is wrong with them.

Capital words are placeholders (`CONFIG`, `N`) for any value, and `...` is for what is left out.
"""

import functools
import importlib.util
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from moepp_megatron.cli import main
from moepp_megatron.cli.usage import UsageError
from moepp_megatron.config import ConfigError, load_config
from moepp_megatron.config.load import config_layers, validated

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_/.:]*")
_PROGRAMS = ("moepp", ".venv/bin/moepp")
_SCRIPT = re.compile(r"(\./)?launch/(\w+)\.sh")
# Options of the scripts themselves; the others hand everything to `moepp train`.
_SCRIPT_OPTIONS = {
    "env": {"--dev": 0, "--te": 0, "--offline": 1},
    "test": {"--quick": 0, "--record-durations": 0, "-k": 1, "-m": 1, "-q": 0, "-x": 0},
}
_TRAINING = {"quickstart": ["configs/quickstart.yaml"], "local": [], "multinode": []}


@dataclass(frozen=True)
class Line:
    """A command line, and whether it is whole: one in the middle of a sentence need not be."""

    text: str
    whole: bool


def lines_of(markdown: str) -> Iterator[Line]:
    """Every command line of a page: those of its shell blocks, and those within sentences."""
    for fence in _FENCE.finditer(markdown):
        if fence[2] in ("bash", "sh"):
            for line in map(_without_wrapper, _joined(fence[3])):
                if _is_ours(line):
                    yield Line(line, whole=True)
    for inline in _INLINE.finditer(_FENCE.sub("", markdown)):
        text = " ".join(inline[1].split())
        if _is_ours(text):
            yield Line(text, whole=False)


def _joined(block: str) -> list[str]:
    """The lines of a shell block: those that a backslash divides are one, and comments are gone."""
    lines = (line.strip() for line in block.replace("\\\n", " ").split("\n"))
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line]


def _without_wrapper(line: str) -> str:
    """`moepp ...` of a line such as `nsys profile moepp ...`."""
    return re.sub(r"^.* (?=moepp [a-z])", "", line)


def _is_ours(line: str) -> bool:
    words = line.split()
    if not words:
        return False
    return bool(_SCRIPT.fullmatch(words[0])) or (
        len(words) > 1 and words[0] in (*_PROGRAMS, "sbatch", "python")
    )


@functools.cache
def problem_of(line: Line) -> str | None:
    """What is wrong with a command line, or None."""
    words = ["VARIABLE" if "$" in word else word for word in shlex.split(line.text)]
    script = _SCRIPT.fullmatch(words[0])
    try:
        if words[0] in _PROGRAMS:
            return _problem_of_moepp(words[1:], line.whole)
        if script:
            return _problem_of_script(script[2], words[1:], line.whole)
        if words[:2] == ["python", "-m"]:
            return _problem_of_module(words[2], words[3:])
        file = next(word for word in words[1:] if not word.startswith("-"))
        return None if (ROOT / file).is_file() or _PLACEHOLDER.fullmatch(file) else f"no {file}"
    except (ConfigError, UsageError) as error:
        return str(error)


def _problem_of_module(name: str, words: list[str]) -> str | None:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        return f"no module {name}"
    if not Path(found.origin).is_relative_to(ROOT):
        return None
    source = Path(found.origin).read_text(encoding="utf-8")
    unknown = [word for word in words if word.startswith("--") and word not in source]
    return f"{name} has no {unknown}" if unknown else None


def _problem_of_script(name: str, words: list[str], whole: bool) -> str | None:
    file = ROOT / "launch" / f"{name}.sh"
    if not file.is_file():
        return f"no {file}"
    if name in _TRAINING:
        return _problem_of_moepp(["train", *_TRAINING[name], *words], whole)
    options = _SCRIPT_OPTIONS.get(name)
    if options is None:
        # Megatron-LM's own loop, whose arguments are Megatron's.
        source = file.read_text(encoding="utf-8")
        unknown = [word for word in words if word.startswith("--") and word not in source]
        return f"{file.name} has no {unknown}" if unknown else None
    rest = iter(words)
    for word in rest:
        if word in options:
            for _ in range(options[word]):
                next(rest)
        elif not (_is_placeholder(word) or (ROOT / word.split("::")[0]).exists()):
            return f"{file.name} takes no {word}"
    return None


@functools.cache
def _program() -> Any:
    return typer.main.get_command(main.app)


def _problem_of_moepp(words: list[str], whole: bool) -> str | None:
    """Follow `words` through the commands, then parse what is left as the command does."""
    command: Any = _program()
    names, rest = ["moepp"], [word for word in words if word != "..."]
    while hasattr(command, "commands"):
        if not rest or rest[0].startswith("-"):
            return f"{names} needs a command" if whole and not rest else None
        names.append(rest.pop(0))
        if names[-1] not in command.commands:
            return f"no command {names[-1]}"
        command = command.commands[names[-1]]
    try:
        given = _parsed(command, names, rest)
    except UsageError as error:
        if "Missing" in str(error) and (not whole or "..." in words):
            return None
        raise
    return _problem_of_settings(command, given)


def _parsed(command: Any, names: list[str], words: list[str]) -> Mapping[str, Any]:
    """The command's parameters; a placeholder behind an option may have to be a number."""
    name = " ".join(names)
    try:
        given: Mapping[str, Any] = command.make_context(name, list(words)).params
    except UsageError:
        with_numbers = [
            "1" if _is_placeholder(word) and before.startswith("--") else word
            for before, word in zip(["", *words], words, strict=False)
        ]
        given = command.make_context(name, with_numbers).params
    return given


def _is_placeholder(value: Any) -> bool:
    return bool(_PLACEHOLDER.fullmatch(str(value)))


def _problem_of_settings(command: Any, values: Mapping[str, Any]) -> str | None:
    """Whether overrides are settings with their values; a given CONFIG must keep all rules too."""
    metavars = {parameter.name: parameter.metavar or "" for parameter in command.params}
    overrides = [
        word
        for name, value in values.items()
        if metavars.get(name, "").endswith(".key=value") and value
        for word in value
    ]
    for word in overrides:
        _check_override(word)
    config = next((v for n, v in values.items() if metavars.get(n) == "CONFIG" and v), None)
    if config is None or _is_placeholder(config) or not str(config).startswith("configs/"):
        return None
    file = ROOT / str(config)
    if not file.is_file():
        return f"no {config}"
    plain = [word for word in overrides if not _is_placeholder(word.partition("=")[2])]
    _load(file, *plain)
    return None


@functools.cache
def _load(file: Path, *overrides: str) -> None:
    load_config(file, ["run.dir=RUN", "data.path=DIR", *overrides])


@functools.cache
def _check_override(word: str) -> None:
    """Refuse a name that is no setting, or a value that it does not take."""
    content: dict[str, Any] = {}
    for _, layer in config_layers(QUICKSTART, [word]):
        content = _merged(content, layer)
    if not _is_placeholder(word.partition("=")[2]):
        validated(content)


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(lower[name], value) if isinstance(value, Mapping) else value
        for name, value in upper.items()
        if isinstance(lower.get(name), Mapping)
    }
    return {**lower, **upper, **both}
