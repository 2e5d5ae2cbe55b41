"""Scaling tests without ranks: points, layouts, efficiency, resuming, failures, the page."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moepp_megatron.cli.main import app
from moepp_megatron.config import ConfigError, load_config, with_overrides
from moepp_megatron.tools.experiments.runner import RunFailed, claim, run_trial
from moepp_megatron.tools.experiments.scaling.page import scale_records
from moepp_megatron.tools.experiments.scaling.points import (
    _parse_layout,
    build_points,
    shared_settings,
)
from moepp_megatron.tools.experiments.timed_step import BothSteps, TimedStepTrial
from tests import ROOT
from tests.refusals import config_error

QUICKSTART = ROOT / "configs/quickstart.yaml"


@pytest.fixture
def config():
    return load_config(QUICKSTART)


def scale(out, *arguments):
    """`moepp scale` in this process."""
    return CliRunner().invoke(app, ["scale", str(QUICKSTART), "--out", str(out), *arguments])


def both_steps(moepp_s, vanilla_s, tokens=4096):
    return BothSteps(
        phi=0.6,
        tokens=tokens,
        vanilla_ms=vanilla_s * 1e3,
        moepp_ms=moepp_s * 1e3,
        speedup=vanilla_s / moepp_s,
        vanilla_a2a_bytes=1000,
        moepp_a2a_bytes=600,
        vanilla_a2a_time_s=0.3,
        moepp_a2a_time_s=0.2,
    )


def test_points_of_both_modes(config):
    found, impossible = build_points(config, [1, 2, 4], ["auto"], ["strong", "weak"])
    points = [*found.values()]
    assert [(p.nproc, p.layout[-11:], p.global_batch_size, p.modes) for p in points] == [
        (1, ",ep=1,etp=1", 16, ("strong", "weak")),
        (2, ",ep=2,etp=1", 16, ("strong",)),
        (2, ",ep=2,etp=1", 32, ("weak",)),
        (4, ",ep=4,etp=1", 16, ("strong",)),
        (4, ",ep=4,etp=1", 64, ("weak",)),
    ]
    assert not impossible
    assert points[-1].name == [*found][-1] == "n4_tp1-pp1-cp1-ep4-etp1_b64"
    own = with_overrides(config, points[-1].overrides)
    assert own.parallel.expert_model_parallel_size == 4
    assert own.training.global_batch_size == 64


def test_layouts_that_do_not_fit_are_left_out_with_the_reason(config):
    # Six ranks: the widest expert parallelism that divides 8 experts and 6 ranks is 2, and a
    # batch of 16 is no multiple of 6 ranks times 4.
    points, impossible = build_points(config, [2, 6], ["auto", "ep=4", "tp=2"], ["strong"])
    assert [(p.nproc, p.layout) for p in points.values()] == [
        (2, "tp=1,pp=1,cp=1,ep=2,etp=1"),
        (2, "tp=2,pp=1,cp=1,ep=2,etp=1"),
    ]
    left_out = ["2 ranks, ep=4", "6 ranks, auto", "6 ranks, ep=4", "6 ranks, tp=2"]
    assert list(impossible) == [f"{what}, strong" for what in left_out]
    assert "must be divisible by" in impossible["2 ranks, ep=4, strong"]
    assert "training.global_batch_size (16)" in impossible["6 ranks, auto, strong"]


def test_weak_batch_grows_from_the_smallest_count(config):
    points, _ = build_points(config, [2, 4], ["ep=1"], ["weak"])
    assert [(p.nproc, p.global_batch_size) for p in points.values()] == [(2, 16), (4, 32)]


@pytest.mark.parametrize(
    "text", ["ep", "ep=0", "ep=x", "dp=2", "ep=1,ep=2", "", "ep=-1", "ep=2;tp=1"]
)
def test_malformed_layouts(text):
    with config_error("--layout"):
        _parse_layout(text)


def test_records_are_relative_to_the_fastest_layout_of_the_smallest_count(config):
    points, _ = build_points(config, [2, 4], ["ep=1", "ep=2"], ["strong"])
    times = {(2, "1"): 4.0, (2, "2"): 3.0, (4, "1"): 2.0, (4, "2"): 1.0}
    seconds = {point: times[point.nproc, point.layout[-7]] for point in points.values()}
    found = scale_records({point: both_steps(s, 2 * s) for point, s in seconds.items()})
    records = [r for r in found if r.kind == "moepp"]
    assert [(r.nproc, r.step_time_s, r.efficiency) for r in records] == [
        (2, 4.0, pytest.approx(3 / 4)),
        (2, 3.0, 1.0),
        (4, 2.0, pytest.approx(3.0 * 2 / (2.0 * 4))),
        (4, 1.0, pytest.approx(3.0 * 2 / (1.0 * 4))),
    ]
    assert all(r.speedup == 2.0 for r in records)
    assert records[1].tokens_per_s == pytest.approx(4096 / 3)
    assert {(r.kind, r.a2a_time_s) for r in found} == {("moepp", 0.2), ("vanilla", 0.3)}


def test_folder_of_another_test_is_refused(config, tmp_path):
    # The configuration may be in the folder.
    (tmp_path / "config.yaml").write_text(config.to_yaml())

    def claimed(config, rounds=20):
        claim(tmp_path, shared_settings(config, rounds), ("points", "logs"))

    claimed(config)
    # Where files go and how long a run trains say nothing about speed.
    claimed(load_config(QUICKSTART, ["run.dir=else", "training.train_iters=70"]))
    with config_error(r"--out .* moe\.tau \(0.75, now 0.5\) differs"):
        claimed(load_config(QUICKSTART, ["moe.tau=0.5"]))
    with config_error(r"measuring\.rounds \(20, now 5\) differs"):
        claimed(config, 5)
    (tmp_path / "settings.json").write_text("{")
    with config_error("differs"):
        claimed(config)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "[default1]:[rank1]: OSError: no space\n[rank0]: RuntimeError: later",
            "OSError: no space",
        ),
        ("noise\nerror: moe.tau (0) must be above 0; use 0.5\n", "moe.tau (0) must be above 0"),
        ("  traceback : Signal 9 (SIGKILL) received by PID 7\n", "Signal 9 (SIGKILL)"),
        ("", "exit status 1; see "),
    ],
)
def test_reason_of_a_failure_is_from_the_log(tmp_path, monkeypatch, log, reason):
    def failing(options, module, arguments):
        options.output.write_text(log)
        return 1

    monkeypatch.setattr("moepp_megatron.tools.experiments.runner.run_ranks", failing)
    trial = TimedStepTrial.of(tmp_path / "points/p.json", "p", 1, [], 1)
    with pytest.raises(RunFailed, match=f"p failed: {re.escape(reason)}"):
        run_trial(trial)


class FakeRanks:
    """In place of torchrun: writes what the ranks would, or fails."""

    def __init__(self, fails):
        self.fails = fails
        self.started = []

    def __call__(self, options, module, arguments):
        file = Path(arguments[-1])
        name = file.stem
        self.started.append(name)
        assert list(arguments[:2]) == ["bench", "step"]
        assert options.num_local_ranks == int(name[1])
        status = self.fails(name)
        assert options.output is not None
        if status is not None:
            options.output.write_text(f"RuntimeError: {name} is cursed\n")
            return status
        seconds, tokens = 8.0 / options.num_local_ranks, int(name.rpartition("b")[2]) * 256
        file.write_text(both_steps(seconds, 1.25 * seconds, tokens).model_dump_json())
        return 0


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(fails)` calls `moepp scale`; returns the result and the points that were started."""

    def call(*arguments, fails=lambda name: None):
        ranks = FakeRanks(fails)
        monkeypatch.setattr("moepp_megatron.tools.experiments.runner.run_ranks", ranks)
        return scale(tmp_path, "--nproc", "1,2,4", *arguments), ranks.started

    return call


