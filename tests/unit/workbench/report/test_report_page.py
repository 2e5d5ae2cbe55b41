"""The page as a reader gets it."""

import base64
import html
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

from moepp_megatron.cli.report import report
from moepp_megatron.workbench.report import build_report, formatting
from moepp_megatron.workbench.report.run_data import load_run
from moepp_megatron.workbench.report.savings import compute_savings
from moepp_megatron.workbench.report.summary import summarize
from tests.parallel.training_runs import VANILLA


class Reader(HTMLParser):
    """Collects a page's text, its attributes and its pictures; checks that tags are balanced."""

    VOID = ("meta", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.pictures: list[tuple[str, str]] = []
        self.feed(page)
        assert not self.open, f"tags left open: {self.open}"

    def handle_starttag(self, tag, attrs) -> None:
        values = dict(attrs)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag == "img":
            self.pictures.append((values["src"], values["alt"]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read_page(run: Path) -> Reader:
    return Reader(build_report(run).read_text(encoding="ascii"))


def test_the_page_shows_every_number_of_the_run(full_run):
    text = Reader((full_run / "report.html").read_text(encoding="ascii")).text
    data = load_run(full_run)
    summary = summarize(data)
    savings = compute_savings(data.config, summary)
    saved_bytes = savings.vanilla_a2a_bytes - savings.a2a_bytes
    for label, value in [
        ("Final loss", formatting.number(summary.loss)),
        ("Validation loss", formatting.number(summary.valid_loss)),
        ("Perplexity", formatting.number(summary.perplexity, 2)),
        ("FFN share", formatting.percent(summary.settled_ffn_fraction)),
        ("Expert work saved", formatting.percent(1 - summary.settled_ffn_fraction)),
        ("All-to-all saved", formatting.data_size(saved_bytes)),
        ("Tokens/s", formatting.count(summary.tokens_per_s)),
        ("Tokens", "122,880"),
        ("Training time", formatting.duration(summary.train_seconds)),
        ("FFN expert work", formatting.flops(savings.vanilla.ffn)),
        ("All of the layer's work", formatting.flops(savings.vanilla.total)),
        ("All-to-all bytes of the run", formatting.data_size(savings.vanilla_a2a_bytes)),
    ]:
        assert f"{label} {value} " in text
    assert "phi is 60.0%" in text
    assert "60 of 300 steps are done." in text
    assert "num_ffn_experts: 8" in text


def test_the_page_asks_nothing_of_the_network(full_run):
    page = Reader((full_run / "report.html").read_text())
    addresses = [v for _, key, v in page.attributes if key in ("src", "href", "data", "action")]
    pictures = [a for a in addresses if not a.startswith("#")]
    assert pictures
    assert all(a.startswith("data:image/svg+xml;base64,") for a in pictures)
    assert not any(tag in ("script", "link", "iframe") for tag, _, _ in page.attributes)
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in (
        page.attributes
    )


def test_the_style_names_no_address(full_run):
    source = (full_run / "report.html").read_text()
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)
    assert "{" in style[1]
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_every_picture_is_whole_and_described(full_run):
    pictures = Reader((full_run / "report.html").read_text()).pictures
    assert len(pictures) == 23
    for source, alt in pictures:
        root = ElementTree.fromstring(base64.b64decode(source.split(",", 1)[1]))
        assert root.tag.endswith("svg")
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(v.startswith(("#", "data:")) for v in links)
        assert re.search(r"\d", alt)


def test_names_and_configuration_are_escaped(make_run):
    name = "<script>alert('1')</script> & \"caf\u00e9\""
    run = make_run(steps=1, run={"name": name})
    source = build_report(run).read_text(encoding="ascii")
    assert "<script" not in source
    assert "&lt;script&gt;" in source
    assert name in html.unescape(source)
    assert Reader(source).text.count(name) == 2


def test_the_same_run_gives_the_same_bytes(full_run):
    first = (full_run / "report.html").read_bytes()
    assert build_report(full_run).read_bytes() == first
    assert sorted(p.name for p in full_run.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
    ]


@pytest.mark.usefixtures("unrendered")
def test_a_vanilla_run_has_nothing_to_save(make_run):
    page = read_page(make_run(steps=20, moe=VANILLA))
    assert "megatron-core's vanilla MoE layer: every selection goes to an FFN expert" in page.text
    assert "What MoE++ saved" not in page.text
    assert "Expert work saved" not in page.text
    assert "This layer has FFN experts only" in page.text
    assert "no zero-computation experts" in page.text
    assert len(page.pictures) == 10


def test_one_record_gives_sentences_for_curves(make_run):
    page = read_page(make_run(steps=1))
    assert page.text.count("a curve needs two") == 9
    assert "A curve needs two records" in page.text
    assert len(page.pictures) == 2
    assert "Expert work saved" in page.text


@pytest.mark.usefixtures("unrendered")
def test_missing_optional_keys_give_sentences(make_run):
    def strip(records):
        for record in records:
            for key in ("valid_loss", "layer_expert_share", "layer_ffn_fraction"):
                record.pop(key, None)
            record["expert_share"] = []
            record["a2a_bytes"] = 0

    page = read_page(make_run(steps=20, edit=strip))
    assert "Validation loss none this run was not evaluated" in page.text
    assert "exp of the mean training loss" in page.text
    assert "(layer_expert_share) were not recorded" in page.text
    assert "The shares of the experts were not recorded" in page.text
    assert "No hidden vector left its rank" in page.text
    assert "All-to-all saved none" in page.text
    assert len(page.pictures) == 8


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("kind", ["zero", "copy", "constant"])
def test_a_single_zero_computation_kind(make_run, kind: str):
    counts = {f"num_{k}_experts": int(k == kind) for k in ("zero", "copy", "constant")}
    page = read_page(make_run(steps=20, moe=counts))
    assert f"8 FFN + 1 {kind} experts" in page.text
    assert len(page.pictures) == 13
    assert any(f"{kind} " in alt and "FFN" in alt for _, alt in page.pictures)


def test_a_run_whose_numbers_are_not_finite(make_run):
    def blow_up(records):
        for record in records:
            record["loss"] = record["grad_norm"] = None
            record["ffn_fraction"] = None
            record["expert_share"] = [None] * 12
            record["layer_expert_share"] = [[None] * 12] * 4
            record.pop("valid_loss", None)

    page = read_page(make_run(steps=20, edit=blow_up))
    assert "Final loss not finite" in page.text
    assert "No record of this run has a finite loss." in page.text
    assert "vanilla layer's traffic does not follow" in page.text


@pytest.mark.usefixtures("unrendered")
def test_a_run_without_any_ffn_selection(make_run):
    def none(records):
        for record in records:
            record["ffn_fraction"] = record["ffn_per_token"] = 0.0
            record["a2a_bytes"] = 0

    text = read_page(make_run(steps=5, edit=none)).text
    assert "Expert work saved 100.0%" in text
    assert "1 / FFN share" not in text


@pytest.mark.usefixtures("unrendered")
def test_drops_and_z_loss_are_shown_where_they_are(make_run):
    def add(records):
        for record in records:
            record["dropped_fraction"], record["z_loss"] = 0.03, 0.5

    page = read_page(make_run(steps=20, edit=add))
    assert "A capacity limit dropped 3.0% of the selections" in page.text
    assert len(page.pictures) == 15


def test_many_experts_and_layers_can_be_drawn(make_run):
    page = read_page(make_run(steps=2, model={"num_layers": 40}, moe={"num_ffn_experts": 128}))
    assert any("40 MoE layers by 132 experts" in alt for _, alt in page.pictures)


@pytest.fixture
def app() -> typer.Typer:
    application = typer.Typer()
    application.command()(report)
    return application


def test_the_command_prints_where_the_page_is(make_run, app):
    run = make_run(steps=1)
    result = CliRunner().invoke(app, [str(run)])
    assert result.exit_code == 0
    assert result.stdout.strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_size > 10_000


def test_the_command_refuses_a_missing_run_in_one_line(tmp_path: Path, moepp):
    code, out, err = moepp("report", str(tmp_path / "nowhere"))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert err.endswith(
        "nowhere: is not a folder; name the folder of a run that `moepp train` has started\n"
    )
