"""Light and dark, narrow and wide; what is drawn beside the curves, and what the page explains."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from moepp_megatron.tools.report import drawing
from moepp_megatron.tools.report.drawing import (
    new_figure,
    plot_style,
    svg_data_uri,
)
from moepp_megatron.tools.report.router_health_plots import health_plots
from moepp_megatron.tools.report.run_data import load_run
from tests.unit.tools.report.conftest import svg_of


def test_a_picture_has_a_colour_for_light_and_one_for_dark():
    with plot_style():
        figure = new_figure()
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=drawing.BLUE, label="a")
        axes.plot([0, 1], [1, 0], color="#cc79a7", label="b")
        content = svg_of(svg_data_uri(figure))
    used = set(re.findall(r"var\(--([0-9a-f]{6})\)", content))
    assert {drawing.BLUE[1:], drawing.INK[1:], drawing.MUTED[1:], drawing.GRID[1:]} <= used
    light, dark = re.findall(r":root\{([^}]*)\}", content)
    for one in (light, dark):
        assert used <= set(re.findall(r"--([0-9a-f]{6}):#[0-9a-f]{6};", one))
    assert f"--{drawing.INK[1:]}:{drawing.INK};" in light
    assert f"--{drawing.INK[1:]}:{drawing.INK};" not in dark
    # What has no colour of its own in the dark keeps the one that it has.
    assert "stroke: #cc79a7" in content
    assert not re.search(rf"(fill|stroke): ({drawing.INK}|{drawing.BLUE})", content)


def test_healthy_ranges_are_drawn_in_the_router_plots(full_run):
    plots = {plot.title: plot for plot in health_plots(load_run(full_run))}
    band = re.compile(rf"fill: var\(--{drawing.GREEN[1:]}\); opacity: 0\.16")
    drawn = {title for title, plot in plots.items() if band.search(svg_of(plot.image or ","))}
    assert drawn == set(plots) - {"Loss by FFN experts of a token"}


def test_the_contents_lead_to_every_section(full_run):
    page = (full_run / "report.html").read_text()
    links = re.findall(r'<li><a href="#([a-z0-9-]+)">([^<]+)</a></li>', page)
    assert [title for _, title in links] == [
        "What MoE++ saved against a vanilla layer of the same size",
        "Training",
        "Experts",
        "Router health",
        "Alerts",
        "What the numbers mean",
        "Configuration",
    ]
    for name, _ in links:
        assert page.count(f'id="{name}"') == 1
    targets = set(re.findall(r'href="#([a-z0-9-]+)"', page))
    assert targets == {name for name, _ in links}


@pytest.fixture
def open_page(browser, full_run):
    """Opens the page in a window of its own."""
    contexts = []

    def opened(width, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.goto((full_run / "report.html").as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_light_and_dark_in_a_browser(open_page, scheme, is_dark):
    tab = open_page(1200, color_scheme=scheme)
    # Grey levels from 0 to 255; most of a page and of a picture is its paper.
    for shot in (tab.locator("figure img").first.screenshot(), tab.screenshot()):
        levels = np.asarray(Image.open(io.BytesIO(shot)).convert("L"))
        paper = float(np.median(levels))
        assert paper < 60 if is_dark else paper > 230
        # Letters and lines stand out against it.
        ink = levels.max() if is_dark else levels.min()
        assert abs(float(ink) - paper) > 120


def test_a_narrow_page_scrolls_its_wide_parts_alone(open_page):
    wide, widths = open_page(500).evaluate(
        """() => [document.documentElement.scrollWidth,
                  [...document.querySelectorAll("figure.wide img")].map((i) => i.clientWidth)]"""
    )
    assert wide == 500
    # A 950 pt picture on 430 px would have letters of 4 px.
    assert widths
    assert all(width >= 800 for width in widths)
