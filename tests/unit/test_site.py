"""The site: generated pages, proofs that exist, no loads from elsewhere."""

import re

import pytest
import typer

from benchmarks import compared_sources, pages
from benchmarks.site_check import loads_elsewhere
from tests import ROOT

PROVEN, COMPARED = ((ROOT / "docs" / name).read_text() for name in ("proven.md", "compared.md"))


@pytest.fixture(autouse=True)
def _commands_of_its_own(monkeypatch):
    """The page changes the commands that it is given; other tests share theirs (`one_program`)."""
    build = typer.main.get_command
    monkeypatch.setattr(typer.main, "get_command", build.__wrapped__)


def test_every_setting_is_on_its_page():
    page = pages.settings()
    assert "| `tau` | `0.75` | 1 | > 0, <= 10 |" in page
    assert "## routing_guard.rules[]\n" in page


def test_flags_have_their_setting_and_its_meaning():
    page = pages.megatron_flags()
    assert "| `--moe-router-topk` | `moe.router_topk` | Experts selected per token, K |\n" in page
    assert "| `--bf16` | `precision.dtype=bf16` |" in page
    assert "Ett\\|tt\\|ttL" in page


def _missing(text):
    """Files, tests and benchmarks that a text names and that do not exist."""
    missing = []
    for path, test in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.\w+)(?:::(\w+))?`", text):
        file = ROOT / path
        if not file.is_file() or (test and f"\ndef {test}(" not in file.read_text()):
            missing.append(f"{path}::{test}" if test else path)
    modules = re.findall(r"python -m (benchmarks\.\w+)", text)
    return missing + [m for m in modules if not (ROOT / f"{m.replace('.', '/')}.py").is_file()]


def test_benchmarks_are_named_that_exist():
    files = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "moepp_megatron").rglob("*.py")]
    texts = {path: " ".join(path.read_text().split()) for path in files}
    gone = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, text in texts.items()
        for name in re.findall(r"benchmarks(?:\.|/(?=\w+\.(?:py|sh)))(\w+)(?!\S* of commit)", text)
        if not any((ROOT / "benchmarks" / f"{name}{end}").is_file() for end in (".py", ".sh"))
    ]
    assert gone == []


def test_every_proof_exists():
    assert PROVEN.count("::test_") > 60
    assert COMPARED.count("::test_") > 15
    assert _missing(PROVEN) == _missing(COMPARED) == []


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ('<script src="https://cdn.example/a.js"></script>', ".html"),
        ('<link rel="stylesheet" href="//fonts.example/css">', ".html"),
        ('<img srcset="a.png 1x, https://images.example/a.png 2x">', ".html"),
        ("<style>@import 'https://fonts.example/a.css';</style>", ".html"),
        ('<p style="background: url(https://images.example/a.png)">', ".html"),
        ('<image xlink:href="http://images.example/a.png"/>', ".svg"),
        ("@font-face { src: url('https://fonts.example/a.woff2') }", ".css"),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(text, suffix):
    assert len(loads_elsewhere(text, suffix)) == 1


def test_links_and_local_files_are_no_loads():
    text = (
        '<a href="https://a.example/">a</a><link rel="canonical" href="https://a.example/">'
        '<script src="_static/a.js"></script><img src="a.svg"><style>a { color: red }</style>'
    )
    assert loads_elsewhere(text, ".html") == []


def test_every_cell_about_another_repository_is_quoted():
    assert compared_sources.unquoted() == []
