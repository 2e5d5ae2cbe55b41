"""The page of a pilot, and its table in the terminal."""

import html
import math
import re
from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.tools.experiments.pilot.page import print_pilot, write_pilot_page
from moepp_megatron.tools.experiments.pilot.result import PilotResult


def interval(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def arm(name: str, kind: str, loss: float, steps: int = 400, share: float = 1.0) -> dict[str, Any]:
    tokens = [4096 * step for step in range(1, steps + 1)]
    ratio = {"vanilla": None, "short": None}.get(kind, interval(0.855, 0.012))
    return {
        "arm": {"name": name, "kind": kind, "steps": steps},
        "seeds": [1, 2, 3],
        "valid_loss": interval(loss, 0.021),
        "loss_difference": None if kind == "vanilla" else interval(loss - 3.5, 0.006),
        "step_time_s": interval(0.8 if ratio is None else 0.684, 0.004),
        "time_ratio": ratio,
        "ffn_share": interval(share, 0.004),
        "curve": {
            "tokens": tokens,
            "loss": [
                loss + 4.5 * math.exp(-step / 30) + 0.04 * math.sin(step * 1.7)
                for step in range(1, steps + 1)
            ],
        },
    }


def contents(**verdict: Any) -> dict[str, Any]:
    """A pilot that pays; every number is made up."""
    return {
        "setting": {
            "command": "moepp pilot configs/quickstart.yaml --out pilots/first",
            "config": "quickstart",
            "tau": 0.75,
            "nproc": 2,
            "device": "CPU (made up)",
            "on_gpu": False,
            "cores": 2,
            "torch": "2.11.0",
            "megatron_core": "0.19.2",
            "steps": 400,
            "tokens": 1_638_400,
            "valid_tokens": 131_072,
            "parameters": 9_412_352,
            "began": "2026-11-26",
            "sessions": 5,
            "look": 1,
            "next_seeds": 6,
            "level": 0.0125,
        },
        "arms": [
            arm("vanilla", "vanilla", 3.5),
            arm("MoE++", "moepp", 3.5031, share=0.598),
            arm("vanilla, 70% of the steps", "short", 3.668, steps=280),
            arm("MoE++, vanilla's time", "equal_time", 3.462, steps=468, share=0.597),
            arm("vanilla, 304 wide", "narrow", 3.561),
        ],
        "token_value": interval(0.471, 0.03),
        "verdict": {
            "answer": "pays",
            "loss_in_time": interval(-0.038, 0.006),
            "loss_in_compute": interval(-0.0579, 0.009),
            "time_to_loss": interval(0.861, 0.033),
            "speed": interval(0.855, 0.012),
            "speed_in_runs": interval(0.857, 0.02),
            "speeds_agree": True,
            **verdict,
        },
        "sentence": "MoE++ pays here: after vanilla's time its loss is 0.0380 nats lower.",
    }


def without_intervals(value: Any) -> Any:
    """The same with a single seed."""
    if isinstance(value, dict):
        if value.keys() == {"mean", "low", "high"}:
            return value | {"low": None, "high": None}
        return {key: without_intervals(one) for key, one in value.items()}
    return [without_intervals(one) for one in value] if isinstance(value, list) else value


def written(found: dict[str, Any], folder: Path) -> str:
    path = write_pilot_page(PilotResult.model_validate(found), folder / "pilot.html")
    return path.read_text(encoding="ascii")


def words(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def test_numbers_are_on_the_page_and_in_the_terminal(tmp_path, capsys) -> None:
    found = contents()
    text = words(written(found, tmp_path))
    row = "MoE++ 400 3.5031 +0.0031 -0.0029 to +0.0091 684.0 ms 0.855 0.843 to 0.867 59.8%"
    assert row in text
    for value in ("pays", "-0.0380", "-0.0579", "0.861", found["sentence"]):
        assert value in text
    print_pilot(PilotResult.model_validate(found))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert ("MoE++ 400 3.5031 +0.0031 [-0.0029 to +0.0091] 0.855 [0.843 to 0.867] 59.8%") in lines
    assert lines[-1] == found["sentence"]


def test_a_pilot_that_lacks_something_has_a_page(tmp_path, capsys) -> None:
    found = without_intervals(contents(time_to_loss=None, speeds_agree=False))
    found["arms"][0]["curve"] = {"tokens": [], "loss": []}
    found["setting"]["look"] = 0
    text = words(written(found, tmp_path))
    assert "None" not in text
    assert "too far apart to decide" in text
    assert "Too few records to draw." in text
    print_pilot(PilotResult.model_validate(found))
    assert "None" not in capsys.readouterr().out


def test_names_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert('1')</script> & $\\frac{1}$ [red]\u00e9"
    found = contents()
    found["arms"][1]["arm"]["name"] = found["setting"]["config"] = found["sentence"] = evil
    found["setting"]["device"] = found["setting"]["command"] = evil
    page = written(found, tmp_path)
    assert "<script" not in page
    assert html.unescape(page).count(evil) > 5
    print_pilot(PilotResult.model_validate(found))
    assert evil in capsys.readouterr().out


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    assert written(contents(), tmp_path) == written(contents(), tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["pilot.html"]


def test_a_browser_shows_the_answer_on_one_screen(browser: Any, tmp_path: Path) -> None:
    written(contents(), tmp_path)
    complaints: list[str] = []
    for width in (1280, 390):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("request", lambda request: complaints.extend(_elsewhere(request.url)))
        page.goto((tmp_path / "pilot.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert all(
            size > 0 for size in page.evaluate("[...document.images].map(i=>i.naturalWidth)")
        )
        if width == 1280:
            bottom = "document.querySelector('table').getBoundingClientRect().bottom"
            assert page.evaluate(bottom) <= 900
        page.close()
    assert complaints == []


def _elsewhere(address: str) -> list[str]:
    return [] if address.startswith(("file:", "data:")) else [address]
