"""Text from elsewhere cannot command a terminal."""

import io

import pytest
from rich.table import Table
from rich.text import Text

from moepp_megatron.runtime.printable import printable
from moepp_megatron.runtime.terminal import Console
from tests import ROOT
from tests.commands import moepp

PACKAGE = ROOT / "moepp_megatron"
HOSTILE = "a\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u2028\x7f\rb"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u2028\x7f\x0db"


def test_what_a_terminal_obeys_is_escaped():
    assert printable(HOSTILE) == SHOWN
    assert printable("a\n\tb") == "a\n\tb"
    assert printable("a\n\tb", keep="") == r"a\x0a\x09b"
    assert printable("\ud800") == r"\ud800"
    assert printable("\u00e4 \U0001f600 [bold]") == "\u00e4 \U0001f600 [bold]"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_table_holds_no_control_characters_but_styles(terminal):
    out = io.StringIO()
    table = Table("name")
    table.add_row(Text(HOSTILE))
    table.add_row(HOSTILE.replace("[", "("))
    console = Console(file=out, force_terminal=terminal, width=120, color_system="standard")
    console.print(table)
    console.print(Text(HOSTILE, style="bold"))
    text = out.getvalue()
    # What is left are rich's own colours: ESC [ numbers m.
    first, *others = text.split("\x1b[")
    plain = first + "".join(part.partition("m")[2] for part in others)
    assert set(plain) - {"\n"} == {c for c in plain if c.isprintable()}
    assert r"\x1b]0;title" in plain


def test_every_console_is_this_one():
    """Also of what is written later: rich's own is only named as a type."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if "from rich.console import" in text and "Console(" in text and path.name != "terminal.py":
            pytest.fail(f"{path} makes a console of rich's own")


def test_an_error_that_quotes_a_file_is_escaped(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    name = "\\u001b[2Jtensor"
    header = f'{{"{name}": 1}}'.encode()
    content = len(header).to_bytes(8, "little") + header
    (tmp_path / "model.safetensors").write_bytes(content)
    done = moepp("convert", "hf-to-mcore", tmp_path, tmp_path / "out")
    assert done.returncode == 2
    assert r"\x1b[2Jtensor" in done.stderr
    assert "\x1b" not in done.stderr
