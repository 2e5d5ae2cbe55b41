"""What stands on a pilot's page."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moepp_megatron.workbench.experiments.pilot.report import write_pilot_page
from moepp_megatron.workbench.experiments.pilot.result import PilotResult
from tests.unit.workbench.experiments.pilot_report.made_up import (
    contents,
)
from tests.unit.workbench.experiments.pilot_report.page_reader import Reader
from tests.unit.workbench.experiments.pilot_report.terminal_reader import printed


def test_the_answer_stands_on_top(read: Any) -> None:
    page = read(contents())
    here, there, recommended = page.badges
    assert here[0] == "pays"
    assert here[1][:2] == ["At the pilot's scale", "pays"]
    assert "0.861 (0.828 to 0.895) of vanilla's time" in here[1][2]
    assert there[0] == "open"
    assert there[1][:2] == ["At the target (64 h100_sxm)", "undecided"]
    # Vanilla's cost times 0.885, and times the ends of its interval.
    assert "cost to vanilla's loss 47,294 (42,608 to 52,497) against 53,440" in there[1][2]
    assert recommended[1][:2] == ["Recommended", "MoE++ tau 0.75"]
    assert page.text.index(contents()["answer"]) < page.text.index("How sure is that?")


@pytest.mark.parametrize(
    ("answer", "look"), [("pays", "pays"), ("does not pay", "loses"), ("undecided", "open")]
)
def test_every_answer_has_its_word_and_its_look(read: Any, answer: str, look: str) -> None:
    found = contents()
    found["verdicts"][0] |= {"at_pilot": answer, "at_target": answer}
    found["recommended"] = "MoE++ tau 0.75" if answer == "pays" else None
    page = read(found)
    assert (
        page.badges[2][1][1]
        == {
            "pays": "MoE++ tau 0.75",
            "does not pay": "none: stay with vanilla",
            "undecided": "none yet: undecided",
        }[answer]
    )
    assert [(badge[0], badge[1][1]) for badge in page.badges[:2]] == [(look, answer)] * 2
    assert page.cell("verdicts", "MoE++ tau 0.75", "Answer") == answer
    assert page.cell("verdicts", "MoE++ tau 0.75", "Answer", 1) == answer


def test_numbers_are_in_their_cells(read: Any) -> None:
    page = read(contents())
    for column, text in {
        "Validation loss": "3.5031 3.4821 to 3.5241",
        "Difference to vanilla": "+0.0031 -0.0029 to +0.0091",
        "Step": "684.0 ms",
        "Of vanilla's time": "0.855 0.843 to 0.867",
        "Tokens/s": "5,988",
        "FFN share": "59.8%",
        "All-to-all, MB per step": "15.05",
        "Alerts": "dead_expert 2",
    }.items():
        assert page.cell("arms", "MoE++ tau 0.75", column) == text
    assert page.cell("arms", "vanilla", "Difference to vanilla") == "-"
    assert page.cell("arms", "vanilla", "Arm") == "vanilla top-2, 400 steps, 3 seeds"
    time = page.cell("verdicts", "MoE++ tau 0.5", "Loss after vanilla's time")
    assert time == "-0.0380 -0.0440 to -0.0320"
    assert page.cell("verdicts", "MoE++ tau 0.5", "Probability") == "98.7%"
    assert page.cell("target", "MoE++ tau 0.5", "Tokens/s/GPU") == "15,854"
    assert page.cell("target", "MoE++ tau 0.5", "Cost") == "43,821"
    assert page.cell("target", "vanilla", "Hours to vanilla's loss") == "334"
    assert page.cell("target", "MoE++ tau 0.75", "Hours to vanilla's loss") == "296 266 to 328"


def test_equal_compute_in_words(read: Any) -> None:
    page = read(contents())
    sure = page.cell("computes", "MoE++ tau 0.75", "In words")
    assert "is 0.0579 nats better than vanilla, 304 wide; the interval does not contain 0" in sure
    unsure = page.cell("computes", "MoE++ top-3 tau 1", "In words")
    assert "cannot tell from no difference" in unsure
    assert "keeping vanilla gives away 13.9%" in page.text


def test_energy_is_a_column_where_it_was_measured(read: Any) -> None:
    assert "Energy per token: not measured here." in read(contents()).text
    found = contents()
    found["arms"][3]["energy_per_token_j"] = {"mean": 0.0214}
    page = read(found)
    assert page.cell("arms", "MoE++ tau 0.75", "Energy per token") == "21.4 mJ"
    assert page.cell("arms", "vanilla", "Energy per token") == "not measured here"


def test_the_page_asks_nothing_of_the_network_and_its_pictures_are_described(
    whole_page: Path,
) -> None:
    page = Reader(whole_page.read_text(encoding="ascii"))
    assert not page.tags & {"script", "link", "iframe"}
    assert len([each for each in page.addresses if not each.startswith("#")]) == 4
    assert len(page.pictures) == 4
    for source, alt in page.pictures:
        start, content = source.split(",", 1)
        assert start == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(content)).tag.endswith("svg")
        assert "MoE++ tau 0.75" in alt
        assert re.search(r"\d\.\d", alt)


def test_names_are_escaped(
    read_whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "<script>alert('1')</script> & $\\frac{1}$ [red]\u00e9"
    found = contents()
    found["arms"][3]["arm"]["name"] = found["verdicts"][0]["arm"] = evil
    found["recommended"] = evil
    found["setting"]["config"] = found["setting"]["device"] = evil
    found["setting"]["command"] = evil
    found["arms"][3]["arm"]["overrides"] = [evil]
    found["answer"] = evil
    page = read_whole(found)
    source = (tmp_path / "pilot.html").read_text(encoding="ascii")
    assert "<script" not in source
    assert evil in html.unescape(source)
    assert "script" not in page.tags
    assert page.text.count(evil) > 5
    assert evil in printed(found, capsys)


def test_the_same_result_gives_the_same_bytes(whole_page: Path, tmp_path: Path) -> None:
    result = PilotResult.model_validate(contents())
    again = write_pilot_page(result, tmp_path / "pilot.html").read_bytes()
    assert again == whole_page.read_bytes()
    assert [one.name for one in tmp_path.iterdir()] == ["pilot.html"]


def test_a_browser_shows_it_without_complaint(browser: Any, whole_page: Path) -> None:
    complaints: list[str] = []
    for width in (1280, 420):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(whole_page.as_uri())
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width
        if width == 1280:
            # Tables are whole without scrolling.
            cut = (
                "[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
            )
            assert max(page.evaluate(cut)) <= 0
        sizes = "[...document.images].map(i => i.naturalWidth)"
        assert all(size > 0 for size in page.evaluate(sizes))
        page.close()
    assert complaints == []