@pytest.mark.usefixtures("unrendered")
def test_failed_point_is_recorded_and_only_it_is_measured_again(run, tmp_path):
    cursed = "n2_tp1-pp1-cp1-ep2-etp1_b32"
    result, started = run(fails=lambda name: 1 if name == cursed else None)
    assert result.exit_code == 1, result.output
    assert len(started) == 5, "the others went on"
    assert f"{cursed} failed: RuntimeError: {cursed} is cursed; see" in result.output
    records = json.loads((tmp_path / "scale.json").read_text())
    assert [(r["mode"], r["nproc"], r["kind"]) for r in records] == [
        (mode, nproc, kind)
        for mode, counts in (("strong", (1, 2, 4)), ("weak", (1, 4)))
        for nproc in counts
        for kind in ("moepp", "vanilla")
    ]
    assert f"{cursed} has no result" in (tmp_path / "scaling.html").read_text()

    result, started = run()
    assert result.exit_code == 0, result.output
    assert started == [cursed]
    assert "4 of 5 points are there already" in result.output
    records = json.loads((tmp_path / "scale.json").read_text())
    assert len(records) == 12
    page = (tmp_path / "scaling.html").read_text()
    assert cursed not in page

    result, _ = run("--plan")
    assert result.output == "", "nothing is left"


def test_interrupted_point_is_neither_finished_nor_failed(run, tmp_path):
    result, started = run(fails=lambda name: 130 if name.startswith("n2") else None)
    assert result.exit_code == 130
    assert [name[:2] for name in started] == ["n1", "n2"], "nothing after it was started"
    assert [path.name[:2] for path in (tmp_path / "points").iterdir()] == ["n1"]
    assert "run again to continue" in result.output


