"""Reads the arguments of a Megatron-LM run from a file. Nothing in it is executed.

The file is a shell script that calls `pretrain*.py`, or YAML with a mapping of arguments
(`MODEL_ARGS:` with keys such as `--num-layers`).
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from textwrap import shorten
from typing import Any

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.regular_file import read_text
from moepp_megatron.config.yaml_file import parse_yaml

_PARENTHESES = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
_TOKEN = re.compile(
    r"(?P<blank>[^\S\n]+|(?<![^\s;&|()])#[^\n]*)"
    r"|(?P<redirection>(?:\d+|&)?[<>]+(?:&[\d-]+)?)"
    r"|(?P<operator>&&|\|\||[;&|()\n])"
    r"|(?P<word>(?:'[^']*'|\"(?:[^\"\\]|\\.)*\"|`[^`]*`|\$" + _PARENTHESES + r"|\$\{[^}]*\}|\\."
    r"|[^\s;&|()<>'\"`\\])+)"
    r"|(?P<unclosed>.)",
    re.DOTALL,
)
_QUOTED = re.compile(r"'([^']*)'|\"((?:[^\"\\]|\\.)*)\"|((?:\$\{[^}]*\}|[^'\"\\]|\\.)+)", re.DOTALL)
_VARIABLE = re.compile(
    r"(?<!\\)\$(?:\{(\w+)(?:\[[@*]\])?(?::?([-=?])((?:[^{}]|\{[^{}]*\})*))?\}|(\w+))", re.DOTALL
)
_ARRAY = re.compile(r"\"?\$\{(?:\w+)\[[@*]\]\}\"?")
_OWN_ARGUMENTS = re.compile(r"\\\n|\$\{?[@*](?::\d+)?\}?")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=.*", re.DOTALL)
_PROGRAM = re.compile(r"(?:.*/)?pretrain\w*\.py", re.DOTALL)
_ENDS = ("&&", "||", "|", ";", "2>&1")
_DECLARES = ("export", "declare", "local", "readonly", "typeset", "-a", "-x", "-r", "-i")
_BRANCHES = dict.fromkeys(("if", "case", "for", "while", "until", "{"), 1)
_BRANCHES |= dict.fromkeys(("fi", "esac", "done", "}"), -1)
_BRANCHES |= dict.fromkeys(("then", "elif", "else", "do", "!"), 0)
_LONGEST = 1_000_000

Arguments = dict[str, list[str]]


def read_arguments(path: Path, variables: Mapping[str, str]) -> tuple[Arguments, list[str]]:
    """Return each argument's words by its name without dashes, and what is uncertain about them.

    `variables` win over the values in the file; unknown variables stay as they are. ConfigError if
    the file cannot be read or parsed.
    """
    text = read_text(path, "FILE")
    script = _Script(variables)
    if path.suffix in (".yaml", ".yml"):
        words = [script.expanded(word) for word in _yaml_words(parse_yaml(text, str(path)))]
        return _arguments(words, [])
    try:
        return _arguments(*script.read(_OWN_ARGUMENTS.sub(" ", text)))
    except ValueError as error:
        raise ConfigError(
            f"FILE ({path}) must be a shell script that can be read ({error}); give one with all "
            "quotes closed"
        ) from None


def _yaml_words(value: Any) -> list[str]:
    """All keys that begin with `--`, wherever they are nested, each before its value."""
    words: list[str] = []
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if not str(key).startswith("--"):
            words += _yaml_words(inner)
        elif inner is not False:
            values = inner if isinstance(inner, list) else str(inner).split()
            words += [str(key), *(str(one) for one in values if one != "True")]
    return words


def _arguments(words: Sequence[str], notes: list[str]) -> tuple[Arguments, list[str]]:
    """Parse each option's values; the last occurrence wins and `;` ends a command."""
    found: Arguments = {}
    starts = [index for index, word in enumerate(words) if word == ";" or word.startswith("--")]
    for start, end in pairwise([*starts, len(words)]):
        option, equals, value = words[start].partition("=")
        name = option.lstrip("-").replace("_", "-")
        values = [*([value] if equals else []), *words[start + 1 : end]]
        if name != ";" and found.setdefault(name, values) != values:
            both = f"{' '.join(found[name])}; {' '.join(values)}"
            notes.append(f"--{name} has several values ({both}): the last is taken")
            found[name] = values
    return found, notes


