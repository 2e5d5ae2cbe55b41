"""Help says everything that was written into it, and every error of usage has one form."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from moepp_megatron.cli import main


def _commands() -> Iterator[tuple[list[str], Any]]:
    """Every command and what leads to it, `["bench", "layer"]`."""
    waiting: list[tuple[list[str], Any]] = [([], typer.main.get_command(main.app))]
    while waiting:
        path, command = waiting.pop()
        yield path, command
        for name, inner in getattr(command, "commands", {}).items():
            waiting.append(([*path, name], inner))


COMMANDS = list(_commands())


def _without_breaks(text: str) -> str:
    """Lines are wrapped between words, and at hyphens."""
    return "".join(text.split())


@pytest.mark.parametrize(
    ("path", "command"), COMMANDS, ids=[" ".join(["moepp", *path]) for path, _ in COMMANDS]
)
def test_help_shows_every_word_that_was_written(path: list[str], command: Any) -> None:
    """Brackets too, as in `input_ids [b, s]`, and also where the terminal is narrow."""
    shown = CliRunner().invoke(main.app, [*path, "--help"], env={"COLUMNS": "60"})
    assert shown.exit_code == 0
    output = _without_breaks(shown.stdout)
    assert _without_breaks(command.help.split("\f")[0]) in output
    for parameter in command.params:
        text = getattr(parameter, "help", None)
        assert _without_breaks(text or "") in output, f"{parameter.name} of {path}"


def test_the_walk_has_found_the_commands() -> None:
    names = {" ".join(path) for path, _ in COMMANDS}
    assert {"", "score", "train", "data prepare", "bench layer", "convert upcycle"} <= names


def _run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["moepp", *arguments])
    with pytest.raises(SystemExit) as caught:
        main.run()
    written = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, written.out, written.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "No such command 'nope'; see moepp --help"),
        (["score"], "Missing argument 'CHECKPOINT'; see moepp score --help"),
        (["train", "c.yaml", "--zzz"], "No such option: --zzz; see moepp train --help"),
        (["train", "c.yaml", "--nproc", "0"], "'--nproc'"),
        (["train", "c.yaml", "--nproc", "two"], "'--nproc'"),
        (["train", "no-such.yaml"], "no-such.yaml"),
        (["bench", "layer", "--dtype", "bf1"], "--dtype (bf1)"),
        (["report", "no-such-run"], "no-such-run: is not a folder"),
        (["monitor", "no-such-run", "--once"], "no-such-run: is not a folder"),
    ],
)
def test_wrong_usage_is_one_line_of_one_form(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = _run(arguments, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("group", [[], ["data"], ["bench"], ["convert"]])
def test_a_group_alone_shows_its_help(
    group: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = _run(group, monkeypatch, capsys)
    assert code == 2
    assert "Commands:" in err
    assert "error" not in err


def test_an_exit_code_reaches_the_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(**_: Any) -> int:
        return 75

    monkeypatch.setattr(main, "app", leave)
    assert _run([], monkeypatch, capsys)[0] == 75


def test_ctrl_c_while_the_program_is_imported_prints_nothing() -> None:
    code = (
        "import os, signal, sys\n"
        "class CtrlC:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'moepp_megatron.config': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, CtrlC())\n"
        "import moepp_megatron.cli.main\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("before", ["default_int_handler", "SIG_IGN"])
def test_the_import_leaves_ctrl_c_as_it_was(before: str) -> None:
    code = (
        f"import signal; signal.signal(signal.SIGINT, signal.{before})\n"
        "import moepp_megatron.cli.main\n"
        f"assert signal.getsignal(signal.SIGINT) is signal.{before}, "
        "signal.getsignal(signal.SIGINT)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _lose_the_peer(**_: object) -> None:
    raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize("written", ["2", "0", ""])
def test_a_rank_whose_peer_has_refused_says_nothing(
    written: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "status").write_text(written or "75")
    if written:
        monkeypatch.setenv("MOEPP_STATUS_FILE", str(tmp_path / "status"))
    monkeypatch.setattr(main, "app", _lose_the_peer)
    if written == "2":
        assert _run([], monkeypatch, capsys) == (2, "", "")
        return
    with pytest.raises(RuntimeError, match="closed by peer"):
        main.run()