@pytest.mark.usefixtures("unrendered")
def test_two_commands_in_one_folder(run, tmp_path):
    """The second is refused, whether it is to do everything or the point that is being done."""
    seen = []

    def meanwhile(name):
        if not seen:
            for held, arguments in ((tmp_path.name, ()), (name, ("--point", name))):
                result, ranks = run(*arguments)
                seen.append((held, result, list(ranks)))

    result, _ = run(fails=meanwhile)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "points").iterdir())) == 5
    for held, second, ranks in seen:
        assert isinstance(second.exception, ConfigError), second.output
        assert f"at a time, and another one is at work on {held}" in str(second.exception)
        assert not ranks


def test_batch_jobs_do_other_points_of_one_folder(run):
    names = run("--plan")[0].output.split()[::2]
    seen = []

    def meanwhile(name):
        if name == names[0]:
            seen.append(run("--point", names[1]))

    assert run("--point", names[0], fails=meanwhile)[0].exit_code == 0
    ((second, started),) = seen
    assert second.exit_code == 0, second.output
    assert started == [names[1]]


def test_half_written_point_is_measured_again(run, tmp_path):
    name = "n1_tp1-pp1-cp1-ep1-etp1_b16"
    run("--point", name)
    assert name not in run("--plan")[0].output
    path = tmp_path / "points" / f"{name}.json"
    path.write_text(path.read_text()[:40])
    assert f"{name} 1\n" in run("--plan")[0].output


def test_records_and_page_of_a_whole_test(run, tmp_path):
    result, _ = run()
    records = json.loads((tmp_path / "scale.json").read_text())
    contract = {"nproc", "layout", "kind", "mode", "step_time_s", "tokens_per_s", "efficiency"}
    contract |= {"a2a_bytes"}
    assert all(contract <= set(record) for record in records)
    strong = [r for r in records if r["mode"] == "strong" and r["kind"] == "moepp"]
    # 8 s, 4 s, 2 s for the same batch.
    assert [r["efficiency"] for r in strong] == pytest.approx([1.0, 1.0, 1.0])
    weak = [r for r in records if r["mode"] == "weak" and r["kind"] == "moepp"]
    # The same times for 1, 2 and 4 times the batch.
    assert [r["efficiency"] for r in weak] == pytest.approx([1.0, 2.0, 4.0])
    page = (tmp_path / "scaling.html").read_text(encoding="ascii")
    assert page.count("data:image/svg+xml") == 2
    assert not any(word in page for word in ("http://", "https://", "<script"))
    row = ["strong", "4", "EP4", "MoE++", "16", "2,000.0", "2,048", "100.0%", "0.80", "0.00"]
    assert row in [line.split() for line in result.output.splitlines()]


@pytest.mark.usefixtures("unrendered")
def test_plan_and_collect_for_batch_scripts(run):
    result, started = run("--plan")
    assert started == []
    lines = result.output.splitlines()
    assert lines[0] == "n1_tp1-pp1-cp1-ep1-etp1_b16 1"
    assert len(lines) == 5
    result, started = run("--point", lines[0].split()[0])
    assert (result.exit_code, started) == (0, [lines[0].split()[0]])
    result, started = run("--plan")
    assert len(result.output.splitlines()) == 4
    result, started = run("--collect")
    assert (result.exit_code, started) == (0, [])
    assert "scaling.html" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "0"], "--nproc (0) must be a whole number above 0"),
        (["--nproc", "3"], "--nproc (3) must fit the configuration at one count at least"),
        (["--mode", "strang"], "--mode (strang) must be one of strong, weak; did you mean strong?"),
        (["--layout", "ep:2"], "--layout (ep:2) must be auto or tp, pp, cp, ep, etp"),
        (["--point", "n9"], "--point (n9) must be one of n1_"),
        (["--nnodes", "2"], "--nnodes (2) must come with --rdzv-endpoint"),
        (["--nnodes", "2", "--rdzv-endpoint", "localhost"], "--nnodes (2) must come with --point"),
        (["moe.tua=1"], "moe.tua"),
        (
            [f"moe.num_{kind}_experts=0" for kind in ("zero", "copy", "constant")]
            + ["moe.gating_residual=false"],
            "must not all be 0 to be compared with vanilla",
        ),
    ],
)
def test_wrong_usage(tmp_path, arguments, message):
    result = scale(tmp_path / "out", *arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = scale(tmp_path / "file/out")
    assert isinstance(result.exception, ConfigError)
    assert "must be a folder that can be written" in str(result.exception)


@pytest.mark.parametrize("name", ["status.json", "metrics.jsonl", "checkpoints/latest"])
def test_folder_of_a_training_run_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for file in (tmp_path / "config.yaml", tmp_path / name):
        file.write_text("the run's")
    before = sorted(tmp_path.rglob("*"))
    result = scale(tmp_path, "--collect")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == (
        f"--out ({tmp_path}) must not be the folder of a training run, but holds "
        f"{name.split('/')[0]}; choose another"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_ranks_of_somebody_else_are_refused(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(f"LOCAL_{name}", value)
    result = scale(tmp_path)
    assert "moepp scale must start its ranks itself, and is one of 3" in str(result.exception)
