"""The page of a pilot, written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.workbench.experiments.pilot.report import write_pilot_page
from moepp_megatron.workbench.experiments.pilot.result import PilotResult
from moepp_megatron.workbench.report.plot import Plot
from tests.unit.workbench.experiments.pilot_report.made_up import contents
from tests.unit.workbench.experiments.pilot_report.page_reader import Reader


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of `contents`, with its plots."""
    result = PilotResult.model_validate(contents())
    return write_pilot_page(result, tmp_path_factory.mktemp("pilot") / "pilot.html")


@pytest.fixture
def read_whole(tmp_path: Path) -> Any:
    """Writes the page of these contents and reads it."""

    def read_page(found: dict[str, Any]) -> Reader:
        path = write_pilot_page(PilotResult.model_validate(found), tmp_path / "pilot.html")
        assert path == tmp_path / "pilot.html"
        return Reader(path.read_text(encoding="ascii"))

    return read_page


@pytest.fixture
def read(read_whole: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same without its plots, which take most of the time."""
    nothing = Plot("left out", "", None, "left out")
    for name in ("forest_plot", "speed_plot"):
        monkeypatch.setattr(
            f"moepp_megatron.workbench.experiments.pilot.report.page.{name}", lambda result: nothing
        )
    monkeypatch.setattr(
        "moepp_megatron.workbench.experiments.pilot.report.page.curve_plots", lambda result: []
    )
    return read_whole
