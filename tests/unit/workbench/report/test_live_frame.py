"""What `moepp monitor` shows."""

import io
import shlex
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from moepp_megatron.cli import main
from moepp_megatron.observe.alerts import Alert, AlertFile
from moepp_megatron.observe.status import StatusSink, read_status
from moepp_megatron.workbench.report.live import screen
from moepp_megatron.workbench.report.live.curve import LiveSeries, draw_curve, sparkline
from moepp_megatron.workbench.report.live.experts import expert_bars, layer_shares
from moepp_megatron.workbench.report.live.frame import Size, build_frame
from moepp_megatron.workbench.report.live.glyphs import ASCII, UNICODE
from moepp_megatron.workbench.report.live.run import LiveRun
from tests.parallel.training_runs import VANILLA

FAR_FUTURE_S = 1e6


def lines_of(run: Path, width: int, height: int | None = None, after_s: float = 0.0, glyphs=ASCII):
    live = LiveRun(run, clock=lambda: time.time() + after_s)
    live.poll()
    out = io.StringIO()
    console = Console(file=out, width=width, height=height or 100, color_system=None)
    console.print(build_frame(live, Size(width, height), glyphs), highlight=False)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def add_alerts(run: Path, count: int) -> None:
    file = AlertFile(run / "alerts.jsonl")
    for step in range(1, count + 1):
        file.send(
            Alert(
                step=step,
                time=1.0,
                rule="dead_expert",
                metric="expert_share",
                value=0.0,
                condition="== 0 for 50 steps " + "and more words " * 9 + "\nsecond line",
                severity="warning",
                action="warn",
                layer=2,
            )
        )


def nan_losses(records) -> None:
    for record in records[-3:]:
        record["loss"] = record["grad_norm"] = None


WIDTHS = pytest.mark.parametrize("width", [80, 120])


@WIDTHS
def test_a_run_that_has_not_begun(tmp_path: Path, width):
    lines = lines_of(tmp_path, width)
    assert lines[0].endswith("WAITING")
    assert lines[1:] == ["not started: no config.yaml yet"]


@WIDTHS
@pytest.mark.parametrize("height", [None, 24, 40])
def test_a_running_run(make_run, width, height):
    run = make_run(steps=60)
    add_alerts(run, 6)
    lines = lines_of(run, width, height)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert height is None or len(lines) <= height
    assert lines[0].startswith("quickstart ")
    assert lines[0].endswith("RUNNING")
    assert lines[1].startswith("step 60/300 ###")
    assert "20%  ETA 1 min" in lines[1]
    assert lines[2].startswith("running, last record ")
    assert "o validation " in text
    assert "(step 60)" in text
    assert "(phi 0.600)" in text
    assert " tokens/s | step 4" in text
    bars = [line for line in lines if line.startswith("layer ")]
    assert [line.split()[1] for line in bars] == ["1", "2", "3", "4"]
    assert all("#" in line and "|" in line and " FFN 0." in line for line in bars)
    first = next(i for i, line in enumerate(lines) if line.startswith("alerts  6"))
    assert len(lines[first + 1 :]) == 4
    assert lines[first + 1].startswith("warning at step 6: dead_expert: expert_share of layer 2")


@WIDTHS
def test_a_finished_run(make_run, width):
    lines = lines_of(make_run(steps=30, training={"train_iters": 30}), width, after_s=7200.0)
    assert lines[0].endswith("FINISHED")
    assert lines[1].endswith(" 100%")
    assert lines[2] == "finished 2 h 00 min ago"


@WIDTHS
def test_a_loss_that_is_not_finite(make_run, width):
    lines = lines_of(make_run(steps=30, edit=nan_losses), width)
    assert any(line.startswith("loss  not finite since step 28") for line in lines)
    assert any("grad norm nan" in line for line in lines)


@WIDTHS
def test_a_first_record_of_nothing_but_nan(make_run, width):
    def edit(records):
        records[0] |= {
            "loss": None,
            "ffn_fraction": None,
            "step_time_s": None,
            "tokens_per_s": None,
            "expert_share": [None] * 12,
            "layer_expert_share": [[None] * 12] * 4,
        }

    lines = lines_of(make_run(steps=1, edit=edit), width)
    assert "ETA unknown" in lines[1]
    assert sum("shares are not finite" in line for line in lines) == 4


@WIDTHS
def test_what_hardware_tells(make_run, width):
    def edit(records):
        for record in records:
            record |= {"mfu": 0.413, "gpu_power_w": 612.0, "energy_j": 1.8e6, "gpu_hours": 0.25}

    text = "\n".join(lines_of(make_run(steps=4, edit=edit), width))
    assert "MFU 41.3% | 612 W per GPU | 2 kWh | 1 GPU-hours" in text


def test_a_vanilla_run(make_run):
    run = make_run(
        steps=5,
        moe=VANILLA,
    )
    lines = lines_of(run, 80)
    assert any(line.startswith("layer 1 ") and "FFN 1.000" in line for line in lines)


