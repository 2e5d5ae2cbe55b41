"""The profile's page in a real browser, without a window."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moepp_megatron.cli.main import app
from moepp_megatron.workbench.report.profile.timeline import COLOURS
from tests.unit.conftest import quiet_page

SAMPLE = Path(__file__).parents[1] / "profiling" / "samples" / "kineto_nccl"
# The sample's step has 1000 us; names of lanes stand left of it.
STEP_US, GUTTER = 1000, 128


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the sample's page."""
    run = tmp_path_factory.mktemp("profiled") / "run"
    shutil.copytree(SAMPLE, run / "profile")
    result = CliRunner().invoke(app, ["profile", str(run)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return (run / "profile.html").as_uri()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with quiet_page(browser, address) as page:
        yield page


def place(page: Any, rank: int, lane: str, us: float) -> tuple[float, float]:
    """Pixels within the canvas, of the whole step, where a lane shows a time."""
    data = json.loads(page.locator("#data").text_content())
    lanes = data["steps"][0]["lanes"]
    at = next(n for n, one in enumerate(lanes) if (one["rank"], one["name"]) == (rank, lane))
    changes = sum(a["rank"] != b["rank"] for a, b in zip(lanes, lanes[1 : at + 1], strict=False))
    width = page.locator("#lanes").bounding_box()["width"]
    # Nothing in the sample overlaps, so every lane has one row.
    return GUTTER + us / STEP_US * (width - GUTTER), 24 + at * 27 + changes * 12 + 3


def colour(page: Any, at: tuple[float, float]) -> str:
    # Of a copy: the browser complains when a canvas that it draws on is read.
    script = """(canvas, [x, y]) => {
        const scale = canvas.width / canvas.clientWidth;
        const copy = document.createElement("canvas");
        [copy.width, copy.height] = [1, 1];
        const context = copy.getContext("2d");
        context.drawImage(canvas, -Math.floor(x * scale), -Math.floor(y * scale));
        const data = context.getImageData(0, 0, 1, 1).data;
        return "#" + [...data.slice(0, 3)].map((n) => n.toString(16).padStart(2, "0")).join("");
    }"""
    return page.locator("#lanes").evaluate(script, list(at))


def shown(page: Any) -> str:
    return page.locator("#range").text_content()


def test_a_collective_stands_where_it_ran_and_waits_pale(page: Any) -> None:
    nccl = "stream 20 (NCCL)"
    # Rank 0's dispatch runs from 100 to 250 us and waits for 40 of them; rank 1's starts at 140.
    assert colour(page, place(page, 0, nccl, 200)) == COLOURS["dispatch"]
    assert colour(page, place(page, 1, nccl, 200)) == COLOURS["dispatch"]
    waiting = colour(page, place(page, 0, nccl, 103))
    nothing = colour(page, place(page, 1, nccl, 103))
    assert len({waiting, nothing, COLOURS["dispatch"]}) == 3
    x, y = place(page, 0, nccl, 200)
    page.locator("#lanes").hover(position={"x": x, "y": y + 8})
    tip = page.locator("#tip").inner_text()
    assert "waits 0.040 ms for rank 1" in tip
    assert "rank 0, " in tip


def test_zoom_and_back(page: Any) -> None:
    whole = shown(page)
    assert whole.endswith("1.00 ms of 1.00 ms")
    page.click("button[data-do='in']")
    assert "600 us of 1.00 ms" in shown(page)
    page.locator("#lanes").focus()
    page.keyboard.press("0")
    assert shown(page) == whole
    x, y = place(page, 0, "step", 500)
    page.locator("#lanes").hover(position={"x": x, "y": y})
    page.mouse.wheel(0, -400)
    # A wheel is a request: the page answers with its next event.
    page.wait_for_function(f"document.getElementById('range').textContent !== {whole!r}")
    page.click("button[data-do='all']")
    assert shown(page) == whole
