"""The page of `moepp inspect` in a real browser, without a window."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.tools.inspection.text import TokenizedText
from moepp_megatron.tools.inspection.trace import Trace
from moepp_megatron.tools.report.inspect import write_inspection
from tests.unit.conftest import quiet_page
from tests.unit.tools.inspection.conftest import invented_trace, request_of


@pytest.fixture(scope="module")
def written(text: TokenizedText, tmp_path_factory) -> tuple[Path, Trace]:
    """A page and its trace."""
    out = tmp_path_factory.mktemp("inspection") / "page.html"
    trace = invented_trace(len(text))
    write_inspection(request_of(text, out), trace)
    return out, trace


@pytest.fixture
def opened(browser, written) -> Iterator[tuple[Any, Trace]]:
    """The page in a tab, and its trace."""
    out, trace = written
    with quiet_page(browser, out.as_uri()) as page:
        yield page, trace


def colours(page: Any) -> list[str]:
    script = "(p) => [...p.querySelectorAll('b')].map((b) => getComputedStyle(b).backgroundColor)"
    return page.locator(".text").evaluate(script)


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


def test_a_hovered_token_shows_its_path(opened) -> None:
    page, trace = opened
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


def test_colours_are_those_of_the_layer_that_is_chosen(opened) -> None:
    page, trace = opened
    mean = colours(page)
    assert mean == [blue(ffn / 2) for ffn in trace.ffn_mean]
    for layer in range(3):
        page.click(f"#layers button:nth-child({layer + 2})")
        assert colours(page) == [blue(ffn / 2) for ffn in trace.ffn[layer]]
        assert colours(page) != mean
    page.click("#layers button:nth-child(1)")
    assert colours(page) == mean


def test_a_clicked_token_stays_and_arrow_keys_move_it(opened) -> None:
    page, _ = opened
    page.click("b[data-i='9']")
    page.hover("b[data-i='20']")
    assert page.locator("#path").get_attribute("data-token") == "9"
    page.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#path").get_attribute("data-token") == "10"
    page.keyboard.press("Escape")
    page.hover("b[data-i='21']")
    assert page.locator("#path").get_attribute("data-token") == "21"