def test_many_layers_show_the_striking_ones(make_run):
    def edit(records):
        shares = records[-1]["layer_expert_share"]
        shares[40] = [0.0, *[share * 1.1 for share in shares[40][1:]]]

    run = make_run(steps=2, edit=edit, model={"num_layers": 48})
    lines = lines_of(run, 80, 24)
    assert len(lines) <= 24
    (dead,) = [line for line in lines if line.startswith("layer 41 ")]
    assert dead.endswith("1 unused")
    assert "more layers, FFN share 0." in lines[-1]
    everything = lines_of(run, 80)
    assert sum(line.startswith("layer ") for line in everything) == 48


def test_bars_add_up(make_run):
    live = LiveRun(make_run(steps=3))
    live.poll()
    assert live.config is not None
    assert live.history.newest is not None
    shares = layer_shares(live.history.newest, live.config.experts, [1, 2, 3, 4])
    for layer in shares:
        assert sum(layer.kinds) == pytest.approx(1.0)
    for bar in expert_bars(shares, 0.6, 100, 9, UNICODE):
        assert bar.cell_len <= 100
        assert bar.plain[10:70].count("\u2588") in range(25, 60)


def test_a_curve_falls_from_top_left_to_bottom_right():
    series = LiveSeries(range(1, 101), [100.0 - step for step in range(100)], points=[(50, 51.0)])
    for glyphs in (ASCII, UNICODE):
        lines = [line.plain for line in draw_curve(series, 49, 8, glyphs)]
        assert len(lines) == 9
        assert max(map(len, lines)) <= 49
        filled = [[c for c, x in enumerate(line[9:]) if x.strip()] for line in lines[:-1]]
        assert all(row for row in filled)
        assert [min(row) for row in filled] == sorted(min(row) for row in filled)
        assert sum(glyphs.point in line for line in lines) == 1
        assert lines[-1].split() == ["step", "1", "100"]


def test_a_curve_breaks_at_what_is_not_finite():
    series = LiveSeries(range(40), [1.0] * 10 + [float("nan")] * 20 + [1.0] * 10)
    plain = "".join(line.plain[9:] for line in draw_curve(series, 49, 5, ASCII)[:-1])
    assert 18 <= plain.count("*") <= 22


def test_a_sparkline_shows_the_last_values():
    assert sparkline([9.0, 0.0, float("nan"), 7.0], 3, ASCII) == "_ #"
    assert sparkline([1.0, 1.0], 5, UNICODE) == "\u2581\u2581"
    assert sparkline([float("inf")], 5, ASCII) == " "


def moepp(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moepp", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.run()
    return int(ended.value.code or 0)


def test_the_command_prints_one_frame(make_run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert moepp(monkeypatch, "monitor", str(make_run(steps=5)), "--once") == 0
    assert "step 5/300" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing: is not a folder, looked at "),
        ([".", "--once", "--prometheus", "9400"], "--once (true) must not come with --prometheus"),
    ],
)
def test_wrong_usage_is_one_line(monkeypatch, capsys, tmp_path: Path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert moepp(monkeypatch, "monitor", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1


def test_the_view_follows_a_run_to_its_end(make_run):
    run = make_run(steps=5, training={"train_iters": 6})
    content = (run / "metrics.jsonl").read_text()
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=24)
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            last = content.splitlines()[-1].replace('"step": 5', '"step": 6')
            (run / "metrics.jsonl").write_text(content + last + "\n")

    screen.watch(LiveRun(run), console, 0.5, sleep=sleep)
    assert waits == [0.5, 0.5]
    shown = out.getvalue()
    assert "step 5/6" in shown
    assert shown.count("FINISHED") == 2


@WIDTHS
def test_the_command_that_goes_on_is_whole(make_run, width):
    """It is there to be copied: no word is cut, and its lines together are the command."""
    run = make_run(steps=5)
    words = ["moepp", "train", "a.yaml", "run.dir=it's /a 'long' folder", *["moe.tau=0.5"] * 9]
    StatusSink(run)
    status = read_status(run).model_copy(update={"state": "ended", "go_on": shlex.join(words)})
    (run / "status.json").write_text(status.model_dump_json())
    lines = lines_of(run, width)
    (begin,) = [i for i, line in enumerate(lines) if line.endswith("; to go on:")]
    end = next(i for i, line in enumerate(lines) if i > begin and not line.endswith(" \\"))
    assert end - begin > 1
    assert max(map(len, lines)) <= width
    assert shlex.split("\n".join(lines[begin + 1 : end + 1]).replace("\\\n", "")) == words


def test_ctrl_c_leaves_the_last_frame(make_run):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=24)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    screen.watch(LiveRun(make_run(steps=5)), console, 0.5, sleep=interrupt)
    assert out.getvalue().count("RUNNING") == 2
