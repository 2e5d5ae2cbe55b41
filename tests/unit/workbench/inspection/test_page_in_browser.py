"""The page of `moepp inspect` in a real browser, without a window."""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp_megatron.workbench.inspection.text import TokenizedText
from moepp_megatron.workbench.inspection.trace import Trace
from moepp_megatron.workbench.report.inspect import write_inspection
from tests.unit.workbench.inspection.conftest import invented_trace, request_of


@pytest.fixture(scope="module")
def written(text: TokenizedText, tmp_path_factory) -> Callable[[int], tuple[Path, list[Trace]]]:
    """The page of one or two models, written when it is first asked for, and its traces."""

    @functools.cache
    def page_of(models: int) -> tuple[Path, list[Trace]]:
        out = tmp_path_factory.mktemp("inspection") / "page.html"
        traces = [invented_trace(len(text), seed) for seed in range(1, models + 1)]
        write_inspection(request_of(text, out), traces)
        return out, traces

    return page_of


@pytest.fixture
def open_page(browser, written) -> Iterator[Callable[..., tuple[Any, list[Trace]]]]:
    """Opens the page of one or two models; fails at the end if the page complained."""
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url))

    def open_page(models: int = 1) -> tuple[Any, list[Trace]]:
        out, traces = written(models)
        page.goto(out.as_uri())
        assert complaints.pop(0) == out.as_uri()
        return page, traces

    yield open_page
    complaints = [line for line in complaints if not line.startswith("data:image/svg+xml")]
    page.close()
    assert complaints == []


def colours(page: Any, panel: int = 0) -> list[str]:
    script = "(p) => [...p.querySelectorAll('b')].map((b) => getComputedStyle(b).backgroundColor)"
    return page.locator(".text").nth(panel).evaluate(script)


def blue(share: float) -> str:
    """The colour of this share of FFN experts, from white to #0072b2."""
    parts = [int(255 + (c - 255) * share + 0.5) for c in (0x00, 0x72, 0xB2)]
    return f"rgb({parts[0]}, {parts[1]}, {parts[2]})"


def shown_path(page: Any) -> list[list[str]]:
    """Expert and gate of every way in the panel, by layer."""
    rows = page.locator("#path li").all()
    return [
        [way.inner_text().replace("\n", " ") for way in row.locator(".way").all()] for row in rows
    ]


def test_a_hovered_token_shows_its_path(open_page, text: TokenizedText) -> None:
    page, (trace,) = open_page()
    for at in (5, 17):
        page.hover(f"b[data-i='{at}']")
        assert page.locator("#path").get_attribute("data-token") == str(at)
        names = trace.experts.names
        for layer, ways in enumerate(shown_path(page)):
            for way, expert, gate in zip(
                ways, trace.selected[layer, at], trace.gates[layer, at], strict=True
            ):
                name, _, number = way.rpartition(" ")
                assert name == names[expert]
                # Gates travel in 65,535 steps and are shown with three digits.
                assert float(number) == pytest.approx(gate, abs=6e-4)
        facts = page.locator("#path dl").inner_text()
        assert f"{trace.ffn_mean[at]:.2f}" in facts
        assert f"{trace.losses[at]:.2f}" in facts
        # Experts that the token takes, in the drawing: one titled mark for each selection.
        assert page.locator("#path svg circle title").count() == trace.selected[:, at].size


def test_colours_are_those_of_the_layer_that_is_chosen(open_page) -> None:
    page, (trace,) = open_page()
    mean = colours(page)
    assert mean == [blue(ffn / 2) for ffn in trace.ffn_mean]
    for layer in range(3):
        page.click(f"#layers button:nth-child({layer + 2})")
        assert colours(page) == [blue(ffn / 2) for ffn in trace.ffn[layer]]
        assert colours(page) != mean
    page.click("#layers button:nth-child(1)")
    assert colours(page) == mean


def test_a_clicked_token_stays_and_arrow_keys_move_it(open_page) -> None:
    page, _ = open_page()
    page.click("b[data-i='9']")
    page.hover("b[data-i='20']")
    assert page.locator("#path").get_attribute("data-token") == "9"
    page.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#path").get_attribute("data-token") == "10"
    page.keyboard.press("Escape")
    page.hover("b[data-i='21']")
    assert page.locator("#path").get_attribute("data-token") == "21"


def test_two_models_stand_side_by_side_and_as_their_difference(open_page) -> None:
    page, (a, b) = open_page(models=2)
    assert [colours(page, panel) for panel in (0, 1)] == [
        [blue(ffn / 2) for ffn in trace.ffn_mean] for trace in (a, b)
    ]
    page.locator(".text").nth(1).locator("b").nth(7).hover()
    assert page.locator(".text b.on").count() == 2
    assert len(shown_path(page)) == 6
    page.select_option("#view", "difference")
    assert page.locator(".text").count() == 1
    change = b.ffn_mean - a.ffn_mean
    reds = [int(re.findall(r"\d+", c)[0]) for c in colours(page)]
    blues = [int(re.findall(r"\d+", c)[2]) for c in colours(page)]
    # More FFN experts in the second: blue, fewer: vermilion, none: white.
    assert [np.sign(b - r) for r, b in zip(reds, blues, strict=True)] == np.sign(change).tolist()
