"""Text of a foreign run folder, wherever a command prints it, cannot command the terminal."""

import contextlib
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from moepp_megatron.cli import inspect
from moepp_megatron.cli.echo import echo
from moepp_megatron.observe.status import RunStatus, StatusSink
from moepp_megatron.runtime.printable import make_logs_printable
from moepp_megatron.tools.experiments.pilot.page import print_pilot
from moepp_megatron.tools.experiments.pilot.pilot import PilotResult, _ArmOutcome
from moepp_megatron.tools.experiments.pilot.verdict import Verdict
from moepp_megatron.tools.experiments.scaling.page import _ScaleRecord, print_records
from moepp_megatron.tools.experiments.statistics import Interval
from moepp_megatron.tools.report.profile import _table
from moepp_megatron.tools.report.terminal import wide_console
from tests.unit.tools.report.conftest import synthetic_config, synthetic_records, write_run

# Sets the title, clears the screen, makes a link by rich's markup, ends markup that never began.
HOSTILE = "x\x1b]0;t\x1b[2J\x9b31m\u202e[link=file:///x]y[/link][/red]z"
SHOWN = r"x\x1b]0;t\x1b[2J\x9b31m\u202e[link=file:///x]y[/link][/red]z"


def harmless(text):
    """The text without rich's own colours, after a look that nothing else commands."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert all(c.isprintable() or c == "\n" for c in plain), ascii(plain)
    return plain


@pytest.fixture
def moepp(moepp, monkeypatch):
    """Runs a command; returns its exit code, stdout and stderr, free of commands."""
    # Long lines, so that no text is cut before what it is looked at for.
    monkeypatch.setenv("COLUMNS", "400")

    def call(*arguments):
        status, *printed = moepp(*arguments)
        return status, *map(harmless, printed)

    return call


@pytest.fixture
def hostile_run(tmp_path):
    config = synthetic_config(run={"name": HOSTILE})
    run = write_run(tmp_path / "folder\x1b[2J", config, synthetic_records(config, 5))
    alert = dict.fromkeys(("rule", "metric", "condition", "action"), HOSTILE)
    numbers = {"step": 1, "time": 1.0, "value": 1.0, "severity": "warning"}
    (run / "alerts.jsonl").write_text(json.dumps(alert | numbers) + "\n")
    StatusSink(run)
    status = RunStatus.read(run)
    ended = status.model_copy(update={"state": "ended", "resume_command": HOSTILE})
    (run / "status.json").write_text(ended.model_dump_json())
    return run


@pytest.mark.parametrize("colours", [False, True])
def test_monitor(hostile_run, moepp, monkeypatch, colours):
    if colours:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    code, out, err = moepp("monitor", hostile_run, "--once")
    assert (code, err) == (0, "")
    title = out.splitlines()[0]
    assert title.startswith(SHOWN)
    assert r"folder\x1b[2J" in title
    # Here, and as rule, metric, condition and action of the alert.
    assert out.count(SHOWN) >= 5


def test_report(hostile_run, moepp):
    code, out, _ = moepp("report", hostile_run)
    assert code == 0
    assert out.endswith(r"folder\x1b[2J/report.html" + "\n")


@pytest.mark.parametrize("command", ["report", "monitor"])
def test_errors_that_quote_a_configuration(hostile_run, moepp, command):
    (hostile_run / "config.yaml").write_text(yaml.safe_dump({HOSTILE: 1, "run": {"name": []}}))
    code, _, err = moepp(command, hostile_run)
    assert code == 2
    assert err.startswith("error: ")
    assert r"folder\x1b[2J" in err
    assert err.count("\n") == 1


def test_profile(capsys, monkeypatch):
    monkeypatch.setattr("moepp_megatron.tools.report.terminal.LOG_WIDTH", 400)
    wide_console(highlight=True).print(_table(HOSTILE, {"group": str}, [HOSTILE], 1))
    printed = harmless(capsys.readouterr().out)
    assert SHOWN in printed
    assert printed.count(r"x\x1b]0;t") == 2, printed


def test_pilot(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    number = Interval(1.0)
    arm = _ArmOutcome("moepp", HOSTILE, 1, number, None, None, number)
    verdict = Verdict("pays", *[number] * 6, speeds_agree=True)
    print_pilot(PilotResult("", [1], 0, 3, 0.1, [arm, arm], verdict, HOSTILE))
    # A cell may be cut, for escapes are wider than what they stand for.
    assert harmless(capsys.readouterr().out).count(SHOWN[:20]) >= 3


def test_scaling(capsys, monkeypatch):
    monkeypatch.setattr("moepp_megatron.tools.report.terminal.LOG_WIDTH", 400)
    # A layout is parts of a name and a number.
    layout = f"ep={HOSTILE.replace('=', '')}"
    print_records([_ScaleRecord(1, layout, "moepp", "weak", 1, 1.0, 1.0, 1.0, 1.0, 1, None)])
    assert f"EP{SHOWN[:20]}" in harmless(capsys.readouterr().out)


def test_inspection(capsys, monkeypatch):
    for name, stand_in in {
        "runtime.distributed.initialized": lambda rank: contextlib.nullcontext(),
        "tools.inspection.record.trace_model": lambda request: object(),
        "tools.report.inspection.write_inspection": lambda *args: [("page", Path(HOSTILE))],
    }.items():
        monkeypatch.setattr(f"moepp_megatron.{name}", stand_in)
    model = SimpleNamespace(scoring=SimpleNamespace(config=None))
    request = SimpleNamespace(notices=[HOSTILE], model=model)
    inspect._inspect_rank(request)  # type: ignore[arg-type]
    printed = capsys.readouterr()
    # A path keeps one slash of several.
    assert harmless(printed.out) == f"page         {SHOWN.replace('///', '/')}\n"
    # Beside what imports may log.
    assert f"note: {SHOWN}\n" in harmless(printed.err)


def test_lines(capsys):
    echo(f"a\t{HOSTILE}\nb")
    echo(HOSTILE, err=True)
    printed = capsys.readouterr()
    assert printed.out == f"a\t{SHOWN}\nb\n"
    assert printed.err == f"{SHOWN}\n"


def test_log_messages(capsys, monkeypatch):
    before = logging.getLogRecordFactory()
    make_logs_printable()
    try:
        record = logging.getLogger("somebody").makeRecord(
            "somebody", logging.WARNING, "file", 1, "skipping %s", (HOSTILE,), None
        )
    finally:
        logging.setLogRecordFactory(before)
    assert logging.Formatter("%(message)s").format(record) == f"skipping {SHOWN}"
