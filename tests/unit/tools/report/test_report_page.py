"""The page as a reader gets it."""

import html
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.page import build_report
from moepp_megatron.tools.report.run_data import load_run
from moepp_megatron.tools.report.savings import compute_savings
from moepp_megatron.tools.report.summary import summarize
from tests.parallel.training_runs import VANILLA
from tests.unit.tools.report.conftest import svg_of


class Reader(HTMLParser):
    """Collects a page's text, its attributes and its pictures; checks that tags are balanced."""

    VOID = ("meta", "img")

    def __init__(self, page):
        super().__init__()
        self.open = []
        self.words = []
        self.attributes = []
        self.pictures = []
        self.feed(page)
        assert not self.open, f"tags left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag == "img":
            self.pictures.append((values["src"], values["alt"]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read_page(path):
    return Reader(path.read_text(encoding="ascii"))


@pytest.fixture(scope="module")
def full_page(full_run):
    return read_page(full_run / "report.html")


def test_the_page_shows_every_number_of_the_run(full_run, full_page):
    text = full_page.text
    data = load_run(full_run)
    summary = summarize(data)
    savings = compute_savings(data.config, summary)
    saved_bytes = savings.vanilla_a2a_bytes - summary.a2a_bytes
    for label, value in [
        ("Final loss", formatting.number(summary.loss)),
        ("Validation loss", formatting.number(summary.valid_loss)),
        ("Perplexity", formatting.number(summary.perplexity, 2)),
        ("FFN share", formatting.percent(summary.tail_ffn_fraction)),
        ("Expert work saved", formatting.percent(1 - summary.tail_ffn_fraction)),
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


def test_the_page_asks_nothing_of_the_network(full_page):
    found = full_page.attributes
    addresses = [v for _, key, v in found if key in ("src", "href", "data", "action")]
    pictures = [a for a in addresses if not a.startswith("#")]
    assert pictures
    assert all(a.startswith("data:image/svg+xml;base64,") for a in pictures)
    assert not any(tag in ("script", "link", "iframe") for tag, _, _ in found)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", "content", policy) in found


def test_the_style_names_no_address(full_run):
    source = (full_run / "report.html").read_text()
    style = re.search(r"<style>(.*?)</style>", source, re.DOTALL)
    assert "{" in style[1]
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "prefers-color-scheme: dark" in style[1]


def test_every_picture_is_whole_and_described(full_page):
    assert len(full_page.pictures) == 21
    for source, alt in full_page.pictures:
        root = ElementTree.fromstring(svg_of(source))
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


def strip(record):
    for key in ("valid_loss", "layer_expert_share", "layer_ffn_fraction"):
        record.pop(key, None)
    record |= {"expert_share": [], "a2a_bytes": 0}


def blow_up(record):
    record |= dict.fromkeys(("loss", "grad_norm", "ffn_fraction"))
    record |= {"expert_share": [None] * 12, "layer_expert_share": [[None] * 12] * 4}
    record.pop("valid_loss", None)


def all_zero_computation(record):
    record |= {"ffn_fraction": 0.0, "ffn_per_token": 0.0, "a2a_bytes": 0}


def drop(record):
    record |= {"dropped_fraction": 0.03, "z_loss": 0.5}


def only(kind):
    return {"moe": {f"num_{each}_experts": int(each == kind) for each in KINDS}}


KINDS = ("zero", "copy", "constant")
LARGE = {"model": {"num_layers": 40}, "moe": {"num_ffn_experts": 128}}
# Steps, settings, what is done to records, pictures, a number or word that is on the page.
ODD = {
    "one record": (1, {}, None, 1, "Expert work saved"),
    "vanilla": (20, {"moe": VANILLA}, None, 9, "no zero-computation experts"),
    "keys are missing": (20, {}, strip, 8, "All-to-all saved none"),
    **{kind: (20, only(kind), None, 12, f"8 FFN + 1 {kind} experts") for kind in KINDS},
    "no finite number": (20, {}, blow_up, None, "Final loss not finite"),
    "no FFN selection": (5, {}, all_zero_computation, None, "Expert work saved 100.0%"),
    "drops": (20, {}, drop, 14, "dropped 3.0% of the selections"),
    "many experts and layers": (2, LARGE, None, None, "128 FFN"),
}


# Whose curves are odd to draw, and not only to make.
RENDERED = ("one record", "no finite number", "many experts and layers")


@pytest.mark.parametrize("name", ODD)
def test_an_odd_run_has_a_page(make_run, request, name):
    steps, sections, change, pictures, shown = ODD[name]
    if name not in RENDERED:
        request.getfixturevalue("unrendered")

    def edit(records):
        for record in records if change else []:
            change(record)

    page = read_page(build_report(make_run(steps=steps, edit=edit, **sections)))
    assert shown in page.text
    assert pictures in (None, len(page.pictures))
