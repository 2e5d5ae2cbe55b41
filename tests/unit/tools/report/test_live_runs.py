"""Many runs served by one process."""

import json
import re
import shutil
import socket
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moepp_megatron.tools.report.live import prometheus
from moepp_megatron.tools.report.live.prometheus import LiveRuns, serve
from moepp_megatron.tools.report.run_data import ReportError
from tests.unit.tools.report.conftest import alert, append, records_of

# By metric and run.
Numbers = dict[tuple[str, str], float]


@pytest.fixture
def add_run(make_run, tmp_path):
    """Writes a run to a folder of another name."""

    def add(name, **changes):
        run = tmp_path / "runs" / name
        run.parent.mkdir(exist_ok=True)
        return Path(shutil.move(make_run(**changes), run))

    return add


def ask(address):
    with urllib.request.urlopen(address, timeout=30) as answer:
        return answer.read().decode()


def numbers(text):
    return {
        (sample.name, sample.labels.pop("run")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if len(sample.labels) == 1
    }


def states(text):
    """The state of each run."""
    found = re.findall(r'moepp_run_state{run="(.*)",state="(.*)"} 1.0', text)
    assert len(dict(found)) == len(found)
    return dict(found)


def test_runs_in_a_folder_come_and_go(add_run, tmp_path):
    a, b = add_run("a", steps=5), add_run("b", steps=8, run={"name": "other"})
    (tmp_path / "runs/latest").symlink_to(a)
    (tmp_path / "runs/notes").mkdir()
    runs = LiveRuns([tmp_path / "runs"])
    assert not runs.has_one_run
    address = serve(runs, 0)
    text = ask(address)
    got = numbers(text)
    assert states(text) == {"a": "running", "b": "running"}
    assert got["moepp_step", "a"] == 5
    assert got["moepp_step", "b"] == 8
    assert 'moepp_run_info{name="other",run="b"} 1.0' in text
    # Prometheus wants the samples of a metric together.
    assert text.count("# TYPE moepp_step gauge") == 1

    append(b, records_of(b)[-1] | {"step": 300})
    add_run("c", steps=3)
    shutil.rmtree(a)
    text = ask(address)
    assert states(text) == {"b": "finished", "c": "running"}
    got = numbers(text)
    assert ("moepp_step", "b") not in got
    assert got["moepp_train_iters", "b"] == 300
    assert got["moepp_step", "c"] == 3


def test_runs_are_named_below_what_they_have_in_common(add_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add_run("a", steps=1)
    (tmp_path / "elsewhere").mkdir()
    assert list(LiveRuns([Path("runs/a")]).look()) == ["a"]
    assert list(LiveRuns([Path("runs")]).look()) == ["a"]
    assert list(LiveRuns([Path("runs"), Path("runs/../runs/a")]).look()) == ["a"]
    both = LiveRuns([Path("runs"), Path("elsewhere")])
    assert list(both.look()) == ["runs/a", "elsewhere"]
    assert LiveRuns([Path("elsewhere")]).has_one_run
    # The folder that was empty gets runs of its own; names stay.
    add_run("b", steps=1).rename(tmp_path / "elsewhere/b")
    assert list(both.look()) == ["runs/a", "elsewhere/b"]


def test_a_folder_without_runs_is_refused(add_run, tmp_path):
    add_run("a", steps=1)
    (tmp_path / "files").mkdir()
    (tmp_path / "files/text").write_text("")
    with pytest.raises(ReportError, match="files: holds other files but no config.yaml"):
        LiveRuns([tmp_path / "runs", tmp_path / "files"])
    with pytest.raises(ReportError, match="nowhere: is not a folder"):
        LiveRuns([tmp_path / "runs", tmp_path / "nowhere"])


def test_what_is_damaged_in_one_run_does_not_keep_the_others(add_run):
    a, b = add_run("a", steps=2), add_run("b", steps=2)
    record = records_of(b)[-1]
    # No signed number of 64 bits; a number that no float holds; half a surrogate pair.
    append(b, record | {"step": 2**70}, record | {"step": 3, "own": 10**400, "x\x1b[2J": 1.5})
    damaged = alert(1).model_dump() | {"rule": "\ud800\x1b"}
    (b / "alerts.jsonl").write_text(json.dumps(damaged) + "\n")
    runs = LiveRuns([a.parent])
    address = serve(runs, 0)
    text = ask(address)
    assert numbers(text)["moepp_step", "a"] == 2
    assert numbers(text)["moepp_step", "b"] == 3
    assert 'moepp_other{key="x\\\\x1b[2J",run="b"} 1.5' in text
    assert "own" not in text
    assert "\x1b" not in text

    (a / "config.yaml").write_text("[")
    assert numbers(ask(address))["moepp_step", "b"] == 3


def test_the_command_serves_many(add_run, monkeypatch, moepp):
    a, b = add_run("a", steps=1), add_run("b", steps=2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    texts = []

    def wait():
        texts.append(ask(f"http://127.0.0.1:{port}/metrics"))

    monkeypatch.setattr(prometheus, "wait_until_stopped", wait)
    code, out, _ = moepp("monitor", "--prometheus", port, a, b)
    assert code == 0
    assert states(texts[0]) == {"a": "running", "b": "running"}
    assert out == f"serving http://127.0.0.1:{port}/metrics\n"


def test_several_runs_are_shown_by_prometheus_only(add_run, moepp):
    a, b = add_run("a", steps=1), add_run("b", steps=2)
    code, _, err = moepp("monitor", a, b)
    assert code == 2
    line = "error: RUN (2 folders) must be one, which is shown; name one, or serve all of them with"
    assert err.startswith(line)
