"""README and the docs: every line with moepp parses."""

import re
import runpy
import shlex

import pytest
import typer

from moepp_megatron.cli import main
from moepp_megatron.cli.usage import UsageError
from moepp_megatron.config.load import config_layers, load_config, validated
from tests import ROOT

QUICKSTART = ROOT / "configs/quickstart.yaml"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
# What a page says is refused.
REFUSED = "moepp train CONFIG --micro-batch-size 4"
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def _name(page):
    return page.relative_to(ROOT).as_posix()


def _lines(text):
    """Command lines of shell blocks, without comments, and of code within sentences."""
    for fence in _FENCE.finditer(text):
        if fence[2] in ("bash", "sh"):
            for line in fence[3].replace("\\\n", " ").splitlines():
                yield shlex.join(shlex.split(line, comments=True))
    for inline in re.findall(r"(?<!`)`([^`]+)`(?!`)", _FENCE.sub("", text)):
        yield " ".join(inline.split())


def _is_placeholder(word):
    """CONFIG, N or $VARIABLE stand for any value."""
    return bool(re.fullmatch(r"[A-Z][A-Z0-9_/.:]*", str(word))) or "$" in str(word)


def _check(line):
    """Follow the words through the commands, parse the rest, and check its settings."""
    command = typer.main.get_command(main.app)
    words = [word for word in shlex.split(line)[1:] if word != "..."]
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            return
        assert words[0] in command.commands, f"no command {words[0]}"
        command = command.commands[words.pop(0)]
    try:
        given = command.make_context(
            "moepp", ["1" if w in ("N", "RANK") else w for w in words]
        ).params
    except UsageError as error:
        if "Missing" in str(error):
            return
        raise
    overrides = given.get("overrides") or []
    for word in overrides:
        layers = [layer for _, layer in config_layers(QUICKSTART, [word])]
        if not _is_placeholder(word.partition("=")[2]):
            validated(_merged(*layers))
    config = str(given.get("config") or "")
    if config.startswith("configs/"):
        own = [word for word in overrides if not _is_placeholder(word.partition("=")[2])]
        load_config(ROOT / config, ["run.dir=RUN", "data.path=DIR", *own])


def _merged(lower, *uppers):
    for upper in uppers:
        both = {
            name: _merged(lower[name], value)
            for name, value in upper.items()
            if isinstance(lower.get(name), dict) and isinstance(value, dict)
        }
        lower = {**lower, **upper, **both}
    return lower


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "LOG.md"], ids=_name)
def test_command_lines_parse(page):
    for line in dict.fromkeys(_lines(page.read_text())):
        found = re.search(r"(?:^| |/)moepp [a-z].*", line)
        if found is None:
            continue
        if line == REFUSED:
            with pytest.raises(UsageError):
                _check(line)
        else:
            _check(found[0].strip())


@pytest.mark.parametrize(
    "script", sorted((ROOT / "docs/figures").glob("*.py")), ids=lambda x: x.stem
)
def test_scripts_of_figures_find_what_they_import(script, monkeypatch):
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script))