class _Script:
    """The variables of a shell script, read from its top, and the words of its call."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given
        # An array is its words with spaces between them.
        self._values: dict[str, str] = {}
        self._seen: dict[str, list[str]] = {}
        # Variables that are set in a branch or twice: in each value, in what is expanded now.
        self._doubts: dict[str, set[str]] = {}
        self._used: set[str] = set()
        self._depth = self._length = 0
        self._is_conditional = False
        self._everything: list[str] = []
        self._calls: list[tuple[list[str], list[str]]] = []

    def read(self, text: str) -> tuple[list[str], list[str]]:
        """The words after `pretrain*.py`, or all without such a command, and what is uncertain."""
        command: list[str] = []
        array: list[str] | None = None
        is_target = False
        for match in _TOKEN.finditer(text + "\n"):
            kind, token = match.lastgroup, match[0]
            if kind == "unclosed":
                raise ValueError(f"No closing quotation: {shorten(text[match.start() :], 40)}")
            if kind == "redirection":
                is_target = not token[-1].isdigit()
            elif kind == "operator" and array is not None:
                if token == ")":
                    self._assign(command.pop(), array)
                    array = None
            elif kind == "operator" and token == "(" and command and command[-1].endswith("="):
                array = []
            elif kind == "operator":
                self._end(command)
                self._is_conditional = token in ("&&", "||")
                command = []
            elif kind == "word" and is_target:
                is_target = False
            elif kind == "word" and not command and token in _BRANCHES:
                self._depth += _BRANCHES[token]
            elif kind == "word":
                (command if array is None else array).append(token)
        if not self._calls:
            self._used = set(self._seen)
            note = "FILE has no command with pretrain*.py: every argument in it is read"
            return self._everything, [note, *self._notes()]
        words, notes = self._calls[-1]
        if any(other != words for other, _ in self._calls):
            notes.append("FILE has several commands with pretrain*.py: the last is read")
        return words, notes

    def _notes(self) -> list[str]:
        return [
            f"{name} is set in a branch or more than once ({'; '.join(self._seen[name])}): the "
            f"last is taken; give {name}=VALUE if another is meant"
            for name in sorted(self._used)
            if name in self._doubts.get(name, ())
        ]

    def expanded(self, text: str) -> str:
        """Put in the variables that are known; the others stay."""

        def value(match: re.Match[str]) -> str:
            name = match[1] or match[4]
            self._used |= self._doubts.get(name, set())
            known = self._given.get(name, self._values.get(name))
            if known is None and match[2] in ("-", "="):
                known = self.expanded(match[3].strip("'\""))
                if match[2] == "=":
                    self._values[name] = known
            return match[0] if known is None else known

        text = _VARIABLE.sub(value, text)
        self._length += len(text)
        if self._length > _LONGEST:
            raise ValueError(f"its values have more than {_LONGEST} characters")
        return text

    def _split(self, word: str) -> list[str]:
        """The words that bash makes of one."""
        if _ARRAY.fullmatch(word):
            word = word.strip('"')
        text = self._unquoted(word)
        return [text] if text == word or {"'", '"'} & {*word} else _words(text)

    def _unquoted(self, word: str) -> str:
        return "".join(
            single or re.sub(r"\\(.)", r"\1", self.expanded(double or plain))
            for single, double, plain in _QUOTED.findall(word)
        )

    def _assign(self, word: str, array: list[str] | None = None) -> None:
        target, _, raw = word.partition("=")
        name, is_added = target.rstrip("+"), target.endswith("+")
        self._used = set()
        if array is None:
            value = self._unquoted(raw)
        else:
            raw = " ".join(array)
            words = [each for item in array for each in self._split(item)]
            value = " ".join(shlex.quote(each) if " " in each else each for each in words)
        self._everything += [";", *_words(value)]
        if name in self._given:
            return
        old, seen = self._values.get(name), self._seen.setdefault(name, [])
        shown = shorten(value, 60)
        seen += [] if shown in seen else [shown]
        is_branch = self._depth > 0 or self._is_conditional
        is_more = is_added or re.search(rf"\$\{{?{name}\b", raw) is not None
        if is_branch or (len(seen) > 1 and not is_more):
            self._used.add(name)
        if is_more:
            self._used |= self._doubts.get(name, set())
        self._doubts[name] = self._used
        # In a branch it may be an argument of the script itself, which has a default above.
        if not (is_branch and old is not None and "$" in value):
            more = (old or "") + (" " if array is not None else "") if is_added else ""
            self._values[name] = more + value

    def _end(self, command: list[str]) -> None:
        """Take a command: its assignments, and its words where it is a call."""
        while command and (command[0] in _DECLARES or _ASSIGNMENT.fullmatch(command[0])):
            word, *command = command
            if word not in _DECLARES:
                self._assign(word)
        self._used = set()
        words = [each for word in command for each in self._split(word)]
        self._everything += [";", *words]
        # A whole command in quotes, for `eval` or `sh -c`.
        flat = [e for w in words for e in (_words(w) if "pretrain" in w else [w]) if e]
        for index, word in enumerate(flat):
            call = list(takewhile(lambda one: one not in _ENDS, flat[index + 1 :]))
            if _PROGRAM.fullmatch(word) and any(one.startswith("--") for one in call):
                self._calls.append((call, self._notes()))
                return


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()
