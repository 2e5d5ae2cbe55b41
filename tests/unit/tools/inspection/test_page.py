"""The bytes of the page of `moepp inspect`."""

import html
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from moepp_megatron.config import ConfigError
from moepp_megatron.data.token_classes import token_classes
from moepp_megatron.tools.inspection.request import InspectRequest
from moepp_megatron.tools.inspection.text import TokenizedText, tokenize
from moepp_megatron.tools.report.inspect import write_inspection
from moepp_megatron.tools.report.inspect.page import render
from tests.unit.tools.inspection.conftest import invented_trace

Make = Callable[..., InspectRequest]


def packed_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def test_page_is_ascii_and_asks_nothing_of_the_network(make_request: Make, text: TokenizedText):
    request = make_request()
    assert write_inspection(request, invented_trace(len(text))) == [("page", request.out)]
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
    assert page.encode() == render(request, invented_trace(len(text))).encode(
        "ascii", "xmlcharrefreplace"
    )


def test_text_cannot_break_out(make_request: Make, tokenizer) -> None:
    evil = "</script><script>alert('1')</script> <b>&amp; \u2028 caf\u00e9 " * 3
    own = tokenize(tokenizer, evil, "<i>&", 1000)
    classes = token_classes(own.text, own.spans.tolist(), "text")
    request = make_request(text=own, language="text", classes=classes)
    write_inspection(request, invented_trace(len(own)))
    page = request.out.read_text(encoding="ascii")
    assert page.count("<script") == page.count("</script>") == 2
    assert "".join(packed_of(page)["pieces"]) == evil
    assert "<i>&" not in page
    assert "&lt;i&gt;&amp;" in page


def test_an_unwritable_page_is_a_line(make_request: Make, text: TokenizedText, tmp_path) -> None:
    request = make_request(out=tmp_path / "gone" / "page.html")
    with pytest.raises(ConfigError, match=r"page\.html cannot be written \(No such file"):
        write_inspection(request, invented_trace(len(text)))
