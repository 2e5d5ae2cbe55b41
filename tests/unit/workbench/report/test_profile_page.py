"""The profile's page, its timeline and the command."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moepp_megatron.cli.main import app
from moepp_megatron.config import ConfigError
from moepp_megatron.workbench.profiling.analysis import Profile, analyse
from moepp_megatron.workbench.report.profile.timeline import timeline

SAMPLE = Path(__file__).parents[1] / "profiling" / "samples" / "kineto_nccl"


@pytest.fixture(scope="module")
def profile() -> Profile:
    return analyse(SAMPLE)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder of a run with a recording."""
    shutil.copytree(SAMPLE, tmp_path / "run" / "profile")
    return tmp_path / "run"


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["profile", *map(str, arguments)], catch_exceptions=True)


def test_timeline_has_a_lane_a_rank_and_stream(profile: Profile) -> None:
    data = timeline(profile)
    (step,) = data["steps"]
    assert (step["step"], step["duration"]) == (7, 1000.0)
    lanes = [(lane["rank"], lane["name"]) for lane in step["lanes"]]
    names = ["step", "layers", "stream 7", "stream 20 (NCCL)", "stream 24 (NCCL)"]
    assert lanes == [(rank, name) for rank in (0, 1) for name in names]
    (exchange,) = step["lanes"][3]["items"]
    kind, start, length, label, detail, wait = exchange
    assert data["kinds"][kind]["name"] == label == "dispatch"
    assert (start, length, wait) == (100.0, 150.0, 40.0)
    assert "waits 0.040 ms for rank 1" in detail
    for lane in step["lanes"]:
        for item in lane["items"]:
            assert 0 <= item[1] <= item[1] + item[2] <= step["duration"]


def test_page_needs_nothing_else(run: Path) -> None:
    result = command(run, "--json", run / "numbers.json")
    assert result.exit_code == 0, result.output
    page = (run / "profile.html").read_bytes().decode("ascii")
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    assert "http" not in page.replace("http-equiv", "").split('id="data"')[1]
    (data,) = re.findall(r'id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert json.loads(data.replace("<\\/", "</")) == timeline(analyse(run))
    numbers = json.loads((run / "numbers.json").read_text())
    assert numbers["critical_rank"] == 1
    # The same recording gives the same page.
    before = (run / "profile.html").read_bytes()
    command(run)
    assert (run / "profile.html").read_bytes() == before


def test_names_cannot_end_the_script(run: Path) -> None:
    meta = run / "profile" / "rank0.meta.json"
    about = json.loads(meta.read_text())
    about["name"] = "</script><b>"
    meta.write_text(json.dumps(about))
    trace = run / "profile" / "rank0.pt.trace.json"
    trace.write_text(trace.read_text().replace("vectorized_elementwise", "</script><b>"))
    assert command(run).exit_code == 0
    page = (run / "profile.html").read_text()
    assert "<b>" not in page.replace("<b>bwd</b>", "").replace('"<\\/script><b>_kernel"', "")
    assert page.count("</script>") == 2


def test_against_itself_nothing_changed(run: Path) -> None:
    numbers = run / "numbers.json"
    assert command(run, "--json", numbers).exit_code == 0
    for before in (numbers, run):
        result = command(run, "--against", before)
        assert result.exit_code == 0, result.output
        assert "against" in result.output
        assert "less exposed" not in result.output
        assert "more exposed" not in result.output
    assert "Against run" in (run / "profile.html").read_text()


def test_measured_ceiling(run: Path) -> None:
    ceiling = run / "ceiling.json"
    # 8 MiB in 80 us: the sample's 100 us are 80% of it.
    record = {"operation": "reduce_scatter", "group_size": 2, "size_bytes": 2**23, "time_us": 80.0}
    ceiling.write_text(json.dumps([record]))
    assert command(run, "--ceiling", ceiling, "--json", run / "n.json").exit_code == 0
    numbers = json.loads((run / "n.json").read_text())
    shares = {one["purpose"]: one["peak_share"] for one in numbers["collectives"]}
    assert shares["gradient reduce"] == pytest.approx(0.8)
    assert shares["dispatch"] is None
    assert numbers["ceiling"] == "measured"


def test_other_sources(tmp_path: Path) -> None:
    inspector = SAMPLE.parent / "inspector_2_30"
    result = command(inspector, "--json", tmp_path / "i.json")
    assert result.exit_code == 0, result.output
    assert "all_to_all" in result.output
    assert command(inspector, "--against", tmp_path / "i.json").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "training.profile_steps"),
        (["run", "--step", 9], r"--step \(9\).*use one of \[7\]"),
        (["run", "--against", "missing"], "missing"),
        (["run", "--ceiling", "missing"], "workbench.bench.links"),
        (["run", "--out", "run/profile/rank0.meta.json"], "--out"),
    ],
)
def test_mistakes(run: Path, monkeypatch, arguments: list[object], words: str) -> None:
    monkeypatch.chdir(run.parent)
    error = command(*arguments).exception
    assert isinstance(error, ConfigError)
    assert error.exit_code == 2
    assert re.search(words, str(error))
    assert "\n" not in str(error)
