"""The page of `moepp inspect`: its bytes, and what it does in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config import ConfigError
from moepp_megatron.inspection.classes import CLASSES, token_classes
from moepp_megatron.inspection.request import InspectRequest
from moepp_megatron.inspection.text import TokenizedText, tokenize
from moepp_megatron.inspection.trace import Trace
from moepp_megatron.report.inspect import write_inspection
from moepp_megatron.report.inspect.page import render
from tests.unit.inspection.conftest import (  # noqa: F401
    invented_trace,
    make_request,
    text,
    tokenizer,
)

Make = Callable[..., InspectRequest]


def packed_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_page_is_ascii_and_asks_nothing_of_the_network(
    make_request: Make,  # noqa: F811
    text: TokenizedText,  # noqa: F811
) -> None:
    request = make_request()
    assert write_inspection(request, [invented_trace(len(text))]) == [("page", request.out)]
    page = request.out.read_text(encoding="ascii")
    assert not re.search(r"""(src|href)=["'](?!data:image/svg)""", page)
    policy = re.search(r'content="default-src ([^"]*)"', page)
    assert policy is not None
    assert re.fullmatch(
        r"'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-[\w+/]+='",
        html.unescape(policy[1]),
    )
    assert packed_of(page)["pieces"] == text.pieces
    assert f"<h1>{text.name}</h1>" in page
    assert page.encode() == render(request, [invented_trace(len(text))]).encode(
        "ascii", "xmlcharrefreplace"
    )


def test_text_cannot_break_out(make_request: Make, tokenizer) -> None:  # noqa: F811
    evil = "</script><script>alert('1')</script> <b>&amp; \u2028 caf\u00e9 " * 3
    own = tokenize(tokenizer, evil, "<i>&", 1000)
    classes = token_classes(own.text, own.spans.tolist(), "text")
    request = make_request(text=own, language="text", classes=classes, tags=["<T>"] * len(own))
    write_inspection(request, [invented_trace(len(own))])
    page = request.out.read_text(encoding="ascii")
    assert page.count("<script") == page.count("</script>") == 2
    assert "".join(packed_of(page)["pieces"]) == evil
    assert "<i>&" not in page
    assert "&lt;i&gt;&amp;" in page
    assert 'data-tag="&lt;T&gt;"' in page


def test_a_very_short_text_has_sentences_for_plots(make_request: Make, tokenizer) -> None:  # noqa: F811
    own = tokenize(tokenizer, "ab", "x", 10)
    request = make_request(text=own, classes=token_classes("ab", own.spans.tolist(), "text"))
    page = render(request, [invented_trace(2)])
    assert page.count("The text is too short") == 3


def test_two_models_show_their_difference(make_request: Make, text: TokenizedText) -> None:  # noqa: F811
    traces = [invented_trace(len(text), seed) for seed in (1, 2)]
    page = html.unescape(render(make_request(), traces))
    words = [trace.ffn_mean.mean() for trace in traces]
    assert f"{words[0]:.2f} / {words[1]:.2f}" in page
    chosen = make_request().classes == CLASSES.index("keyword")
    a, b = (trace.ffn_mean[chosen].mean() for trace in traces)
    assert f'<td class="num">{b - a:+.2f}</td>' in page
    assert len(packed_of(page)["models"]) == 2


def test_an_unwritable_page_is_a_line(
    make_request: Make,  # noqa: F811
    text: TokenizedText,  # noqa: F811
    tmp_path: Path,
) -> None:
    request = make_request(out=tmp_path / "gone" / "page.html")
    with pytest.raises(ConfigError, match=r"page\.html cannot be written \(No such file"):
        write_inspection(request, [invented_trace(len(text))])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        # Chromium's sandbox refuses to start for root, which containers have.
        running = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield running
        running.close()


@pytest.fixture
def open_page(
    browser: Any,
    make_request: Make,  # noqa: F811
    text: TokenizedText,  # noqa: F811
) -> Iterator[Callable[..., tuple[Any, list[Trace]]]]:
    """Opens the page of one or two models; fails at the end if the page complained."""
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url))

    def open_page(models: int = 1, **changes: object) -> tuple[Any, list[Trace]]:
        traces = [invented_trace(len(text), seed) for seed in range(1, models + 1)]
        request = make_request(**changes)
        write_inspection(request, traces)
        page.goto(request.out.as_uri())
        assert complaints.pop(0) == request.out.as_uri()
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


def test_a_hovered_token_shows_its_path(open_page, text: TokenizedText) -> None:  # noqa: F811
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


def test_loss_and_kinds_colour_the_text_too(open_page) -> None:
    page, (trace,) = open_page()
    page.select_option("#mode", "3")
    zero = (trace.kinds == 3).sum(axis=2).mean(axis=0)
    white = "rgb(255, 255, 255)"
    assert [c == white for c in colours(page)] == [share == 0 for share in zero]
    page.select_option("#mode", "loss")
    shades = [int(c.split(", ")[1]) for c in colours(page)]
    known = np.isfinite(trace.losses)
    assert colours(page)[0] == white
    # The larger the loss, the darker.
    order = np.argsort(trace.losses[known], kind="stable")
    assert (np.diff(np.asarray(shades)[known][order]) <= 0).all()
    assert page.locator("#layers button").first.is_disabled()


def test_a_class_is_picked_from_the_table(open_page, make_request: Make) -> None:  # noqa: F811
    page, _ = open_page()
    page.click("button.pick[data-class='keyword']")
    faded = page.locator(".text b.faded").count()
    classes = make_request().classes
    assert faded == (classes != CLASSES.index("keyword")).sum()
    page.select_option("#filter", "")
    assert page.locator(".text b.faded").count() == 0


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
