"""The bytes of the page of `moepp inspect`."""

import html
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from moepp_megatron.config import ConfigError
from moepp_megatron.data.token_classes import CLASSES, token_classes
from moepp_megatron.workbench.inspection.request import InspectRequest
from moepp_megatron.workbench.inspection.text import TokenizedText, tokenize
from moepp_megatron.workbench.report.inspect import write_inspection
from moepp_megatron.workbench.report.inspect.page import render
from tests.unit.workbench.inspection.conftest import invented_trace

Make = Callable[..., InspectRequest]


def packed_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def test_page_is_ascii_and_asks_nothing_of_the_network(make_request: Make, text: TokenizedText):
    request = make_request()
    assert write_inspection(request, [invented_trace(len(text))]) == [("page", request.out)]
    page = request.out.read_text(encoding="ascii")
    assert not re.search(r"""(src|href)=["'](?!data:image/svg|#)""", page)
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


def test_text_cannot_break_out(make_request: Make, tokenizer) -> None:
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


def test_a_very_short_text_has_sentences_for_plots(make_request: Make, tokenizer) -> None:
    own = tokenize(tokenizer, "ab", "x", 10)
    request = make_request(text=own, classes=token_classes("ab", own.spans.tolist(), "text"))
    page = render(request, [invented_trace(2)])
    assert page.count("The text is too short") == 3


def test_two_models_show_their_difference(make_request: Make, text: TokenizedText) -> None:
    traces = [invented_trace(len(text), seed) for seed in (1, 2)]
    page = html.unescape(render(make_request(), traces))
    words = [trace.ffn_mean.mean() for trace in traces]
    assert f"{words[0]:.2f} / {words[1]:.2f}" in page
    chosen = make_request().classes == CLASSES.index("keyword")
    a, b = (trace.ffn_mean[chosen].mean() for trace in traces)
    assert f'<td class="num">{b - a:+.2f}</td>' in page
    assert len(packed_of(page)["models"]) == 2


def test_an_unwritable_page_is_a_line(make_request: Make, text: TokenizedText, tmp_path) -> None:
    request = make_request(out=tmp_path / "gone" / "page.html")
    with pytest.raises(ConfigError, match=r"page\.html cannot be written \(No such file"):
        write_inspection(request, [invented_trace(len(text))])
